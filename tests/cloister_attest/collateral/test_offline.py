"""Files as they were downloaded elsewhere: each kind is known by what it holds, and strange ones are told apart."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_attest.collateral.offline import identify
from cloister_attest.outcome import EvidenceError
from tests.cloister_attest.collateral.pieces import as_pem, qe_identity, snp, snp_items, tcb_info, tdx_items
from tests.cloister_attest.tdx import minting as intel

EVIDENCE = Path(os.environ.get("CLOISTER_EVIDENCE", Path(__file__).parents[4] / "shared" / "evidence"))
SIGNERS = intel.pem(intel.TCB_SIGNER, intel.ROOT)


def crl_pem(der: bytes) -> bytes:
    return x509.load_der_x509_crl(der).public_bytes(Encoding.PEM)


@pytest.mark.parametrize("product", ["Milan", "Genoa", "Turin"])
def test_amd_s_pieces_in_every_form(product: str) -> None:
    items = (*snp_items(product), *snp_items(product, "VLEK")[:1])
    assert [item.kind for item in items] == ["amd-vcek", "amd-ask", "amd-ark", "amd-crl", "amd-asvk"]
    for item in items:
        assert identify(item.content, ()) == (item,)
        text = crl_pem(item.content) if item.kind == "amd-crl" else as_pem(item.content)
        assert identify(text, ()) == (item,)
        assert identify(text.replace(b"\n", b"\r\n"), ()) == (item,)
        assert identify(item.content.hex().encode() + b"\n", ()) == (item,)


def test_a_bundle_holds_several() -> None:
    found = snp().collateral
    _, ask, ark, _ = snp_items()
    assert identify(as_pem(found.intermediate, found.root), ()) == (ask, ark)
    vlek = snp("Milan", "VLEK").collateral
    kinds = [item.kind for item in identify(as_pem(vlek.leaf, vlek.intermediate, vlek.root), ())]
    assert kinds == ["amd-asvk", "amd-ark"]


def test_intel_s_lists_and_documents_with_their_chain() -> None:
    root, pck, tcb, qe = tdx_items()
    assert identify(root.content, ()) == identify(crl_pem(root.content), ()) == (root,)
    assert identify(pck.content.hex().encode(), ()) == (pck,)
    processor = intel.certificate(
        "Intel SGX PCK Processor CA", intel.CA_KEY, "Intel SGX Root CA", intel.ROOT_KEY, authority=True
    )
    assert identify(intel.revocation_list(processor, intel.CA_KEY), ())[0].name == "processor"
    header = b"HTTP/1.1 200 OK\r\nTCB-Info-Issuer-Chain: " + quote(SIGNERS, safe="").encode() + b"\r\nX: y\r\n\r\n"
    apart = (intel.pem(intel.ROOT), intel.TCB_SIGNER.public_bytes(Encoding.DER))
    for others in ((SIGNERS,), (b"rubbish", tcb.content, SIGNERS), (header,), apart):
        assert identify(tcb.content, others) == (tcb,)
        assert identify(qe.content, others) == (qe,)
    # A signing chain is no piece of its own.
    assert identify(SIGNERS, ()) == identify(header, ()) == ()


def test_a_document_whose_signer_is_not_there_says_what_to_add() -> None:
    forged = ec.generate_private_key(ec.SECP256R1())
    other = intel.certificate("Intel SGX TCB Signing", forged, "Intel SGX Root CA", intel.ROOT_KEY, authority=False)
    for others in ((), (b"x",), (intel.pem(other, intel.ROOT),)):
        with pytest.raises(EvidenceError, match="dump-header"):
            identify(tcb_info().content, others)
    with pytest.raises(EvidenceError, match="whole chain"):
        identify(tcb_info().content, (intel.pem(intel.TCB_SIGNER, intel.CA),))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b" \n", "empty"),
        (b"hello", "neither a certificate, nor a revocation list, nor a JSON document"),
        (b"{}", "neither Intel's TCB info nor an enclave's identity"),
        (b"abc", "neither a certificate"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "neither as a certificate nor as a rev"),
        (intel.pem(intel.PCK), "PCK certificate, which the quote holds itself"),
        (intel.pem(intel.CA), "none that AMD's or Intel's appraisal takes"),
        (intel.revocation_list(intel.TCB_SIGNER, intel.TCB_KEY), "neither of an AMD root nor"),
        (intel.document("tcbInfo", intel.changed(intel.TCB_INFO, id="SGX")), "not that of a TDX platform"),
        (intel.document("tcbInfo", intel.changed(intel.TCB_INFO, fmspc="../../etc")), "not that of a TDX platform"),
        (intel.document("enclaveIdentity", intel.changed(intel.QE_IDENTITY, id="QE")), "not that of TDX's quoting"),
        (b"0" * ((8 << 20) + 1), "are enough for any collateral"),
    ],
    ids=range(12),
)  # fmt: skip
def test_a_file_that_is_something_else_says_what_it_isn_t(content: bytes, says: str) -> None:
    with pytest.raises(EvidenceError, match=says):
        identify(content, (SIGNERS,))


def test_a_vlek_says_where_it_comes_from() -> None:
    with pytest.raises(EvidenceError, match="VLEK, which comes with the evidence"):
        identify(snp("Milan", "VLEK").collateral.leaf or b"", ())


@settings(max_examples=60, deadline=None)
@given(
    st.binary(max_size=300), st.integers(0, 2500), st.sampled_from([b"", b"{", b"0", b"-----BEGIN CERTIFICATE-----"])
)
def test_hostile_files_are_never_more_than_an_evidence_error(noise: bytes, position: int, head: bytes) -> None:
    for item in (*snp_items(), *tdx_items()):
        spoilt = item.content[:position] + noise + item.content[position + len(noise) :]
        for content in (head + noise, spoilt):
            with suppress(EvidenceError):
                identify(content, (noise, SIGNERS[:position], spoilt))


def test_real_certificates_and_lists_are_known() -> None:
    folder = EVIDENCE / "ca" / "amd"
    if not folder.is_dir():
        pytest.skip(f"there is no evidence in {EVIDENCE}: set CLOISTER_EVIDENCE")
    kinds = {"ARK-": "amd-ark", "SEV-VLEK-": "amd-asvk", "SEV-": "amd-ask", "crl-": "amd-crl"}
    for path in sorted(folder.glob("*.der")):
        (item,) = identify(path.read_bytes(), ())
        kind = next(kind for prefix, kind in kinds.items() if path.stem.startswith(prefix))
        assert (item.kind, item.name) == (kind, path.stem.rpartition("-")[2].capitalize()), path.name


def test_real_documents_find_their_chain() -> None:
    folder = EVIDENCE / "tdx" / "collateral"
    if not folder.is_dir():
        pytest.skip(f"there is no evidence in {EVIDENCE}: set CLOISTER_EVIDENCE")
    for each in sorted(folder.iterdir()):
        everything = [path.read_bytes() for path in sorted(each.iterdir())]
        for name in ("tcb_info", "qe_identity"):
            (item,) = identify((each / f"{name}.json").read_bytes(), everything)
            assert item.content == (each / f"{name}.json").read_bytes()
            assert item.chain.split() == (each / f"{name}_chain.pem").read_bytes().rstrip(b"\0").split()
            value = json.loads(item.content)
            assert item.name == (value["tcbInfo"]["fmspc"].lower() if name == "tcb_info" else "td")
        assert identify((each / "root_crl.der").read_bytes(), ())[0].name == "root"
        assert identify((each / "pck_crl.der").read_bytes(), ())[0].kind == "intel-pck-crl"


def test_the_found_chain_is_the_one_that_verifies() -> None:
    assert identify(qe_identity().content, (SIGNERS,))[0].chain == SIGNERS
