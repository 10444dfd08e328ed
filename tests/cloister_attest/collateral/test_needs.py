"""What is asked of whom: the makers' exact addresses, and the evidence for which nobody but the host can answer."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cloister_attest.collateral.needs import needs_of_snp, needs_of_tdx, pieces_of_snp, pieces_of_tdx, vcek_name
from cloister_attest.outcome import EvidenceError
from tests.cloister_attest.collateral.pieces import snp, snp_items, tdx_items
from tests.cloister_attest.snp import minted as amd
from tests.cloister_attest.tdx import minting as intel

EVIDENCE = Path(os.environ.get("CLOISTER_EVIDENCE", Path(__file__).parents[4] / "shared" / "evidence"))

GENOA = f"https://kdsintf.amd.com/vcek/v1/Genoa/{'63' * 64}?blSPL=4&teeSPL=1&snpSPL=24&ucodeSPL=219"
TURIN = f"https://kdsintf.amd.com/vcek/v1/Turin/{'63' * 8}?fmcSPL=2&blSPL=4&teeSPL=1&snpSPL=24&ucodeSPL=219"


def test_a_vcek_is_asked_by_chip_and_firmware_and_turin_names_its_fmc() -> None:
    assert [need.url for need in needs_of_snp(snp().report, ())] == [
        GENOA,
        "https://kdsintf.amd.com/vcek/v1/Genoa/cert_chain",
        "https://kdsintf.amd.com/vcek/v1/Genoa/crl",
    ]
    assert needs_of_snp(snp("Turin").report, ())[0].url == TURIN


def test_what_came_with_the_report_is_not_asked_for() -> None:
    leaf = snp().collateral.leaf
    assert leaf
    assert [need.kind for need in needs_of_snp(snp().report, (b"rubbish", leaf))] == ["amd-ask", "amd-crl"]


def test_a_vlek_comes_from_the_host_alone() -> None:
    made = snp("Milan", "VLEK")
    with pytest.raises(EvidenceError, match="AMD hands it to the cloud provider alone"):
        needs_of_snp(made.report, ())
    assert made.collateral.leaf
    assert [need.url for need in needs_of_snp(made.report, (made.collateral.leaf,))] == [
        "https://kdsintf.amd.com/vlek/v1/Milan/cert_chain",
        "https://kdsintf.amd.com/vlek/v1/Milan/crl",
    ]


def test_a_masked_chip_can_t_be_asked_for() -> None:
    masked = amd.mint(amd.Recipe(patch={0x1A0: bytes(64)}))
    with pytest.raises(EvidenceError, match="masked"):
        needs_of_snp(masked.report, ())
    assert masked.collateral.leaf
    assert [need.kind for need in needs_of_snp(masked.report, (masked.collateral.leaf,))] == ["amd-ask", "amd-crl"]
    assert "amd-vcek" not in [piece.kind for piece in pieces_of_snp(masked.report, ())]


def test_a_report_of_version_2_takes_its_product_from_a_certificate_or_from_who_asks() -> None:
    made = snp("Milan", version=2)
    with pytest.raises(EvidenceError, match="name the product"):
        needs_of_snp(made.report, ())
    assert needs_of_snp(made.report, (), "Milan")[0].url.startswith("https://kdsintf.amd.com/vcek/v1/Milan/6363")
    assert made.collateral.leaf
    assert needs_of_snp(made.report, (made.collateral.leaf,))[0].name == "Milan"
    with pytest.raises(EvidenceError, match="longer than that of a Turin"):
        needs_of_snp(made.report, (), "Turin")
    # A report that says its product isn't overruled.
    assert needs_of_snp(snp().report, (), "Milan")[0].url == GENOA


def test_the_pieces_are_those_of_the_needs() -> None:
    for items, report in ((snp_items(), snp().report), (snp_items("Turin"), snp("Turin").report)):
        wanted = [piece for need in needs_of_snp(report, ()) for piece in need.pieces]
        assert wanted == [(item.kind, item.name) for item in items]
        assert list(pieces_of_snp(report, ())) == wanted
    quote = intel.quote()
    wanted = [piece for need in needs_of_tdx(quote) for piece in need.pieces]
    assert wanted == [(item.kind, item.name) for item in tdx_items()]
    assert set(pieces_of_tdx(quote)) == set(wanted)


def test_intel_is_asked_by_authority_and_platform() -> None:
    assert [need.url for need in needs_of_tdx(intel.quote())] == [
        "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der",
        "https://api.trustedservices.intel.com/sgx/certification/v4/pckcrl?ca=platform&encoding=der",
        "https://api.trustedservices.intel.com/tdx/certification/v4/tcb?fmspc=90c06f000000",
        "https://api.trustedservices.intel.com/tdx/certification/v4/qe/identity",
    ]
    with pytest.raises(EvidenceError):
        needs_of_tdx(intel.quote()[:700])
    assert [kind for kind, _ in pieces_of_tdx(b"")] == ["intel-root-crl", "intel-qe-identity"]
    assert pieces_of_snp(b"", ()) == ()


def test_real_vceks_have_the_names_that_their_reports_ask_for() -> None:
    manifest = EVIDENCE / "manifest.json"
    if not manifest.is_file():
        pytest.skip(f"there is no evidence in {EVIDENCE}: set CLOISTER_EVIDENCE")
    from cloister_attest.collateral.offline import identify

    seen = 0
    for case in json.loads(manifest.read_text())["cases"]:
        # Microsoft's reports of version 2 name a firmware that their VCEK is for, as all good ones do.
        if case["kind"] != "snp" or case["crypto"] != "ok" or "vlek" in case["id"]:
            continue
        report = (EVIDENCE / case["files"]["report"]).read_bytes()
        leaf = (EVIDENCE / case["files"]["leaf"]).read_bytes()
        (item,) = identify(leaf, ())
        assert (item.kind, item.name) in pieces_of_snp(report, ()), case["id"]
        assert (item.kind, item.name) in pieces_of_snp(report, (leaf,)), case["id"]
        seen += 1
    assert seen > 10
    assert vcek_name(b"\1\2", b"\3") == "0102-03"
