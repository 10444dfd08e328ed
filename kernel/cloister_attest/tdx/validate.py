"""Whether what an authenticated quote says is what the policy demands. Every function raises EvidenceError.

Source: Intel TDX Module v1.5 ABI Specification, "ATTRIBUTES", "XFAM", "TDREPORT_STRUCT"; Intel PCS API version 4.
"""

from __future__ import annotations

import hmac

from cloister_attest.fields import accepts
from cloister_attest.outcome import EvidenceError, Outcome, ReportDataUnchecked, not_applicable, passed
from cloister_attest.tdx.abi import REPORT_DATA_BYTES, TdReport
from cloister_attest.tdx.collateral import IsvLevel, PlatformLevel
from cloister_attest.tdx.extension import SgxExtension
from cloister_attest.tdx.policy import Statuses, TdxPolicy

ATTRIBUTE_DEBUG = 1 << 0
ATTRIBUTES_UNDER_DEBUG = 0xFFFF
"""The groups TUD and TUP: the host may debug or profile a TD that sets any bit of them, and such a TD isn't trusted
(Intel TDX DCAP Quoting Library API, 2.3.2 and A.3.4; the module's ABI divides them into bits 3:0 and 15:4)."""
ATTRIBUTE_SEPT_VE_DISABLE = 1 << 28
ATTRIBUTE_MIGRATABLE = 1 << 29
ATTRIBUTE_PKS = 1 << 30
ATTRIBUTE_PERFMON = 1 << 63

XFAM_FIXED_1 = 0b11
"""X87 and SSE, which every TD has."""


def number(flags: bytes) -> int:
    """TDATTRIBUTES, XFAM or SEAMATTRIBUTES as a number."""
    return int.from_bytes(flags, "little")


def validate_report_data(report: TdReport, expected: bytes | ReportDataUnchecked) -> Outcome:
    if isinstance(expected, ReportDataUnchecked):
        return not_applicable(expected.reason)
    if len(expected) != REPORT_DATA_BYTES:
        raise EvidenceError(f"{len(expected)} bytes of report data are expected, where {REPORT_DATA_BYTES} belong")
    if not hmac.compare_digest(report.report_data, expected):
        raise EvidenceError("the quote was made over other report data: it may be relayed or replayed")
    return passed("the quote was made over the expected report data")


def validate_debug(report: TdReport, policy: TdxPolicy) -> Outcome:
    if policy.debug == "any":
        return not_applicable("the policy accepts TDs that their host may debug")
    shown = number(report.td_attributes) & ATTRIBUTES_UNDER_DEBUG
    if shown & ATTRIBUTE_DEBUG:
        raise EvidenceError("the host may debug this TD, and so read its memory")
    if shown:
        raise EvidenceError(f"the host may profile this TD (TD attributes {shown:#x}), and so learn what it does")
    return passed("the host may neither debug nor profile the TD")


def validate_sept_ve(report: TdReport, policy: TdxPolicy) -> Outcome:
    if policy.sept_ve_disable == "any":
        return not_applicable("the policy accepts TDs without SEPT_VE_DISABLE")
    if not number(report.td_attributes) & ATTRIBUTE_SEPT_VE_DISABLE:
        raise EvidenceError("SEPT_VE_DISABLE isn't set: the host may inject a #VE by removing a page of the TD")
    return passed("SEPT_VE_DISABLE is set")


def validate_perfmon(report: TdReport, policy: TdxPolicy) -> Outcome:
    if policy.perfmon == "any":
        return not_applicable("the policy accepts TDs that use performance monitoring")
    if number(report.td_attributes) & ATTRIBUTE_PERFMON:
        raise EvidenceError("PERFMON is set: the TD's counters share hardware with the host's")
    return passed("PERFMON isn't set")


def validate_attributes(report: TdReport, policy: TdxPolicy) -> Outcome:
    if policy.td_attributes_allowed == "any":
        return not_applicable("the policy accepts any TD attributes")
    attributes = number(report.td_attributes)
    beyond = attributes & ~int(policy.td_attributes_allowed, 16)
    if beyond:
        raise EvidenceError(f"the TD attributes set bits that the policy doesn't allow ({beyond:#x})")
    return passed(f"the policy allows the TD attributes {attributes:#x}")


