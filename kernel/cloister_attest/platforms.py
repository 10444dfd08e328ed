"""The platforms side by side: what each report claims, and who judges it.

A platform is a package with `abi` (parse), `verify` (authenticate), `validate` (judge), `policy` and `appraise`, and a
branch in each of the two functions here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cloister_attest.collateral.choose import snp_collateral, tdx_collateral
from cloister_attest.collateral.items import Item, Kind
from cloister_attest.collateral.needs import Need, needs_of_snp
from cloister_attest.evidence import Evidence
from cloister_attest.outcome import EvidenceError, ReportDataUnchecked
from cloister_attest.policy import HardwarePolicy
from cloister_attest.reference_values import ImageValues, SimulatedImage, SnpImage, TdxImage
from cloister_attest.result import Check
from cloister_attest.simulated import abi as simulated_abi
from cloister_attest.simulated.appraise import appraise_simulated
from cloister_attest.simulated.policy import SimulatedPolicy
from cloister_attest.snp import abi as snp_abi
from cloister_attest.snp.appraise import appraise_snp
from cloister_attest.snp.policy import SnpPolicy
from cloister_attest.tdx import abi as tdx_abi
from cloister_attest.tdx.appraise import appraise_tdx
from cloister_data.policy import Platform


@dataclass(frozen=True)
class Claims:
    """What a report says, proven or not.

    Attributes:
        report_data: the 64 bytes that the report was asked with.
        image: the values that the image is known by.
        measurement: the first of them, 48 bytes in hex.
        chip: the processor, in hex; empty where the report doesn't name one.
        tcb: the platform's security version, for people.
    """

    report_data: bytes
    image: ImageValues
    measurement: str
    chip: str
    tcb: str


def claims_of(platform: Platform, report: bytes) -> Claims:
    """Read a report. Raises EvidenceError where it isn't one whole report of the platform."""
    if platform == "simulated":
        simulated = simulated_abi.parse(report)
        measurement = simulated.measurement.hex()
        image = SimulatedImage(measurement=measurement)
        return Claims(simulated.report_data, image, measurement, simulated.chip_id.hex(), str(simulated.tcb))
    if platform == "sev-snp":
        snp = snp_abi.parse(report)
        measurement = snp.measurement.hex()
        chip = "" if snp.chip_id_masked else snp.chip_id.hex()
        tcb = f"TCB_VERSION {int.from_bytes(snp.reported_tcb, 'little'):#018x}"
        return Claims(snp.report_data, SnpImage(measurement=measurement), measurement, chip, tcb)
    td = tdx_abi.parse_quote(report).report
    rtmr = tuple(value.hex() for value in td.rtmr)
    tdx = TdxImage(mr_td=td.mr_td.hex(), rtmr0=rtmr[0], rtmr1=rtmr[1], rtmr2=rtmr[2], rtmr3=rtmr[3])
    return Claims(td.report_data, tdx, tdx.mr_td, "", f"TEE_TCB_SVN {td.tee_tcb_svn.hex()}")


def appraise_hardware(
    evidence: Evidence, policy: HardwarePolicy, expected: bytes | ReportDataUnchecked, cached: Iterable[Item], at: int
) -> tuple[Check, ...]:
    """Make the checks of the policy's platform, which the evidence must be of.

    `expected` are the 64 bytes that the report must have been made for, or why they aren't compared; `cached` is the
    collateral at hand besides what came with the evidence.
    """
    report, certificates, items = evidence.report, evidence.certificates, (*cached, *evidence.collateral)
    if isinstance(policy, SimulatedPolicy):
        return appraise_simulated(report, certificates, policy, at)
    if isinstance(policy, SnpPolicy):
        collateral = snp_collateral(report, certificates, items, at)
        checks = appraise_snp(report, collateral, policy, expected_report_data=expected, at=at)
        return _with_sources(checks, report, certificates)
    return appraise_tdx(report, tdx_collateral(report, items, at), policy, expected, at)


_FETCHED: dict[str, tuple[Kind, ...]] = {
    "snp-certificates": ("amd-vcek", "amd-ask", "amd-asvk", "amd-ark"),
    "snp-revocation": ("amd-crl",),
}
"""The checks that a document of AMD's key distribution service can mend, and which."""


def _with_sources(checks: tuple[Check, ...], report: bytes, certificates: tuple[bytes, ...]) -> tuple[Check, ...]:
    """The checks, where those that lack AMD's documents say where these are to be had."""
    if not any(check.verdict == "fail" and check.name in _FETCHED for check in checks):
        return checks
    try:
        needs = needs_of_snp(report, certificates)
    except EvidenceError:
        return checks
    return tuple(_with_source(check, needs) for check in checks)


def _with_source(check: Check, needs: tuple[Need, ...]) -> Check:
    kinds = _FETCHED.get(check.name, ()) if check.verdict == "fail" else ()
    urls = dict.fromkeys(need.url for need in needs if need.kind in kinds)
    return check.model_copy(update={"reason": f"{check.reason}: fetch {', '.join(urls)}"[:4000]}) if urls else check
