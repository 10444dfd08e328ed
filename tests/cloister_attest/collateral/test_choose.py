"""Dates, and the choice: the newest valid piece wins, whoever brought it, and no old one hides a newer."""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_attest.collateral.choose import choose, snp_collateral, tdx_collateral
from cloister_attest.collateral.dates import age_of, dates_of
from cloister_attest.collateral.items import Item, Kind
from cloister_attest.outcome import EvidenceError
from cloister_attest.snp.appraise import appraise_snp
from cloister_attest.snp.certificate_table import Collateral
from cloister_attest.tdx.appraise import appraise_tdx
from tests.cloister_attest.collateral.pieces import (
    SNP_AT,
    TDX_AT,
    days,
    root_crl,
    snp,
    snp_items,
    tcb_info,
    tdx_items,
)
from tests.cloister_attest.snp import minted as amd
from tests.cloister_attest.tdx import minting as intel

NOW = datetime.fromtimestamp(TDX_AT, UTC)
KINDS: tuple[Kind, ...] = (
    "amd-ark", "amd-ask", "amd-asvk", "amd-vcek", "amd-crl", "intel-root-crl", "intel-pck-crl", "intel-tcb-info",
    "intel-qe-identity",
)  # fmt: skip


def test_dates_are_those_of_the_piece_narrowed_by_its_signers() -> None:
    vcek, _, _, crl = snp_items()
    assert dates_of(vcek).valid_until == amd.NOW + 30 * amd.DAY
    assert dates_of(crl).valid_from == amd.NOW - 10 * amd.DAY
    short = intel.certificate(
        "Intel SGX TCB Signing", intel.TCB_KEY, "Intel SGX Root CA", intel.ROOT_KEY, authority=False,
        begin=NOW - days(3), end=NOW + days(3),
    )  # fmt: skip
    found = tcb_info(chain=intel.pem(short, intel.ROOT))
    assert (dates_of(found).valid_from, dates_of(found).valid_until) == (NOW - days(3), NOW + days(3))
    assert age_of(found).issued == intel.BEGIN
    assert dates_of(tcb_info(begin=NOW - days(1))).valid_from == NOW - days(1)


def test_what_can_t_be_dated_is_an_evidence_error() -> None:
    endless = tcb_info(chain=b"")
    wrong = tcb_info().model_copy(update={"content": tcb_info().content.replace(b"2026-02-15", b"2026-02-31")})
    for item in (endless, wrong, root_crl().model_copy(update={"content": b"0"})):
        with pytest.raises(EvidenceError):
            dates_of(item)