def validate_xfam(report: TdReport, policy: TdxPolicy) -> Outcome:
    xfam = number(report.xfam)
    if xfam & XFAM_FIXED_1 != XFAM_FIXED_1:
        raise EvidenceError(f"XFAM {xfam:#x} lacks bits that every TD has ({XFAM_FIXED_1:#x})")
    if policy.xfam_allowed == "any":
        return not_applicable("the policy accepts any XFAM")
    beyond = xfam & ~int(policy.xfam_allowed, 16)
    if beyond:
        raise EvidenceError(f"XFAM sets bits that the policy doesn't allow ({beyond:#x})")
    return passed(f"the policy allows XFAM {xfam:#x}")


def validate_measurement(name: str, value: bytes, allowed: tuple[str, ...] | str) -> Outcome:
    """One of MRTD, RTMR0 to RTMR3, MRCONFIGID, MROWNER, MROWNERCONFIG against the policy's values or "any"."""
    if allowed == "any":
        return not_applicable(f"the policy accepts any {name}")
    if not accepts(allowed, value.hex()):
        raise EvidenceError(f"{name} is {value.hex()}, which the policy doesn't name")
    return passed(f"the policy names this {name}")


def validate_service_td(report: TdReport, policy: TdxPolicy) -> Outcome:
    demanded, found = policy.mr_service_td, report.mr_service_td
    if demanded == "any":
        return not_applicable("the policy accepts any service TD")
    if found is None:
        if demanded == "zero-if-reported":
            if number(report.td_attributes) & ATTRIBUTE_MIGRATABLE:
                raise EvidenceError("the TD may be migrated, and a TD report 1.0 doesn't say by which service TD")
            return not_applicable("a TD report 1.0 doesn't name service TDs, which the policy puts up with")
        raise EvidenceError("a TD report 1.0 doesn't say whether a service TD is bound, and the policy demands it")
    if demanded in ("zero", "zero-if-reported"):
        if any(found):
            raise EvidenceError(f"the service TD {found.hex()} is bound to this TD, and the policy accepts none")
        return passed("no service TD is bound")
    return validate_measurement("MRSERVICETD", found, demanded)


def validate_status(name: str, level: PlatformLevel | IsvLevel, allowed: Statuses | str) -> Outcome:
    """What Intel says of the platform, the TDX module or the quoting enclave."""
    said = f"Intel says {level.tcb_status} of the {name} (level of {level.tcb_date[:10]})"
    advisories = f"; advisories {', '.join(level.advisory_ids)}" if level.advisory_ids else ""
    if level.tcb_status == "Revoked" or (allowed != "any" and level.tcb_status not in allowed):
        raise EvidenceError(f"{said}, which the policy doesn't accept{advisories}")
    if allowed == "any":
        return not_applicable(f"the policy accepts whatever isn't revoked; {said}{advisories}")
    return passed(said + advisories)


def validate_evaluation(numbers: dict[str, int], policy: TdxPolicy) -> Outcome:
    """The tcbEvaluationDataNumber of each document in `numbers`."""
    if policy.minimum_tcb_evaluation == "any":
        return not_applicable("the policy accepts any TCB evaluation")
    for name, evaluation in numbers.items():
        if evaluation < policy.minimum_tcb_evaluation:
            raise EvidenceError(
                f"the {name} is of TCB evaluation {evaluation}, and the policy demands {policy.minimum_tcb_evaluation}"
            )
    return passed(f"every document is of TCB evaluation {policy.minimum_tcb_evaluation} or later")


def validate_fmspc(platform: SgxExtension, policy: TdxPolicy) -> Outcome:
    fmspc = platform.fmspc.hex()
    if fmspc in policy.fmspcs_denied:
        raise EvidenceError(f"the policy denies platforms of FMSPC {fmspc}")
    if policy.fmspcs_allowed == "any":
        return passed(f"the policy doesn't deny FMSPC {fmspc}")
    if fmspc not in policy.fmspcs_allowed:
        raise EvidenceError(f"FMSPC {fmspc} is none of those that the policy allows")
    return passed(f"the policy allows FMSPC {fmspc}")
