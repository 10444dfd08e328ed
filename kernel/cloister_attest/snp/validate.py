"""Whether what an SEV-SNP report says is what the policy demands. Every function raises EvidenceError.

The field names, and what they mean, are those of AMD 56860, tables ATTESTATION_REPORT, "Guest Policy Structure" and
"PLATFORM_INFO Field".
"""

from __future__ import annotations

import hmac

from cloister_attest.fields import accepts
from cloister_attest.outcome import EvidenceError, Outcome, ReportDataUnchecked, not_applicable, passed
from cloister_attest.snp.abi import REPORT_DATA_BYTES, VMPL_HOST, FirmwareVersion, Report
from cloister_attest.snp.certificates import read_leaf
from cloister_attest.snp.policy import Minimums, Requirement, SnpPolicy
from cloister_attest.snp.products import Product, decode_tcb
from cloister_attest.snp.verify import Chain, verify_chip


def validate_report_data(report: Report, expected: bytes | ReportDataUnchecked) -> Outcome:
    if isinstance(expected, ReportDataUnchecked):
        return not_applicable(expected.reason)
    if len(expected) != REPORT_DATA_BYTES:
        raise EvidenceError(f"the report data expected has {len(expected)} bytes instead of {REPORT_DATA_BYTES}")
    if not hmac.compare_digest(expected, report.report_data):
        raise EvidenceError("the report was made for other report data: it may be relayed or replayed")
    return passed("the report was made for the expected report data")


def validate_listed(shown: bytes, accepted: tuple[str, ...] | str, name: str) -> Outcome:
    """`shown`, in hex, is one of `accepted`, or that is "any"."""
    if accepted == "any":
        return not_applicable(f"the policy accepts any {name}")
    if not accepts(accepted, shown.hex()):
        raise EvidenceError(f"the {name} is {shown.hex()}, which is none that the policy names")
    return passed(f"the {name} is one that the policy names")


def validate_bit(shown: bool, requirement: Requirement, name: str) -> Outcome:
    """A bit called `name` in the specification."""
    if requirement == "any":
        return not_applicable(f"the policy accepts any {name}")
    if shown != (requirement == "required"):
        raise EvidenceError(f"{name} is {'set' if shown else 'clear'}, and the policy demands the opposite")
    return passed(f"{name} is {'set' if shown else 'clear'}, as the policy demands")


def validate_author_key(report: Report, policy: SnpPolicy) -> Outcome:
    if policy.author_keys != "any" and not report.author_key_en:
        raise EvidenceError("the guest was launched without an author key (AUTHOR_KEY_EN)")
    return validate_listed(report.author_key_digest, policy.author_keys, "author key")


def validate_abi(report: Report, policy: SnpPolicy) -> Outcome:
    if policy.minimum_abi == "any":
        return not_applicable("the policy accepts any ABI")
    shown = (report.policy.abi_major, report.policy.abi_minor)
    demanded = (policy.minimum_abi.major, policy.minimum_abi.minor)
    if shown < demanded:
        raise EvidenceError(
            f"the guest runs from ABI {shown[0]}.{shown[1]} on, and the policy demands {demanded[0]}.{demanded[1]}"
        )
    return passed(f"the guest demands ABI {shown[0]}.{shown[1]}, at least {demanded[0]}.{demanded[1]}")


def validate_vmpl(report: Report, policy: SnpPolicy) -> Outcome:
    if report.vmpl == VMPL_HOST:
        raise EvidenceError("the host asked for the report, not the guest")
    if policy.vmpl == "any":
        return not_applicable("the policy accepts any privilege level of the guest")
    if report.vmpl != policy.vmpl:
        raise EvidenceError(f"VMPL {report.vmpl} asked for the report, and the policy demands VMPL {policy.vmpl}")
    return passed(f"VMPL {report.vmpl} asked for the report, as the policy demands")


def validate_guest_svn(report: Report, policy: SnpPolicy) -> Outcome:
    if policy.minimum_guest_svn == "any":
        return not_applicable("the policy accepts any guest SVN")
    if report.guest_svn < policy.minimum_guest_svn:
        raise EvidenceError(f"the guest SVN is {report.guest_svn}, below {policy.minimum_guest_svn}")
    return passed(f"the guest SVN is {report.guest_svn}, at least {policy.minimum_guest_svn}")


def validate_tcb_order(report: Report, product: Product) -> Outcome:
    """REPORTED_TCB and COMMITTED_TCB never exceed CURRENT_TCB, whatever the policy (56860, SNP_CONFIG, SNP_COMMIT)."""
    current = decode_tcb(report.current_tcb, product)
    for raw, name in ((report.reported_tcb, "reported"), (report.committed_tcb, "committed")):
        if not current.at_least(decode_tcb(raw, product)):
            raise EvidenceError(f"the {name} tcb {decode_tcb(raw, product)} is above the current one, {current}")
    return passed("the reported and the committed tcb don't exceed the current one")


