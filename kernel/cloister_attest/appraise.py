"""The appraisal: every check, numbered, each answered. Hostile evidence fails checks; it never raises."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable

from pydantic import ValidationError

from cloister_attest.binding import gpu_digest, report_data
from cloister_attest.channel import spki_of
from cloister_attest.evidence import Evidence
from cloister_attest.outcome import EvidenceError, Outcome, not_applicable, passed
from cloister_attest.policy import AttestationPolicy
from cloister_attest.result import CHECK_NAMES, AttestationResult, checked
from cloister_attest.simulated import abi, validate, verify
from cloister_data.checkpoint import Checkpoint, CheckpointError, verify_checkpoint
from cloister_data.policy import Platform

_EXPLANATIONS: dict[str, tuple[str, str]] = {
    "format": ("The evidence and the report in it are whole and of a known version.", "docs/protocol.md, Evidence"),
    "platform": ("The evidence comes from the kind of hardware that the trust file demands.", "trust file: platform"),
    "chain": ("The report's signer was issued by the chain's root, and each may do what it does.", "RFC 5280, 6.1"),
    "root": ("The chain's root is pinned.", "trust file: roots"),
    "dates": ("Every certificate of the chain is valid now.", "RFC 5280, 4.1.2.5"),
    "signature": ("The hardware's signer signed the report.", "FIPS 186-5, 6.4"),
    "binding": (
        "The report was made for this channel's key, this client's nonce, and this audit log: it is neither relayed "
        "nor replayed.",
        "docs/protocol.md, report_data",
    ),
    "debug": ("The host can't read the machine through its debugger.", "trust file: debug"),
    "measurement": ("The machine runs an image that the trust file names.", "trust file: measurements"),
    "tcb": (
        "The platform's firmware is recent enough, and is the one its signer was issued for.",
        "trust file: minimum_tcb",
    ),
    "chip": (
        "The processor is the one its signer was issued for, and is admitted.",
        "trust file: chips_allowed, chips_denied",
    ),
    "gpu": ("The confidential GPU, where one is demanded, proves itself.", "trust file: gpu"),
    "checkpoint": ("The audit log's key signed the checkpoint.", "C2SP tlog-checkpoint, signed-note"),
}


def appraise(
    evidence: Evidence | bytes, policy: AttestationPolicy, *, certificate: bytes, nonce: bytes, at: int
) -> AttestationResult:
    """Judge `evidence` for one channel and one question.

    Makes all the checks of `CHECK_NAMES`, whatever the earlier ones came to. The caller must have made the channel
    with `pinned_context(certificate)`, chosen `nonce` freshly, and must refuse a result that isn't `ok`.

    Args:
        evidence: as read, or the JSON bytes as they came.
        policy: the trust file.
        certificate: the channel's TLS certificate, DER, to whose key the evidence must be bound.
        nonce: the 32 bytes that were asked with.
        at: the moment to verify at, Unix seconds.
    """
    return _Appraisal(evidence, policy, certificate, nonce, at).run()


class _Appraisal:
    """One appraisal. What a check has proven is kept for the checks after it."""

    def __init__(
        self, evidence: Evidence | bytes, policy: AttestationPolicy, certificate: bytes, nonce: bytes, at: int
    ) -> None:
        self._given, self._policy, self._certificate, self._nonce, self._at = evidence, policy, certificate, nonce, at
        self._evidence: Evidence | None = None
        self._report: abi.Report | None = None
        self._chain: verify.Chain | None = None
        self._checkpoint: Checkpoint | None = None

    def run(self) -> AttestationResult:
        steps: dict[str, Callable[[], Outcome]] = {
            "format": self._format,
            "platform": self._platform,
            "chain": self._links,
            "root": self._root,
            "dates": self._dates,
            "signature": self._signature,
            "binding": self._binding,
            "debug": lambda: validate.validate_debug(self._need_report(), self._policy),
            "measurement": lambda: validate.validate_measurement(self._need_report(), self._policy),
            "tcb": lambda: validate.validate_tcb(self._need_report(), self._need_chain(), self._policy),
            "chip": lambda: validate.validate_chip(self._need_report(), self._need_chain(), self._policy),
            "gpu": self._gpu,
            "checkpoint": self._log,
        }
        checks = tuple(checked(name, steps[name], *_EXPLANATIONS[name]) for name in CHECK_NAMES)
        evidence, report = self._evidence, self._report
        return AttestationResult(
            platform=evidence.platform if evidence else None,
            simulated=evidence is not None and evidence.platform == "simulated",
            checks=checks,
            measurement=report.measurement.hex() if report else "",
            chip=report.chip_id.hex() if report else "",
            tcb=report.tcb if report else None,
            verified_at=self._at,
            certificate=hashlib.sha256(self._certificate).hexdigest(),
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
        _supported(self._evidence.platform)
        self._report = abi.parse(self._evidence.report)
        return passed("the evidence and its report are whole")

    def _platform(self) -> Outcome:
        shown, demanded = self._need_evidence().platform, self._policy.platform
        if shown != demanded:
            raise EvidenceError(
                f"the trust file demands {_TITLES[demanded]} and the machine shows {_TITLES[shown]}"
                + (", which protects nothing" if shown == "simulated" else "")
            )
        _supported(shown)
        return passed(f"the machine shows {_TITLES[shown]}, as the trust file demands")

    def _links(self) -> Outcome:
        evidence = self._need_evidence()
        _supported(evidence.platform)
        self._chain = verify.verify_chain(evidence.certificates)
        return passed("the root issued the report's signer")

    def _root(self) -> Outcome:
        pinned = self._policy.roots
        if pinned == "vendor":
            raise EvidenceError("the trust file demands a processor maker's root, and this version carries none yet")
        return passed(
            f"the trust file pins the root {verify.verify_root(self._need_chain(), frozenset(pinned))[:16]}..."
        )

    def _dates(self) -> Outcome:
        until = verify.verify_dates(self._need_chain(), self._at)
        return passed(f"the certificates are valid until {until:%Y-%m-%d}")

    def _signature(self) -> Outcome:
        verify.verify_signature(self._need_report(), self._need_chain())
        return passed("the hardware's signer signed the report")

    def _binding(self) -> Outcome:
        evidence = self._need_evidence()
        expected = report_data(
            spki_of(self._certificate),
            self._nonce,
            gpu_digest(evidence.gpu),
            evidence.checkpoint.encode(),
            evidence.log_key,
        )
        if not hmac.compare_digest(expected, self._need_report().report_data):
            raise EvidenceError(
                "the report was made for another key, another nonce or another audit log: it may be relayed or replayed"
            )
        return passed("the report was made for this channel's key, this nonce and this audit log")

    def _gpu(self) -> Outcome:
        evidence, demanded = self._need_evidence(), self._policy.gpu
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
        evidence, policy = self._need_evidence(), self._policy
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

    def _need_evidence(self) -> Evidence:
        if self._evidence is None:
            raise EvidenceError("not checked, for the evidence can't be read")
        return self._evidence

    def _need_report(self) -> abi.Report:
        if self._report is None:
            raise EvidenceError("not checked, for the report can't be read")
        return self._report

    def _need_chain(self) -> verify.Chain:
        if self._chain is None:
            raise EvidenceError("not checked, for the certificate chain doesn't hold")
        return self._chain


_TITLES: dict[Platform, str] = {
    "simulated": "simulated hardware",
    "sev-snp": "AMD SEV-SNP",
    "tdx": "Intel TDX",
}


def _supported(platform: Platform) -> None:
    if platform != "simulated":
        raise EvidenceError(f"this version of Cloister doesn't verify {_TITLES[platform]} evidence yet")
