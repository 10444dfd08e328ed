"""A second opinion on real quotes: dcap-qvl (Phala Network, MIT), which shares no code with this verifier.

Its `verify` checks what the manifest calls `crypto`, and besides refuses some TDs by a policy of its own that none can
turn off. `DIFFERENCES` lists these: the words of its refusal, and what must be true of the quote for it. Here such a
quote is authentic, and the relying party's policy decides. Any other difference fails, and so does a listed one that
has gone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cloister_attest.tdx import abi, chain, validate, verify
from cloister_attest.tdx import collateral as pcs
from cloister_attest.tdx.abi import TdReport
from cloister_attest.tdx.collateral import Collateral
from cloister_attest.tdx.explain import AUTHENTICATION
from tests.cloister_attest import evidence
from tests.cloister_attest.evidence import Case, case_id
from tests.cloister_attest.tdx import minting

dcap_qvl = pytest.importorskip("dcap_qvl", reason="dcap-qvl has no wheel for this platform")


def attribute(bit: int) -> Callable[[TdReport], bool]:
    return lambda report: bool(validate.number(report.td_attributes) & bit)


DIFFERENCES: dict[str, Callable[[TdReport], bool]] = {
    "Debug mode is enabled": attribute(validate.ATTRIBUTE_DEBUG),
    "SEPT_VE_DISABLE is not enabled": lambda report: not attribute(validate.ATTRIBUTE_SEPT_VE_DISABLE)(report),
    "Invalid MR service TD": lambda report: any(report.mr_service_td or b""),
}
"""What dcap-qvl says when it refuses a TD that this verifier calls authentic -> what is so of that TD."""

SEVERITY = (
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "Revoked",
)

CASES = [case for case in evidence.cases("tdx") if evidence.complete(evidence.tdx_parts(case)[1])]
ABSENT = pytest.param({}, id="absent", marks=pytest.mark.skip(reason=f"there are no quotes in {evidence.EVIDENCE}"))


def second_opinion(quote: bytes, given: Collateral, at: int) -> tuple[Any, str]:
    """Its report; or None, and what it says."""
    try:
        return dcap_qvl.verify(quote, its_collateral(given), at), ""
    except ValueError as error:
        return None, str(error)


def its_collateral(given: Collateral) -> Any:
    info, identity = (
        pcs.parse_signed(raw or b"", member)
        for raw, member in ((given.tcb_info, "tcbInfo"), (given.qe_identity, "enclaveIdentity"))
    )
    assert given.tcb_info_chain is not None
    assert given.qe_identity_chain is not None
    return dcap_qvl.QuoteCollateralV3(
        # It builds the list's chain from the quote, so that this member may be empty.
        pck_crl_issuer_chain="",
        root_ca_crl=given.root_crl,
        pck_crl=given.pck_crl,
        tcb_info_issuer_chain=given.tcb_info_chain.decode(),
        tcb_info=info.body.decode(),
        tcb_info_signature=info.signature,
        qe_identity_issuer_chain=given.qe_identity_chain.decode(),
        qe_identity=identity.body.decode(),
        qe_identity_signature=identity.signature,
    )


def documented(words: str, quote: bytes) -> bool:
    """Whether the refusal is one of the listed ones, and true of the quote."""
    return any(said in words and holds(abi.parse_quote(quote).report) for said, holds in DIFFERENCES.items())


def agree(ours: bool, theirs: bool, words: str, quote: bytes) -> bool:
    if ours == theirs:
        return not ours or not any(holds(abi.parse_quote(quote).report) for holds in DIFFERENCES.values())
    return ours and documented(words, quote)


@pytest.mark.parametrize("case", CASES or [ABSENT], ids=case_id if CASES else None)
def test_both_give_one_answer(case: Case) -> None:
    quote, given, at = evidence.tdx_parts(case)
    failed = evidence.tdx_failed(case, evidence.tdx_policy()).keys() & AUTHENTICATION.keys()
    found, words = second_opinion(quote, given, at)
    assert agree(not failed, found is not None, words, quote), (failed, words)
    if found is not None:
        assert (found.status, set(found.advisory_ids)) == our_status(quote, given)


def our_status(quote: bytes, given: Collateral) -> tuple[str, set[str]]:
    """One status for platform, TDX module and quoting enclave, as Intel's library merges them (DCAP, "TCB status")."""
    parsed = abi.parse_quote(quote)
    info = pcs.parse_tcb_info(pcs.parse_signed(given.tcb_info or b"", "tcbInfo"))
    identity = pcs.parse_qe_identity(pcs.parse_signed(given.qe_identity or b"", "enclaveIdentity"))
    platform = chain.sgx_extension(chain.verify_pck_chain(parsed.pck_chain))
    levels = [
        verify.platform_level(parsed.report, platform, info),
        verify.module_level(parsed.report, info),
        verify.qe_level(parsed.qe_report, identity),
    ]
    statuses = [level.tcb_status for level in levels if level is not None]
    worst = max(statuses, key=SEVERITY.index)
    if worst == "OutOfDate" and any("Configuration" in status for status in statuses):
        worst = "OutOfDateConfigurationNeeded"
    return worst, {advisory for level in levels if level is not None for advisory in level.advisory_ids}


def test_an_undocumented_difference_would_be_noticed() -> None:
    quote = minting.quote()
    debug = minting.quote(body=minting.td_body(tdattributes=(1 << 28 | 1).to_bytes(8, "little")))
    said = "Verification failed: Debug mode is enabled"
    assert agree(True, True, "", quote)
    assert agree(False, False, said, quote)
    assert agree(True, False, said, debug)
    assert not agree(True, False, said, quote)
    assert not agree(True, False, "Verification failed: something else", debug)
    assert not agree(False, True, "", quote)
    assert not agree(True, True, "", debug)
