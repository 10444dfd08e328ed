"""Who made a quote, and what Intel says of the platform it was made on. Every function raises EvidenceError.

Source: Intel TDX DCAP Quoting Library API, appendix A; Intel PCS API version 4, "Get TDX TCB Info" (how a TCB level
and a TDX module's level are determined) and "Enclave Identity".
"""

from __future__ import annotations

import hashlib
import hmac

from cryptography.hazmat.primitives.asymmetric import ec

from cloister_attest.outcome import EvidenceError
from cloister_attest.tdx.abi import QeReport, Quote, TdReport
from cloister_attest.tdx.chain import PckChain, public_key, verify_ecdsa
from cloister_attest.tdx.collateral import IsvLevel, PlatformLevel, QeIdentity, TcbInfo, TdxModule
from cloister_attest.tdx.extension import SgxExtension

_MODULE_SVN, _MODULE_VERSION = 0, 1
"""Where TEE_TCB_SVN says which TDX module runs: its security version, its major version."""


def verify_qe_report(quote: Quote, chain: PckChain) -> None:
    """The QE report's signature under the PCK certificate's key."""
    verify_ecdsa(
        public_key(chain.leaf),
        quote.qe_report_signature,
        quote.qe_report.signed,
        "the QE report's signature doesn't verify under the PCK certificate's key",
    )


def verify_qe_binding(quote: Quote) -> None:
    """QE report data = SHA-256(attestation key || QE auth data) || 32 zeros: the enclave made that key."""
    expected = hashlib.sha256(quote.attestation_key + quote.qe_auth_data).digest() + bytes(32)
    if not hmac.compare_digest(expected, quote.qe_report.report_data):
        raise EvidenceError("the quoting enclave vouches for another attestation key than signs the quote")


def verify_quote(quote: Quote) -> None:
    """The signature over header and TD report under the attestation key."""
    try:
        key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + quote.attestation_key)
    except ValueError as error:
        raise EvidenceError("the attestation key isn't a point of P-256") from error
    verify_ecdsa(key, quote.signature, quote.signed, "the quote's signature doesn't verify under the attestation key")


def verify_qe_identity(report: QeReport, identity: QeIdentity) -> None:
    """The enclave that vouches for the attestation key is Intel's TD quoting enclave, in production mode."""
    if _masked(report.misc_select, identity.miscselect_mask) != bytes.fromhex(identity.miscselect):
        raise EvidenceError("the quoting enclave's MISCSELECT isn't the one that Intel published")
    if _masked(report.attributes, identity.attributes_mask) != bytes.fromhex(identity.attributes):
        raise EvidenceError("the quoting enclave's ATTRIBUTES aren't those that Intel published")
    if report.mr_signer != bytes.fromhex(identity.mrsigner):
        raise EvidenceError("the quoting enclave's MRSIGNER isn't the one that Intel published")
    if report.isv_prod_id != identity.isvprodid:
        raise EvidenceError(f"the quoting enclave's ISVPRODID is {report.isv_prod_id} instead of {identity.isvprodid}")


def qe_level(report: QeReport, identity: QeIdentity) -> IsvLevel:
    """The first level whose ISVSVN the enclave reaches."""
    return _isv_level(report.isv_svn, identity.tcb_levels, "quoting enclave")


def verify_tcb_info(platform: SgxExtension, info: TcbInfo) -> None:
    """The TCB info is that of the platform the PCK certificate was issued for."""
    if bytes.fromhex(info.fmspc) != platform.fmspc:
        raise EvidenceError(f"the TCB info is for FMSPC {info.fmspc.lower()}, the platform's is {platform.fmspc.hex()}")
    if bytes.fromhex(info.pce_id) != platform.pce_id:
        raise EvidenceError(f"the TCB info is for PCE {info.pce_id.lower()}, the platform's is {platform.pce_id.hex()}")


def platform_level(report: TdReport, platform: SgxExtension, info: TcbInfo) -> PlatformLevel:
    """The first level whose SGX components, PCESVN and TDX components the platform reaches, each of them.

    From TDX module version 1 on, the module's own two bytes (0 and 1) are judged by `module_level` instead.
    """
    first = 0 if report.tee_tcb_svn[_MODULE_VERSION] == 0 else 2
    for level in info.tcb_levels:
        sgx = [component.svn for component in level.tcb.sgxtcbcomponents]
        tdx = [component.svn for component in level.tcb.tdxtcbcomponents]
        if (
            _reaches(platform.components, sgx)
            and platform.pce_svn >= level.tcb.pcesvn
            and _reaches(report.tee_tcb_svn[first:], tdx[first:])
        ):
            return level
    raise EvidenceError("the platform is older than every TCB level that Intel published")


def module_level(report: TdReport, info: TcbInfo) -> IsvLevel | None:
    """The level of the TDX module that runs, once its signer and attributes are those that Intel published.

    None where the module's version is 0: the platform's level judges its SVN.
    """
    version = report.tee_tcb_svn[_MODULE_VERSION]
    if version == 0:
        _verify_module(report, info.tdx_module)
        return None
    wanted = f"TDX_{version:02X}"
    found = [identity for identity in info.tdx_module_identities if identity.id.upper() == wanted]
    if len(found) != 1:
        raise EvidenceError(f"the TCB info names {len(found)} identities {wanted} of the TDX module that runs")
    _verify_module(report, found[0])
    return _isv_level(report.tee_tcb_svn[_MODULE_SVN], found[0].tcb_levels, "TDX module")


def _verify_module(report: TdReport, expected: TdxModule) -> None:
    if report.mr_signer_seam != bytes.fromhex(expected.mrsigner):
        raise EvidenceError("the TDX module's MRSIGNERSEAM isn't the one that Intel published")
    if _masked(report.seam_attributes, expected.attributes_mask) != bytes.fromhex(expected.attributes):
        raise EvidenceError("the TDX module's SEAMATTRIBUTES aren't those that Intel published")


def _isv_level(svn: int, levels: tuple[IsvLevel, ...], name: str) -> IsvLevel:
    for level in levels:
        if svn >= level.tcb.isvsvn:
            return level
    raise EvidenceError(f"the {name}'s security version {svn} is lower than every level that Intel published")


def _masked(value: bytes, mask: str) -> bytes:
    return bytes(byte & bits for byte, bits in zip(value, bytes.fromhex(mask), strict=True))


def _reaches(found: tuple[int, ...] | bytes, level: list[int]) -> bool:
    return all(svn >= least for svn, least in zip(found, level, strict=True))
