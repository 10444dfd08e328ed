"""The appraisal: every check, numbered, each answered. Hostile evidence fails checks; it never raises."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable
from typing import TypeVar

from pydantic import ValidationError

from cloister_attest.binding import gpu_digest, report_data
from cloister_attest.channel import spki_of
from cloister_attest.checks import AFTER, BEFORE, PLATFORM_CHECKS
from cloister_attest.collateral.items import Item
from cloister_attest.evidence import LOG_KEY_BYTES, Evidence
from cloister_attest.outcome import EvidenceError, Outcome, ReportDataUnchecked, not_applicable, passed
from cloister_attest.platforms import Claims, appraise_hardware, claims_of
from cloister_attest.policy import AttestationPolicy, HardwarePolicy
from cloister_attest.reference_values import verify_reference_values
from cloister_attest.result import AttestationResult, Check, checked
from cloister_data.checkpoint import Checkpoint, CheckpointError, verify_checkpoint
from cloister_data.policy import Platform

_T = TypeVar("_T")


def appraise(
    evidence: Evidence | bytes,
    policy: AttestationPolicy,
    *,
    certificate: bytes,
    nonce: bytes,
    at: int,
    cached: Iterable[Item] = (),
) -> AttestationResult:
    """Judge `evidence` for one channel and one question.

    Makes all the checks of `check_names` for the trust file's platform, whatever the earlier ones came to. The caller
    must have made the channel with `pinned_context(certificate)`, chosen `nonce` freshly, and must refuse a result that
    isn't `ok`.

    Args:
        evidence: as read, or the JSON bytes as they came.
        policy: the trust file.
        certificate: the channel's TLS certificate, DER, to whose key the evidence must be bound.
        nonce: the 32 bytes that were asked with.
        at: the moment to verify at, Unix seconds.
        cached: collateral at hand, besides what comes with the evidence; what a policy demands and nobody has fails.
    """
    return _Appraisal(evidence, policy, certificate, nonce, at, tuple(cached)).run()


def appraise_report(
    platform: Platform,
    report: bytes,
    certificates: tuple[bytes, ...],
    policy: AttestationPolicy,
    *,
    expected_report_data: bytes | ReportDataUnchecked,
    at: int,
    cached: Iterable[Item] = (),
    reference_values: bytes | None = None,
) -> AttestationResult:
    """Judge a report or quote that came without a channel: from a file, say.

    Makes the checks of `appraise`. What a report alone can't show is not applicable where the trust file doesn't demand
    it, and fails where it does.

    Args:
        platform: whose report it is.
        report, certificates: as in `Evidence`.
        policy: the trust file.
        expected_report_data: the 64 bytes that the report must have been made for, or why that isn't compared.
        at: the moment to verify at, Unix seconds.
        cached: collateral at hand.
        reference_values: what the image's publisher signed, if that is at hand.
    """
    return _ReportAppraisal(
        platform, report, certificates, policy, expected_report_data, at, tuple(cached), reference_values
    ).run()


class _Appraisal:
    """One appraisal. What a check has proven is kept for the checks after it."""

    def __init__(
        self,
        evidence: Evidence | bytes,
        policy: AttestationPolicy,
        certificate: bytes,
        nonce: bytes,
        at: int,
        cached: tuple[Item, ...],
    ) -> None:
        self._given, self._policy, self._certificate, self._nonce, self._at = evidence, policy, certificate, nonce, at
        self._cached = cached
        self._demanded: HardwarePolicy = policy.hardware
        self._evidence: Evidence | None = None
        self._claims: Claims | None = None
        self._expected: bytes | ReportDataUnchecked = b""
        self._checkpoint: Checkpoint | None = None

    def run(self) -> AttestationResult:
        steps: dict[str, Callable[[], Outcome]] = {
            "format": self._format,
            "platform": self._platform,
            "binding": self._binding,
            "publisher": self._publisher,
            "gpu": self._gpu,
            "checkpoint": self._log,
        }
        before = tuple(checked(name, steps[name], *told) for name, told in BEFORE.items())
        hardware = self._hardware()
        after = tuple(checked(name, steps[name], *told) for name, told in AFTER.items())
        evidence, claims = self._evidence, self._claims
        return AttestationResult(
            platform=evidence.platform if evidence else None,
            simulated=evidence is not None and evidence.platform == "simulated",
            checks=before + hardware + after,
            measurement=claims.measurement if claims else "",
            chip=claims.chip if claims else "",
            tcb=claims.tcb if claims else "",
            verified_at=self._at,
            certificate=hashlib.sha256(self._certificate).hexdigest() if self._certificate else "",
            checkpoint=evidence.checkpoint if evidence and self._checkpoint else "",
        )

    def _format(self) -> Outcome:
        if isinstance(self._given, Evidence):
            self._evidence = self._given
        else:
            try:
                self._evidence = Evidence.from_json(self._given)
            except ValidationError as error:
                raise EvidenceError(f"the evidence can't be read ({error.error_count()} faults)") from error
        self._claims = claims_of(self._evidence.platform, self._evidence.report)
        return passed("the evidence and its report are whole")

    def _platform(self) -> Outcome:
        shown, demanded = _needed(self._evidence, "the evidence").platform, self._policy.platform
        if shown != demanded:
            raise EvidenceError(
                f"the trust file demands {_TITLES[demanded]} and the machine shows {_TITLES[shown]}"
                + (", which protects nothing" if shown == "simulated" else "")
            )
        return passed(f"the machine shows {_TITLES[shown]}, as the trust file demands")

    def _binding(self) -> Outcome:
        evidence = _needed(self._evidence, "the evidence")
        self._expected = expected = report_data(
            spki_of(self._certificate),
            self._nonce,
            gpu_digest(evidence.gpu),
            evidence.checkpoint.encode(),
            evidence.log_key,
        )
        if not hmac.compare_digest(expected, _needed(self._claims, "the report").report_data):
            raise EvidenceError(
                "the report was made for another key, another nonce or another audit log: it may be relayed or replayed"
            )
        return passed("the report was made for this channel's key, this nonce and this audit log")

    def _publisher(self) -> Outcome:
        evidence, publisher = _needed(self._evidence, "the evidence"), self._policy.publisher
        if publisher == "none":
            return not_applicable("the trust file itself says which images may run")
        if evidence.reference_values is None:
            raise EvidenceError(
                f"the machine shows no reference values of {publisher.image!r}: its operator must set reference_values"
            )
        values = verify_reference_values(evidence.reference_values, publisher, self._at)
        shown = _needed(self._claims, "the report").image
        for image in values.values:
            chosen = self._policy.with_published(image, shown)
            if chosen is not None:
                self._demanded = chosen
                return passed(f"the publisher vouches for this image: {values.image} {values.version}")
        raise EvidenceError(f"the machine runs none of the images of {values.image} {values.version}")

    def _hardware(self) -> tuple[Check, ...]:
        """The checks of the platform that is demanded: on another platform's evidence none of them can be made."""
        explained = PLATFORM_CHECKS[self._policy.platform]
        evidence = self._evidence
        if evidence is None or evidence.platform != self._policy.platform:
            return tuple(checked(name, _impossible, *told) for name, told in explained.items())
        return appraise_hardware(evidence, self._demanded, self._expected, self._cached, self._at)

    def _gpu(self) -> Outcome:
        evidence, demanded = _needed(self._evidence, "the evidence"), self._policy.gpu
        if demanded == "required":
            if evidence.gpu is None:
                raise EvidenceError("the trust file demands a confidential GPU and the machine shows none")
            raise EvidenceError("this version of Cloister doesn't verify a GPU's evidence yet")
        if demanded == "any":
            return not_applicable("the trust file accepts any GPU, proven or not")
        if evidence.gpu is not None:
            raise EvidenceError("the machine shows a GPU and the trust file forbids one")
        return not_applicable("the machine shows no GPU and the trust file demands none")

    def _log(self) -> Outcome:
        evidence, policy = _needed(self._evidence, "the evidence"), self._policy
        if policy.log_key not in ("any", evidence.log_key.hex()):
            raise EvidenceError("the audit log has another key than the trust file names")
        try:
            checkpoint = verify_checkpoint(evidence.checkpoint, evidence.log_key)
        except CheckpointError as error:
            raise EvidenceError(str(error)) from error
        if policy.log_origin not in ("any", checkpoint.origin):
            raise EvidenceError("the audit log has another name than the trust file names")
        self._checkpoint = checkpoint
        return passed(f"the audit log's key signed a checkpoint over {checkpoint.size} entries")


