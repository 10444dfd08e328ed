"""The platforms side by side: what each report claims, and who judges it.

A platform is a package with `abi` (parse), `verify` (authenticate), `validate` (judge), `policy` and `appraise`, and a
branch in each of the two functions here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cloister_attest.collateral.choose import snp_collateral, tdx_collateral
from cloister_attest.collateral.items import Item
from cloister_attest.evidence import Evidence
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
    evidence: Evidence, policy: HardwarePolicy, expected: bytes, cached: Iterable[Item], at: int
) -> tuple[Check, ...]:
    """Make the checks of the policy's platform, which the evidence must be of.

    `expected` are the 64 bytes that the report must have been made for; `cached` is the collateral at hand besides
    what came with the evidence.
    """
    report, certificates, items = evidence.report, evidence.certificates, (*cached, *evidence.collateral)
    if isinstance(policy, SimulatedPolicy):
        return appraise_simulated(report, certificates, policy, at)
    if isinstance(policy, SnpPolicy):
        collateral = snp_collateral(report, certificates, items, at)
        return appraise_snp(report, collateral, policy, expected_report_data=expected, at=at)
    return appraise_tdx(report, tdx_collateral(report, items, at), policy, expected, at)
