"""Whether what a simulated report says is what the trust file demands. Every function raises EvidenceError."""

from __future__ import annotations

from cloister_attest.fields import accepts
from cloister_attest.outcome import EvidenceError, Outcome, not_applicable, passed
from cloister_attest.simulated.abi import Report
from cloister_attest.simulated.policy import SimulatedPolicy
from cloister_attest.simulated.verify import Chain


def validate_debug(report: Report, policy: SimulatedPolicy) -> Outcome:
    if policy.debug == "any":
        return not_applicable("the trust file accepts machines that their host may debug")
    if report.debug:
        raise EvidenceError("the host may debug this machine, and so read its memory")
    return passed("the host may not debug the machine")


def validate_measurement(report: Report, policy: SimulatedPolicy) -> Outcome:
    if policy.measurements == "any":
        return not_applicable("the trust file accepts any image")
    measured = report.measurement.hex()
    if not accepts(policy.measurements, measured):
        raise EvidenceError(f"the machine runs {measured}, which is none of the images that the trust file names")
    return passed("the machine runs an image that the trust file names")


def validate_tcb(report: Report, chain: Chain, policy: SimulatedPolicy) -> Outcome:
    if report.tcb != chain.tcb:
        raise EvidenceError(f"the report claims tcb {report.tcb}, its signer was issued for {chain.tcb}")
    if policy.minimum_tcb == "any":
        return not_applicable("the trust file accepts any security version")
    if report.tcb < policy.minimum_tcb:
        raise EvidenceError(f"the tcb is {report.tcb}, and the trust file demands at least {policy.minimum_tcb}")
    return passed(f"the tcb is {report.tcb}, at least {policy.minimum_tcb}")


def validate_chip(report: Report, chain: Chain, policy: SimulatedPolicy) -> Outcome:
    if report.chip_id != chain.chip_id:
        raise EvidenceError("the report names another chip than its signer was issued for")
    chip = report.chip_id.hex()
    if chip in policy.chips_denied:
        raise EvidenceError(f"the trust file denies the chip {chip}")
    if policy.chips_allowed == "any":
        return passed("the signer belongs to the report's chip, which the trust file doesn't deny")
    if chip not in policy.chips_allowed:
        raise EvidenceError(f"the chip {chip} is none of those that the trust file allows")
    return passed("the signer belongs to the report's chip, which the trust file allows")