def test_a_list_of_an_impossible_name_is_refused_without_a_word() -> None:
    """cryptography would warn, on the terminal of whoever connects."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        country = x509.NameAttribute(NameOID.COUNTRY_NAME, "Lilliput", _validate=False)
        made = x509.CertificateRevocationListBuilder().issuer_name(x509.Name([country])).last_update(NOW)
        content = made.next_update(NOW + days(9)).sign(intel.ROOT_KEY, SHA256()).public_bytes(Encoding.DER)
    item = Item(kind="amd-crl", name="Genoa", content=content, chain=b"")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with pytest.raises(EvidenceError):
            dates_of(item)
    assert heard == []


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.binary(min_size=1, max_size=200), st.binary(max_size=80), st.integers(0, 2000))
def test_hostile_bytes_are_never_more_than_an_evidence_error(
    kind: Kind, noise: bytes, chain: bytes, position: int
) -> None:
    bodies = (noise, *(item.content for item in (*tdx_items(), *snp_items())))
    for body in bodies:
        spoilt = body[:position] + noise + body[position + len(noise) :]
        for content in (body, spoilt):
            for signers in (chain, intel.pem(intel.ROOT)[:position] + chain):
                with suppress(EvidenceError):
                    dates_of(Item(kind=kind, name="x", content=content, chain=signers))


def test_an_older_piece_never_wins_over_a_newer_one() -> None:
    """A machine staples the lists from before its key was revoked; this computer has later ones."""
    stapled, local = root_crl(NOW - days(20), NOW + days(10)), root_crl(NOW - days(2), NOW + days(28))
    for order in ((stapled, local), (local, stapled)):
        assert choose(order, "intel-root-crl", "root", TDX_AT) == local
    earlier, later = tcb_info(NOW - days(1), evaluation=17), tcb_info(NOW - days(9), evaluation=18)
    newest = tcb_info(NOW - days(8), evaluation=18)
    for order in ((earlier, later, newest), (newest, later, earlier)):
        assert choose(order, "intel-tcb-info", intel.FMSPC.hex(), TDX_AT) == newest


def test_a_piece_that_is_not_valid_wins_only_where_none_is() -> None:
    valid = root_crl(NOW - days(20), NOW + days(1))
    expired, older = root_crl(NOW - days(9), NOW - days(1)), root_crl(NOW - days(19), NOW - days(11))
    future, broken = root_crl(NOW + days(1), NOW + days(9)), root_crl().model_copy(update={"content": b"?"})
    kind, name = "intel-root-crl", "root"
    assert choose((future, broken, expired, valid), kind, name, TDX_AT) == valid
    assert choose((broken, older, expired), kind, name, TDX_AT) == expired
    assert choose((broken,), kind, name, TDX_AT) == broken
    assert choose((), kind, name, TDX_AT) is None
    assert choose((valid,), kind, "other", TDX_AT) is None


SPANS = st.lists(st.tuples(st.integers(-30, 30), st.integers(0, 40), st.integers(16, 19)), max_size=6)


@settings(max_examples=60, deadline=None)
@given(SPANS, st.booleans())
def test_a_valid_piece_is_never_passed_over(spans: list[tuple[int, int, int]], lists: bool) -> None:
    items = [
        root_crl(NOW + days(begin), NOW + days(begin + length))
        if lists
        else tcb_info(NOW + days(begin), NOW + days(begin + length), number)
        for begin, length, number in spans
    ]
    # The signers' own time is narrower than some of these.
    valid = [item for item in items if dates_of(item).include(TDX_AT)]
    kind: Kind = "intel-root-crl" if lists else "intel-tcb-info"
    chosen = choose(items, kind, "root" if lists else intel.FMSPC.hex(), TDX_AT)
    if not items:
        assert chosen is None
    elif valid:
        assert chosen in valid
        assert age_of(chosen) == max(age_of(item) for item in valid)
    else:
        assert chosen
        assert age_of(chosen).issued == max(age_of(item).issued for item in items)


def _fails(report: bytes, collateral: Collateral, made: amd.Minted, **policy: object) -> list[str]:
    checks = appraise_snp(
        report, collateral, amd.strict_policy(made, **policy), expected_report_data=amd.REPORT_DATA, at=SNP_AT
    )
    return [check.name for check in checks if check.verdict == "fail"]


def test_a_report_without_certificates_is_proven_by_what_is_chosen() -> None:
    made, items = snp(), snp_items()
    others = (*snp_items("Turin"), *tdx_items())
    found = snp_collateral(made.report, (), (*others, *items), SNP_AT)
    assert found == made.collateral
    assert _fails(made.report, found, made) == []
    assert snp_collateral(made.report, (), others, SNP_AT) == Collateral()


@pytest.mark.parametrize("days_later", [1, 15, -15])
@pytest.mark.parametrize("kind", ["VCEK", "VLEK"])
def test_an_issuer_that_any_list_of_the_root_s_revokes_stays_revoked(kind: Any, days_later: int) -> None:
    """AMD has lists for VCEKs and for VLEKs, at two addresses, under one name: a machine staples the other one."""
    recipe = amd.Recipe(kind=kind, revoked=(amd.ISSUER_SERIAL,))
    made, other = amd.mint(recipe), amd.mint(replace(recipe, revoked=(), crl_days=days_later)).collateral.crl
    forged = amd.mint(replace(recipe, crl_by_issuer=True, crl_days=days_later)).collateral.crl
    unrelated = amd.mint(replace(recipe, revoked=(7,), crl_days=days_later)).collateral.crl
    at = SNP_AT + (days_later * 86400 if abs(days_later) < 20 else 0)

    def failing(*lists: bytes | None) -> list[str]:
        items = [Item(kind="amd-crl", name="Genoa", content=content or b"", chain=b"") for content in lists]
        certificates = [
            der for der in (made.collateral.leaf, made.collateral.intermediate, made.collateral.root) if der
        ]
        found = snp_collateral(made.report, certificates, items, at)
        policy = amd.strict_policy(made, vlek="any", chips_allowed="any", masked_chip_id="any")
        checks = appraise_snp(made.report, found, policy, expected_report_data=amd.REPORT_DATA, at=at)
        return [check.name for check in checks if check.verdict == "fail"]

    assert failing(other) == failing(other, unrelated) == []
    assert failing(other, made.collateral.crl) == failing(made.collateral.crl, other) == ["snp-revocation"]
    # A list that the root didn't sign says nothing, where another one counts.
    assert failing(forged) == ["snp-revocation"]
    assert snp_collateral(made.report, (), [], at).other_crls == ()


def test_the_evidence_s_own_certificates_come_first_and_are_completed() -> None:
    made, items = snp(), snp_items()
    foreign = (b"its own leaf",)
    found = snp_collateral(made.report, foreign, items, SNP_AT)
    assert (found.leaf, found.root, found.crl) == (b"its own leaf", made.collateral.root, made.collateral.crl)
    assert _fails(made.report, found, made)
    vlek = snp("Milan", "VLEK")
    assert vlek.collateral.leaf
    both = (*snp_items("Milan", "VLEK"), *snp_items("Milan"))
    found = snp_collateral(vlek.report, (vlek.collateral.leaf,), both, SNP_AT)
    assert found.intermediate == vlek.collateral.intermediate
    assert found.leaf == vlek.collateral.leaf


def test_a_report_of_version_2_learns_its_product_from_the_chosen_vcek() -> None:
    made = snp("Milan", version=2)
    found = snp_collateral(made.report, (), (*snp_items("Turin"), *snp_items("Milan", version=2)), SNP_AT)
    assert found == made.collateral


def test_a_newer_list_of_this_computer_wins_over_the_stapled_one() -> None:
    stapled, newer = snp_items()[-1], snp_items()[-1].model_copy(update={"content": snp(crl_days=5).collateral.crl})
    found = snp_collateral(snp().report, (), (*snp_items()[:3], stapled, newer), SNP_AT)
    assert found.crl == newer.content


def test_tdx_collateral_is_complete_and_holds() -> None:
    quote = intel.quote()
    found = tdx_collateral(quote, (*snp_items(), *tdx_items()), TDX_AT)
    checks = appraise_tdx(quote, found, intel.strict(), intel.REPORT_DATA, TDX_AT)
    assert [check.name for check in checks if check.verdict == "fail"] == []
    stale = tcb_info(NOW - days(20), NOW - days(1), 19)
    fresh = tcb_info()
    assert tdx_collateral(quote, (stale, fresh), TDX_AT).tcb_info == fresh.content


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=1300), st.lists(st.binary(max_size=60), max_size=9))
def test_hostile_evidence_never_raises(noise: bytes, certificates: list[bytes]) -> None:
    items = (*snp_items(), *tdx_items())
    for report in (noise, snp().report[: len(noise)] + noise, intel.quote()[: len(noise)] + noise):
        snp_collateral(report, certificates, items, SNP_AT)
        tdx_collateral(report, items, TDX_AT)
    huge = tcb_info().model_copy(update={"content": b"{" * (1 << 20)})
    assert tdx_collateral(intel.quote(), (huge,), TDX_AT).tcb_info is None
