"""What one check comes to: it passes, it doesn't apply for a stated reason, or it raises EvidenceError."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["pass", "fail", "not-applicable"]


class EvidenceError(Exception):
    """The evidence doesn't hold. The text is for people; of the evidence it quotes only hex and numbers."""


@dataclass(frozen=True)
class Outcome:
    """The verdict of a check that didn't raise, and why."""

    verdict: Verdict
    reason: str


def passed(reason: str) -> Outcome:
    return Outcome("pass", reason)


def not_applicable(reason: str) -> Outcome:
    return Outcome("not-applicable", reason)


@dataclass(frozen=True)
class ReportDataUnchecked:
    """The caller doesn't compare REPORT_DATA here, for this reason: the report may be relayed or replayed."""

    reason: str

    def __post_init__(self) -> None:
        if not self.reason.strip():
            raise ValueError("report data goes unchecked only for a stated reason")
