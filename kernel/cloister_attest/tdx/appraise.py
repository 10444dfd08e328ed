"""The appraisal of a TDX quote: every check, each answered. Hostile evidence fails checks; it never raises."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Literal, TypeVar

from cloister_attest.outcome import EvidenceError, Outcome, ReportDataUnchecked, not_applicable, passed
from cloister_attest.result import Check, checked
from cloister_attest.tdx import abi, chain, validate, verify
from cloister_attest.tdx import collateral as pcs
from cloister_attest.tdx.collateral import Collateral
from cloister_attest.tdx.explain import TDX_CHECKS
from cloister_attest.tdx.extension import SgxExtension
from cloister_attest.tdx.policy import TdxPolicy

_Signers = Literal["tcb_info_chain", "qe_identity_chain"]
_Piece = Literal["tcb_info", "tcb_info_chain", "qe_identity", "qe_identity_chain", "root_crl", "pck_crl"]
_PIECES: tuple[_Piece, ...] = (
    "tcb_info",
    "tcb_info_chain",
    "qe_identity",
    "qe_identity_chain",
    "root_crl",
    "pck_crl",
)
_T = TypeVar("_T")


class _Waived(Exception):
    """The policy says that this check isn't needed, and why."""


def appraise_tdx(
    quote: bytes,
    collateral: Collateral,
    policy: TdxPolicy,
    expected_report_data: bytes | ReportDataUnchecked,
    at: int,
) -> tuple[Check, ...]:
    """Make all the checks of `TDX_CHECKS`, in this order, whatever the earlier ones came to.

    The quote holds only where none of them has failed. Checks on Intel's documents judge what was given; whether Intel
    made it is a check of its own, so nothing of a result counts unless all of it holds.

    Args:
        quote: as the hardware made it; zeros may follow.
        collateral: what Intel publishes about the platform.
        policy: what the relying party demands.
        expected_report_data: the 64 bytes that the quote must have been made over, or why that is checked elsewhere.
        at: the moment to verify at, Unix seconds.
    """
    return _Appraisal(quote, collateral, policy, expected_report_data, at).run()


