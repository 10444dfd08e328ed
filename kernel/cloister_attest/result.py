"""The verdict: one answer per named check, for people and for programs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from html import escape
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cloister_attest.checks import check_names
from cloister_attest.outcome import EvidenceError, Outcome, Verdict
from cloister_data.base import Digest, Text, UnixSeconds, Wire
from cloister_data.policy import Platform

SIMULATED_WARNING = (
    "SIMULATED HARDWARE: nothing but a throw-away key vouches for this machine. Never use it for real data."
)

_MARKS: dict[Verdict, str] = {
    "pass": "\N{CHECK MARK}",
    "fail": "\N{BALLOT X}",
    "not-applicable": "\N{EN DASH}",
}


class Check(Wire):
    """One check: what it establishes (`explanation`), how it came out here and why, and the text it comes from."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
    verdict: Verdict
    explanation: Text
    reason: Text
    source: Text

    @model_validator(mode="after")
    def _reasoned(self) -> Self:
        if self.verdict != "pass" and not self.reason:
            raise ValueError("a check that didn't pass says why")
        return self


class AttestationResult(Wire):
    """What the appraisal of one machine's evidence came to.

    `measurement` and `chip` are hex and `tcb` is the security version of the platform in words, as the report states
    them (empty where it doesn't, or can't be read); they are proven only where `ok` holds. `certificate` is the SHA-256
    of the TLS certificate whose key the evidence was checked against, empty for a report without a channel;
    `checkpoint` is the audit log's signed note.
    """

    platform: Platform | None
    simulated: bool
    checks: tuple[Check, ...] = Field(max_length=128)
    measurement: Annotated[str, Field(pattern=r"^[0-9a-f]{0,128}$")]
    chip: Annotated[str, Field(pattern=r"^[0-9a-f]{0,128}$")]
    tcb: Text
    verified_at: UnixSeconds
    certificate: Digest | Literal[""]
    checkpoint: Annotated[str, Field(max_length=8192)]

    @property
    def ok(self) -> bool:
        """True only where every check of the platform was made, and none failed."""
        if self.platform is None:
            return False
        return {check.name for check in self.checks}.issuperset(check_names(self.platform)) and not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.verdict not in ("pass", "not-applicable"))

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """The verdict as plain text."""
        lines = [SIMULATED_WARNING, ""] if self.simulated else []
        lines += [self.headline, ""]
        widest = max((len(check.name) for check in self.checks), default=0)
        lines += [
            f"{number:>3}  {_MARKS[check.verdict]}  {check.name:<{widest}}  {check.reason}"
            for number, check in enumerate(self.checks, 1)
        ]
        lines += ["", *(f"{name}: {value}" for name, value in self.facts)]
        return "\n".join(_printable(line) for line in lines)

    def _repr_html_(self) -> str:
        colours: dict[Verdict, str] = {"pass": "#1a7f37", "fail": "#cf222e", "not-applicable": "#6e7781"}
        rows = "".join(
            f'<tr title="{escape(check.explanation)} ({escape(check.source)})"><td>{number}</td>'
            f'<td style="color:{colours[check.verdict]};font-weight:bold">{_MARKS[check.verdict]}</td>'
            f'<td style="text-align:left">{escape(check.name)}</td>'
            f'<td style="text-align:left">{escape(_printable(check.reason))}</td></tr>'
            for number, check in enumerate(self.checks, 1)
        )
        warning = (
            f'<p style="background:#fff8c5;color:#4d2d00;border:1px solid #d4a72c;padding:.4em">'
            f"<b>{escape(SIMULATED_WARNING)}</b></p>"
            if self.simulated
            else ""
        )
        facts = "".join(
            f'<li>{escape(name)}: <code style="overflow-wrap:anywhere">{escape(_printable(value))}</code></li>'
            for name, value in self.facts
        )
        return (
            f'<div class="cloister-attestation">{warning}<p><b>{escape(self.headline)}</b></p>'
            f"<table><thead><tr><th></th><th></th><th>check</th><th>why</th></tr></thead>"
            f"<tbody>{rows}</tbody></table><ul>{facts}</ul></div>"
        )

    @property
    def headline(self) -> str:
        """The verdict in a line."""
        when = _when(self.verified_at)
        if self.ok and any(check.name == "binding" and check.verdict != "pass" for check in self.checks):
            return f"The report holds, but whom it answers wasn't checked: it may be relayed ({self.platform}, {when})."
        if self.ok:
            return f"Verified: the evidence holds ({self.platform}, {when})."
        failed = ", ".join(check.name for check in self.failed) or "checks are missing"
        return f"REFUSED: the evidence doesn't hold ({failed}; {when})."

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What the report says of the machine, as (name, value)."""
        return [
            ("platform", self.platform or "unknown"),
            ("measurement", self.measurement or "unknown"),
            ("chip", self.chip or "unknown"),
            ("tcb", self.tcb or "unknown"),
            ("certificate", self.certificate or "none: a report without a channel"),
        ]


def _when(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, OSError, ValueError):
        return f"{seconds} s"


def _printable(line: str) -> str:
    """Without control characters: a verdict is printed on terminals, and parts of it come from elsewhere."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line)


def checked(name: str, step: Callable[[], Outcome], explanation: str, source: str) -> Check:
    """Make one check: what `step` answers, or a failure where it raises, whatever it raises."""
    try:
        outcome = step()
    except EvidenceError as error:
        outcome = Outcome("fail", str(error))
    except Exception as error:
        # Whatever a parser does on hostile bytes, the check has not passed.
        outcome = Outcome("fail", f"the check itself failed on this evidence ({type(error).__name__})")
    return Check(
        name=name, verdict=outcome.verdict, explanation=explanation, reason=outcome.reason[:4000], source=source
    )
