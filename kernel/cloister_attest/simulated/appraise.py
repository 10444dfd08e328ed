"""The appraisal of a simulated report: every check, each answered. Hostile evidence fails checks; it never raises."""

from __future__ import annotations

from collections.abc import Callable

from cloister_attest.outcome import EvidenceError, Outcome, passed
from cloister_attest.result import Check, checked
from cloister_attest.simulated import abi, validate, verify
from cloister_attest.simulated.explain import SIMULATED_CHECKS
from cloister_attest.simulated.policy import SimulatedPolicy


def appraise_simulated(
    report: bytes, certificates: tuple[bytes, ...], policy: SimulatedPolicy, at: int
) -> tuple[Check, ...]:
    """Make all the checks of `SIMULATED_CHECKS`, whatever the earlier ones came to.

    Args:
        report: as the simulated hardware made it.
        certificates: DER, leaf and root.
        policy: what is demanded.
        at: the moment to verify at, Unix seconds.
    """
    return _Appraisal(report, certificates, policy, at).run()


class _Appraisal:
    """One appraisal. What a check has proven is kept for the checks after it."""

    def __init__(self, report: bytes, certificates: tuple[bytes, ...], policy: SimulatedPolicy, at: int) -> None:
        self._bytes, self._certificates, self._policy, self._at = report, certificates, policy, at
        self._proven: verify.Chain | None = None

    def run(self) -> tuple[Check, ...]:
        policy = self._policy
        steps: dict[str, Callable[[], Outcome]] = {
            "chain": self._links,
            "root": self._root,
            "dates": self._dates,
            "signature": self._signature,
            "debug": lambda: validate.validate_debug(self._report(), policy),
            "measurement": lambda: validate.validate_measurement(self._report(), policy),
            "tcb": lambda: validate.validate_tcb(self._report(), self._chain(), policy),
            "chip": lambda: validate.validate_chip(self._report(), self._chain(), policy),
        }
        return tuple(checked(name, steps[name], *told) for name, told in SIMULATED_CHECKS.items())

    def _links(self) -> Outcome:
        self._proven = verify.verify_chain(self._certificates)
        return passed("the root issued the report's signer")

    def _root(self) -> Outcome:
        digest = verify.verify_root(self._chain(), frozenset(self._policy.roots))
        return passed(f"the trust file pins the root {digest[:16]}...")

    def _dates(self) -> Outcome:
        until = verify.verify_dates(self._chain(), self._at)
        return passed(f"the certificates are valid until {until:%Y-%m-%d}")

    def _signature(self) -> Outcome:
        verify.verify_signature(self._report(), self._chain())
        return passed("the hardware's signer signed the report")

    def _report(self) -> abi.Report:
        return abi.parse(self._bytes)

    def _chain(self) -> verify.Chain:
        if self._proven is None:
            raise EvidenceError("not checked, for the certificate chain doesn't hold")
        return self._proven