def validate_minimum(raw: bytes, product: Product, minimums: Minimums, name: str) -> Outcome:
    if minimums == "any":
        return not_applicable(f"the policy accepts any {name}")
    shown = decode_tcb(raw, product)
    for minimum in minimums:
        if minimum.product == product:
            if not shown.at_least(minimum.tcb):
                raise EvidenceError(f"the {name} is {shown}, and the policy demands at least {minimum.tcb}")
            return passed(f"the {name} is {shown}, at least {minimum.tcb}")
    raise EvidenceError(f"the policy names no minimum of the {name} for {product}")


def validate_firmware(report: Report, policy: SnpPolicy) -> Outcome:
    """Of the committed version, not the running one: the host may go back from that at any time (56860, SNP_COMMIT)."""
    if policy.minimum_firmware == "any":
        return not_applicable("the policy accepts any version of the firmware")
    shown, least = report.committed, policy.minimum_firmware
    demanded = FirmwareVersion(least.major, least.minor, least.build)
    if (shown.major, shown.minor, shown.build) < (least.major, least.minor, least.build):
        raise EvidenceError(f"the firmware {shown} is committed, and the policy demands at least {demanded}")
    return passed(f"the firmware {shown} is committed, at least {demanded}")


def validate_committed(report: Report, policy: SnpPolicy) -> Outcome:
    if policy.provisional_firmware == "any":
        return not_applicable("the policy accepts firmware that isn't committed")
    if report.committed != report.current:
        raise EvidenceError(f"the firmware {report.current} runs, and {report.committed} is committed")
    if report.committed_tcb != report.current_tcb:
        raise EvidenceError("the current tcb isn't the committed one: the host may go back to an older one")
    return passed(f"the running firmware {report.current} is committed")


def validate_mitigations(report: Report, policy: SnpPolicy) -> Outcome:
    if policy.mitigations == "any":
        return not_applicable("the policy demands no mitigations")
    if report.launch_mit_vector is None or report.current_mit_vector is None:
        raise EvidenceError(f"a report of version {report.version} doesn't say which mitigations are in force")
    missing = policy.mitigations & ~(report.launch_mit_vector & report.current_mit_vector)
    if missing:
        raise EvidenceError(f"the mitigations {missing:#x} aren't in force, or weren't at launch")
    return passed(f"the mitigations {policy.mitigations:#x} are in force, and were at launch")


def validate_product(product: Product, policy: SnpPolicy) -> Outcome:
    if product in policy.products_denied:
        raise EvidenceError(f"the policy denies {product} processors")
    if policy.products_allowed == "any":
        return passed(f"the policy doesn't deny {product} processors")
    if product not in policy.products_allowed:
        raise EvidenceError(f"{product} processors are none of those that the policy allows")
    return passed(f"the policy allows {product} processors")


def validate_chip(report: Report, chain: Chain, policy: SnpPolicy) -> Outcome:
    if policy.chips_allowed == "any" and not policy.chips_denied:
        return not_applicable("the policy names no chips")
    chip_id = verify_chip(report, chain)
    if chip_id is None:
        raise EvidenceError("neither the report nor its signer says which chip it is, and the policy names some")
    name = chip_id.hex()
    if name in policy.chips_denied:
        raise EvidenceError(f"the policy denies the chip {name}")
    if policy.chips_allowed != "any" and name not in policy.chips_allowed:
        raise EvidenceError(f"the chip {name} is none of those that the policy allows")
    return passed(f"the policy {'does not deny' if policy.chips_allowed == 'any' else 'allows'} the chip")


def validate_masked(report: Report, policy: SnpPolicy) -> Outcome:
    if policy.masked_chip_id == "any":
        return not_applicable("the policy accepts reports that don't name their chip")
    if report.chip_id_masked:
        raise EvidenceError("the host masks CHIP_ID, and the policy demands it")
    return passed("the report names its chip")


def validate_vlek(chain: Chain, policy: SnpPolicy) -> Outcome:
    """A VLEK proves AMD's firmware at a cloud provider, but no chip: the policy says whose is accepted."""
    if chain.kind == "VCEK":
        return passed("the report's signer is the chip's own key")
    if policy.vlek == "forbidden":
        raise EvidenceError("the report's signer is a cloud provider's key, and the policy demands the chip's own")
    if policy.vlek == "any":
        return not_applicable("the policy accepts any cloud provider's key in the chip's place")
    csp_id = read_leaf(chain.leaf, "VLEK", chain.product).csp_id
    if csp_id not in policy.vlek:
        raise EvidenceError(f"the report's signer is the key of {csp_id}, and the policy names other providers")
    return passed(f"the report's signer is the key of {csp_id}, which the policy accepts")