class _ReportAppraisal(_Appraisal):
    """The appraisal of a report without a channel, a log, or a GPU."""

    def __init__(
        self,
        platform: Platform,
        report: bytes,
        certificates: tuple[bytes, ...],
        policy: AttestationPolicy,
        expected: bytes | ReportDataUnchecked,
        at: int,
        cached: tuple[Item, ...],
        reference_values: bytes | None,
    ) -> None:
        alone = Evidence(
            platform=platform,
            report=report,
            certificates=certificates,
            checkpoint="",
            log_key=bytes(LOG_KEY_BYTES),
            reference_values=reference_values,
        )
        super().__init__(alone, policy, b"", b"", at, cached)
        self._expected = expected

    def _binding(self) -> Outcome:
        shown, expected = _needed(self._claims, "the report").report_data, self._expected
        if isinstance(expected, ReportDataUnchecked):
            return not_applicable(expected.reason)
        if not hmac.compare_digest(expected, shown):
            raise EvidenceError("the report was made for other report data: it may be relayed or replayed")
        return passed("the report was made for the expected report data")

    def _gpu(self) -> Outcome:
        if self._policy.gpu == "required":
            raise EvidenceError("the trust file demands a confidential GPU, and a report alone shows none")
        return not_applicable("a report alone shows no GPU, and the trust file demands none")

    def _log(self) -> Outcome:
        if (self._policy.log_key, self._policy.log_origin) != ("any", "any"):
            raise EvidenceError("the trust file names an audit log, and a report alone shows none")
        return not_applicable("a report alone shows no audit log, and the trust file names none")


_TITLES: dict[Platform, str] = {
    "simulated": "simulated hardware",
    "sev-snp": "AMD SEV-SNP",
    "tdx": "Intel TDX",
}


def _needed(value: _T | None, name: str) -> _T:
    if value is None:
        raise EvidenceError(f"not checked, for {name} can't be read")
    return value


def _impossible() -> Outcome:
    raise EvidenceError("not checked, for there is no evidence of the platform that the trust file demands")
