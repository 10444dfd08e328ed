"""A first trust file for a machine: strict, with the values that its report shows.

A draft believes nothing: whoever writes one compares its measurements with what they built or the publisher announced,
and judges the evidence under it.
"""

from __future__ import annotations

from collections.abc import Sequence

from cloister_attest.collateral.needs import platform_of, signer_of
from cloister_attest.outcome import EvidenceError
from cloister_attest.policy import FORMAT, AttestationPolicy, HardwarePolicy
from cloister_attest.snp.certificates import load_certificate, read_leaf
from cloister_attest.snp.policy import MAX_CSP_ID, MinimumTcb, PlatformRequirements, SnpPolicy
from cloister_attest.snp.products import Product, decode_tcb
from cloister_attest.tdx import abi as tdx_abi
from cloister_attest.tdx.policy import TD_ATTRIBUTES_KNOWN, XFAM_KNOWN, TdxPolicy
from cloister_attest.tdx.validate import ATTRIBUTE_MIGRATABLE, ATTRIBUTE_PERFMON, ATTRIBUTES_UNDER_DEBUG
from cloister_data.policy import Platform

_LAX = ATTRIBUTES_UNDER_DEBUG | ATTRIBUTE_MIGRATABLE | ATTRIBUTE_PERFMON
_TD_ATTRIBUTES = f"0x{int(TD_ATTRIBUTES_KNOWN, 16) & ~_LAX:016x}"
"""The attributes that let neither the host nor another TD look in."""


def draft(
    platform: Platform, report: bytes, certificates: Sequence[bytes], product: Product | None = None
) -> AttestationPolicy:
    """A strict trust file that names the image, and demands the firmware, that a report shows.

    Args:
        platform: whose report it is.
        report: the SNP report or the TDX quote.
        certificates: what came with it, DER.
        product: of an SNP report that doesn't say it itself (version 2, without its signer's certificate).

    Raises EvidenceError where the report can't be read, or is simulated: that platform's trust file comes with it.
    """
    if platform == "simulated":
        raise EvidenceError("a simulated machine makes its own trust file when it starts")
    hardware = _snp(report, certificates, product) if platform == "sev-snp" else _tdx(report)
    return AttestationPolicy(
        format=FORMAT, publisher="none", gpu="forbidden", log_key="any", log_origin="any", hardware=hardware
    )


def _snp(report: bytes, certificates: Sequence[bytes], known: Product | None) -> HardwarePolicy:
    signer = signer_of(report, certificates, known)
    product, parsed = signer.product, signer.report
    if product is None:
        raise EvidenceError("a report of version 2 doesn't say its product, and no certificate came with it")
    tcb = decode_tcb(parsed.reported_tcb, product)
    return SnpPolicy(
        platform="sev-snp",
        roots="vendor",
        intermediates="known",
        crl="required",
        measurements=(parsed.measurement.hex(),),
        debug="forbidden",
        migrate_ma="forbidden",
        smt="any",
        single_socket="any",
        cxl_allow="forbidden",
        mem_aes_256_xts="any",
        rapl_dis="any",
        ciphertext_hiding_dram="any",
        page_swap_disable="any",
        minimum_abi="any",
        vmpl=0,
        host_data="any",
        family_ids="any",
        image_ids="any",
        id_keys="any",
        author_keys="any",
        minimum_guest_svn="any",
        minimum_tcb=(
            MinimumTcb(
                product=product,
                fmc="absent" if tcb.fmc is None else tcb.fmc,
                bootloader=tcb.bootloader,
                tee=tcb.tee,
                snp=tcb.snp,
                microcode=tcb.microcode,
            ),
        ),
        minimum_launch_tcb="any",
        minimum_firmware="any",
        provisional_firmware="any",
        mitigations="any",
        platform_info=PlatformRequirements(
            smt_en="any",
            tsme_en="any",
            ecc_en="any",
            rapl_dis="any",
            ciphertext_hiding_dram_en="any",
            alias_check_complete="any",
            tio_en="any",
        ),
        products_allowed=(product,),
        products_denied=(),
        chips_allowed="any",
        chips_denied=(),
        masked_chip_id="any",
        vlek="forbidden" if parsed.signing_key == "VCEK" else (_provider(signer.leaf, product),),
    )


def _provider(vlek: bytes | None, product: Product) -> str:
    """The cloud provider that a report's signer names."""
    found = read_leaf(load_certificate(vlek, "report's signer"), "VLEK", product).csp_id
    if not found or len(found) > MAX_CSP_ID:
        raise EvidenceError("the report's signer doesn't say which cloud provider it belongs to")
    return found


def _tdx(quote: bytes) -> HardwarePolicy:
    report = tdx_abi.parse_quote(quote).report
    rtmr = [(value.hex(),) for value in report.rtmr]
    _, fmspc = platform_of(quote)
    return TdxPolicy(
        platform="tdx",
        roots="vendor",
        mr_td=(report.mr_td.hex(),),
        # The firmware measures the machine's shape into RTMR0, and applications what they like into RTMR3.
        rtmr0="any",
        rtmr1=rtmr[1],
        rtmr2=rtmr[2],
        rtmr3="any",
        mr_config_id="any",
        mr_owner="any",
        mr_owner_config="any",
        mr_service_td="zero-if-reported",
        debug="forbidden",
        sept_ve_disable="required",
        perfmon="forbidden",
        td_attributes_allowed=_TD_ATTRIBUTES,
        xfam_allowed=XFAM_KNOWN,
        platform_tcb=("UpToDate", "SWHardeningNeeded"),
        module_tcb=("UpToDate", "SWHardeningNeeded"),
        qe_tcb=("UpToDate", "SWHardeningNeeded"),
        minimum_tcb_evaluation="any",
        fmspcs_allowed=(fmspc,),
        fmspcs_denied=(),
        collateral="required",
    )