class _Appraisal:
    """One appraisal. What a check has read is kept for the checks after it."""

    def __init__(
        self, raw: bytes, pieces: Collateral, policy: TdxPolicy, expected: bytes | ReportDataUnchecked, at: int
    ) -> None:
        self._raw, self._pieces, self._policy, self._expected, self._at = raw, pieces, policy, expected, at
        self._given_quote: abi.Quote | None = None
        self._given_chain: chain.PckChain | None = None
        self._given_platform: SgxExtension | None = None
        self._signing: dict[_Signers, chain.SigningChain] = {}
        self._pinned = frozenset([chain.INTEL_SGX_ROOT] if policy.roots == "vendor" else policy.roots)

    def run(self) -> tuple[Check, ...]:
        policy = self._policy
        steps: dict[str, Callable[[], Outcome]] = {
            "tdx-format": self._format,
            "tdx-pck-chain": self._pck_chain,
            "tdx-root": self._root,
            "tdx-dates": self._dates,
            "tdx-pck-extension": self._extension,
            "tdx-root-crl": self._root_crl,
            "tdx-pck-crl": self._pck_crl,
            "tdx-qe-report": self._qe_report,
            "tdx-qe-binding": self._qe_binding,
            "tdx-signature": self._signature,
            "tdx-qe-identity-signature": self._qe_identity_signature,
            "tdx-qe-identity-dates": self._qe_identity_dates,
            "tdx-qe-identity": self._qe_identity_match,
            "tdx-qe-level": self._qe_level,
            "tdx-tcb-info-signature": self._tcb_info_signature,
            "tdx-tcb-info-dates": self._tcb_info_dates,
            "tdx-tcb-info": self._tcb_info_match,
            "tdx-module": self._module,
            "tdx-tcb-level": self._tcb_level,
            "tdx-report-data": lambda: validate.validate_report_data(self._report(), self._expected),
            "tdx-debug": lambda: validate.validate_debug(self._report(), policy),
            "tdx-sept-ve": lambda: validate.validate_sept_ve(self._report(), policy),
            "tdx-perfmon": lambda: validate.validate_perfmon(self._report(), policy),
            "tdx-td-attributes": lambda: validate.validate_attributes(self._report(), policy),
            "tdx-xfam": lambda: validate.validate_xfam(self._report(), policy),
            "tdx-mrservicetd": lambda: validate.validate_service_td(self._report(), policy),
            "tdx-mrtd": lambda: validate.validate_measurement("MRTD", self._report().mr_td, policy.mr_td),
            "tdx-rtmr0": lambda: validate.validate_measurement("RTMR0", self._report().rtmr[0], policy.rtmr0),
            "tdx-rtmr1": lambda: validate.validate_measurement("RTMR1", self._report().rtmr[1], policy.rtmr1),
            "tdx-rtmr2": lambda: validate.validate_measurement("RTMR2", self._report().rtmr[2], policy.rtmr2),
            "tdx-rtmr3": lambda: validate.validate_measurement("RTMR3", self._report().rtmr[3], policy.rtmr3),
            "tdx-mrconfigid": lambda: validate.validate_measurement(
                "MRCONFIGID", self._report().mr_config_id, policy.mr_config_id
            ),
            "tdx-mrowner": lambda: validate.validate_measurement("MROWNER", self._report().mr_owner, policy.mr_owner),
            "tdx-mrownerconfig": lambda: validate.validate_measurement(
                "MROWNERCONFIG", self._report().mr_owner_config, policy.mr_owner_config
            ),
            "tdx-platform-status": self._platform_status,
            "tdx-module-status": self._module_status,
            "tdx-qe-status": self._qe_status,
            "tdx-tcb-evaluation": self._evaluation,
            "tdx-fmspc": lambda: validate.validate_fmspc(self._platform(), policy),
            "tdx-collateral": self._collateral,
        }
        return tuple(_check(name, steps[name]) for name in TDX_CHECKS)

    def _format(self) -> Outcome:
        self._given_quote = quote = abi.parse_quote(self._raw)
        kind = "1.0" if quote.body_type == abi.BODY_TD_10 else "1.5"
        return passed(f"one whole quote of version {quote.version} with a TD report {kind}")

    def _pck_chain(self) -> Outcome:
        self._given_chain = chain.verify_pck_chain(self._quote().pck_chain)
        return passed(f"{self._given_chain.ca_name} issued the PCK certificate")

    def _root(self) -> Outcome:
        return passed(f"the root {chain.verify_root(self._chain().root, self._pinned)[:16]}... is pinned")

    def _dates(self) -> Outcome:
        until = chain.verify_dates(self._chain().certificates, self._at)
        return passed(f"the PCK chain is valid until {until:%Y-%m-%d}")

    def _extension(self) -> Outcome:
        self._given_platform = platform = chain.sgx_extension(self._chain())
        return passed(f"FMSPC {platform.fmspc.hex()}, PCE {platform.pce_id.hex()}, PCESVN {platform.pce_svn}")

    def _root_crl(self) -> Outcome:
        crl, held = self._piece("root_crl"), self._chain()
        signing = self._signing_chains()
        if any(other.root != held.root for other in signing):
            raise EvidenceError("Intel's documents are signed under another root than the platform's key")
        certificates = [held.ca, *(other.signer for other in signing)]
        until = chain.verify_crl(crl, held.root, tuple(certificates), self._at, self._fetch("root_crl"))
        return passed(f"the root has revoked no authority (list until {until:%Y-%m-%d})")

    def _pck_crl(self) -> Outcome:
        crl, held = self._piece("pck_crl"), self._chain()
        until = chain.verify_crl(crl, held.ca, (held.leaf,), self._at, self._fetch("pck_crl"))
        return passed(f"the PCK certificate isn't revoked (list until {until:%Y-%m-%d})")

    def _qe_report(self) -> Outcome:
        verify.verify_qe_report(self._quote(), self._chain())
        return passed("the platform's key signed the quoting enclave's report")

    def _qe_binding(self) -> Outcome:
        verify.verify_qe_binding(self._quote())
        return passed("the quoting enclave vouches for the attestation key")

    def _signature(self) -> Outcome:
        verify.verify_quote(self._quote())
        return passed("the attestation key signed header and TD report")

    def _qe_identity_signature(self) -> Outcome:
        return self._document_signature("qe_identity", self._qe_document, "qe_identity_chain")

    def _qe_identity_dates(self) -> Outcome:
        return self._document_dates("qe_identity", self._qe_document, "qe_identity_chain")

    def _qe_identity_match(self) -> Outcome:
        verify.verify_qe_identity(self._quote().qe_report, self._qe_identity)
        return passed("the quoting enclave is Intel's")

    def _qe_level(self) -> Outcome:
        level = verify.qe_level(self._quote().qe_report, self._qe_identity)
        return passed(f"the quoting enclave reaches the level of ISVSVN {level.tcb.isvsvn}")

    def _tcb_info_signature(self) -> Outcome:
        return self._document_signature("tcb_info", self._tcb_document, "tcb_info_chain")

    def _tcb_info_dates(self) -> Outcome:
        return self._document_dates("tcb_info", self._tcb_document, "tcb_info_chain")

    def _tcb_info_match(self) -> Outcome:
        info = self._tcb_info
        verify.verify_tcb_info(self._platform(), info)
        return passed(f"TCB info of this platform, of TCB evaluation {info.tcb_evaluation_data_number}")

    def _module(self) -> Outcome:
        level = verify.module_level(self._report(), self._tcb_info)
        if level is None:
            return passed("Intel's TDX module of version 0, whose SVN the platform's level judges")
        return passed(f"Intel's TDX module, which reaches the level of ISVSVN {level.tcb.isvsvn}")

    def _tcb_level(self) -> Outcome:
        level = verify.platform_level(self._report(), self._platform(), self._tcb_info)
        return passed(f"the platform reaches the level of {level.tcb_date[:10]}")

    def _platform_status(self) -> Outcome:
        level = verify.platform_level(self._report(), self._platform(), self._tcb_info)
        return validate.validate_status("platform", level, self._policy.platform_tcb)

    def _module_status(self) -> Outcome:
        level = verify.module_level(self._report(), self._tcb_info)
        if level is None:
            return not_applicable("Intel judges a TDX module of version 0 by the platform's level")
        return validate.validate_status("TDX module", level, self._policy.module_tcb)

    def _qe_status(self) -> Outcome:
        level = verify.qe_level(self._quote().qe_report, self._qe_identity)
        return validate.validate_status("quoting enclave", level, self._policy.qe_tcb)

    def _evaluation(self) -> Outcome:
        numbers = {
            "TCB info": self._tcb_info.tcb_evaluation_data_number,
            "QE identity": self._qe_identity.tcb_evaluation_data_number,
        }
        return validate.validate_evaluation(numbers, self._policy)

    def _collateral(self) -> Outcome:
        missing = [piece for piece in _PIECES if getattr(self._pieces, piece) is None]
        if not missing:
            return passed("every piece of Intel's collateral is there")
        if self._policy.collateral == "any":
            return not_applicable("the policy does without the collateral that nobody fetched")
        wanted = dict.fromkeys(self._fetch(piece) for piece in missing)
        raise EvidenceError(f"{', '.join(missing)} missing: fetch {', '.join(wanted)}")

    def _document_signature(
        self,
        piece: _Piece,
        document: pcs.SignedDocument,
        signers: _Signers,
    ) -> Outcome:
        name = piece.replace("_", " ")
        signing = self._signing_chain(signers)
        chain.verify_root(signing.root, self._pinned)
        pcs.verify_document(document, signing.signer, name)
        return passed("Intel's TCB signer signed it, under a pinned root")

    def _document_dates(
        self,
        piece: _Piece,
        document: pcs.SignedDocument,
        signers: _Signers,
    ) -> Outcome:
        name = piece.replace("_", " ")
        until = pcs.verify_document_dates(document, self._at, name, self._fetch(piece))
        signing = self._signing_chain(signers)
        chain.verify_dates(signing.certificates, self._at)
        return passed(f"current until {until:%Y-%m-%d}")

    def _signing_chains(self) -> list[chain.SigningChain]:
        given: tuple[_Signers, ...] = ("tcb_info_chain", "qe_identity_chain")
        return [self._signing_chain(piece) for piece in given if getattr(self._pieces, piece) is not None]

    def _signing_chain(self, piece: _Signers) -> chain.SigningChain:
        if piece not in self._signing:
            name = "TCB info" if piece == "tcb_info_chain" else "QE identity"
            self._signing[piece] = chain.verify_signing_chain(self._piece(piece), f"{name}'s signing chain")
        return self._signing[piece]

    # What was read is read once; what can't be read fails every check that asks for it.

    @cached_property
    def _tcb_document(self) -> pcs.SignedDocument:
        return pcs.parse_signed(self._piece("tcb_info"), "tcbInfo")

    @cached_property
    def _qe_document(self) -> pcs.SignedDocument:
        return pcs.parse_signed(self._piece("qe_identity"), "enclaveIdentity")

    @cached_property
    def _tcb_info(self) -> pcs.TcbInfo:
        return pcs.parse_tcb_info(self._tcb_document)

    @cached_property
    def _qe_identity(self) -> pcs.QeIdentity:
        return pcs.parse_qe_identity(self._qe_document)

    def _quote(self) -> abi.Quote:
        return _held(self._given_quote, "not checked, for the quote can't be read")

    def _report(self) -> abi.TdReport:
        return self._quote().report

    def _chain(self) -> chain.PckChain:
        return _held(self._given_chain, "not checked, for the PCK chain doesn't hold")

    def _platform(self) -> SgxExtension:
        return _held(self._given_platform, "not checked, for the platform isn't known")

    def _piece(self, piece: _Piece) -> bytes:
        given: bytes | None = getattr(self._pieces, piece)
        if given is not None:
            return given
        # A document that is there is judged, so it must also prove where it comes from.
        orphan = piece in ("tcb_info_chain", "qe_identity_chain")
        if self._policy.collateral == "any" and not orphan:
            raise _Waived(f"nobody fetched {piece}, which the policy does without")
        raise EvidenceError(f"{piece} is missing: fetch {self._fetch(piece)}")

    def _fetch(self, piece: _Piece) -> str:
        """Where the piece is to be had, as far as the quote tells."""
        if piece == "root_crl":
            return pcs.PCS_ROOT_CRL
        if piece == "pck_crl":
            held = self._given_chain
            ca = "processor" if held and held.ca_name == chain.PROCESSOR_CA else "platform"
            return pcs.PCS_PCK_CRL.format(ca=ca)
        if piece in ("tcb_info", "tcb_info_chain"):
            platform = self._given_platform
            return pcs.PCS_TCB_INFO.format(fmspc=platform.fmspc.hex() if platform else "{fmspc}")
        return pcs.PCS_QE_IDENTITY


def _held(value: _T | None, otherwise: str) -> _T:
    if value is None:
        raise EvidenceError(otherwise)
    return value


def _check(name: str, step: Callable[[], Outcome]) -> Check:
    def waiving() -> Outcome:
        try:
            return step()
        except _Waived as waived:
            return not_applicable(str(waived))

    return checked(name, waiving, *TDX_CHECKS[name])
