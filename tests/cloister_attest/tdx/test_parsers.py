"""The parsers on hostile bytes: nothing but EvidenceError, and no signed byte that may change."""

import base64
import json

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cloister_attest.outcome import EvidenceError
from cloister_attest.tdx import abi, chain
from cloister_attest.tdx import collateral as pcs
from cloister_attest.tdx.appraise import appraise_tdx
from cloister_attest.tdx.explain import AUTHENTICATION
from cloister_attest.tdx.extension import parse_extension
from tests.cloister_attest.tdx import minting as m

QUOTE = m.quote()
PARSED = abi.parse_quote(QUOTE)
POLICY = m.strict()
COLLATERAL = m.collateral()
SETTINGS = settings(max_examples=150, deadline=None)

PEM_START = QUOTE.index(b"-----BEGIN")


def only_evidence_error(parse, data):
    try:
        return parse(data)
    except EvidenceError:
        return None


def spoilt(data: bytes, position: int, bit: int) -> bytes:
    copy = bytearray(data)
    copy[position % len(copy)] ^= 1 << bit
    return bytes(copy)


def spoilt_within(data: bytes, part: bytes, position: int, bit: int) -> bytes:
    return data.replace(part, spoilt(part, position, bit), 1)


def test_fields_of_a_minted_quote():
    report = PARSED.report
    assert (PARSED.version, PARSED.body_type) == (5, abi.BODY_TD_15)
    assert report.mr_td == b"\xd0" * 48
    assert report.rtmr == tuple(bytes([value]) * 48 for value in range(0xA0, 0xA4))
    assert report.report_data == m.REPORT_DATA
    assert report.mr_service_td == bytes(48)
    assert PARSED.qe_report.mr_signer == m.QE_SIGNER
    assert (PARSED.qe_report.isv_prod_id, PARSED.qe_report.isv_svn) == (2, 4)
    older = abi.parse_quote(m.quote(version=4, body_type=abi.BODY_TD_10))
    assert (older.version, older.body_type, older.report.mr_service_td) == (4, abi.BODY_TD_10, None)


@SETTINGS
@given(st.integers(0, PEM_START - 1), st.integers(0, 7))
def test_no_byte_of_the_quote_may_change(position, bit):
    checks = appraise_tdx(spoilt(QUOTE, position, bit), COLLATERAL, POLICY, m.REPORT_DATA, m.AT)
    assert {check.name for check in checks if check.verdict == "fail"} & set(AUTHENTICATION)
    assert not [check for check in checks if "the check itself failed" in check.reason]


@SETTINGS
@given(st.sampled_from(["tcb_info", "qe_identity"]), st.integers(0, 1 << 20), st.integers(0, 7))
def test_no_byte_of_intels_documents_may_change(piece, position, bit):
    raw = getattr(COLLATERAL, piece)
    changed = spoilt(raw, position, bit)
    checks = appraise_tdx(QUOTE, m.collateral(**{piece: changed}), POLICY, m.REPORT_DATA, m.AT)
    failed = {check.name for check in checks if check.verdict == "fail"}
    member = "tcbInfo" if piece == "tcb_info" else "enclaveIdentity"
    parsed = only_evidence_error(lambda data: pcs.parse_signed(data, member), changed)
    original = pcs.parse_signed(raw, member)
    # Hex digits of the signature may change their case; nothing that is signed may change at all.
    if parsed != original:
        assert f"tdx-{piece.replace('_', '-')}-signature" in failed


@SETTINGS
@given(st.sampled_from(["root_crl", "pck_crl"]), st.integers(0, 1 << 20), st.integers(0, 7))
def test_no_signed_byte_of_the_lists_may_change(piece, position, bit):
    raw = getattr(COLLATERAL, piece)
    changed = spoilt_within(raw, x509.load_der_x509_crl(raw).tbs_certlist_bytes, position, bit)
    checks = appraise_tdx(QUOTE, m.collateral(**{piece: changed}), POLICY, m.REPORT_DATA, m.AT)
    assert {check.name for check in checks if check.verdict == "fail"} == {"tdx-" + piece.replace("_", "-")}


@SETTINGS
@given(st.integers(0, 2), st.integers(0, 1 << 20), st.integers(0, 7))
def test_no_signed_byte_of_the_chain_may_change(index, position, bit):
    certificates = [m.PCK, m.CA, m.ROOT]
    der = certificates[index].public_bytes(Encoding.DER)
    changed = spoilt_within(der, certificates[index].tbs_certificate_bytes, position, bit)
    texts = [m.pem(certificate) for certificate in certificates]
    lines = base64.encodebytes(changed)
    texts[index] = b"-----BEGIN CERTIFICATE-----\n" + lines + b"-----END CERTIFICATE-----\n"
    quote = m.quote(certificates=b"".join(texts))
    checks = appraise_tdx(quote, COLLATERAL, POLICY, m.REPORT_DATA, m.AT)
    assert "tdx-pck-chain" in {check.name for check in checks if check.verdict == "fail"}


@SETTINGS
@given(st.binary(max_size=2000))
@example(QUOTE)
def test_quotes_raise_nothing_else(data):
    only_evidence_error(abi.parse_quote, data)
    only_evidence_error(abi.parse_quote, QUOTE[:48] + data)
    only_evidence_error(abi.parse_quote, QUOTE[: len(data)])


@SETTINGS
@given(st.binary(max_size=200), st.integers(0, 400), st.integers(0, 7))
def test_extensions_raise_nothing_else(data, position, bit):
    only_evidence_error(parse_extension, data)
    only_evidence_error(parse_extension, b"\x30" + bytes([len(data) & 0x7F]) + data)
    only_evidence_error(parse_extension, spoilt(m.sgx_extension(), position, bit))


def test_extension_fields():
    platform = parse_extension(m.sgx_extension(components=tuple(range(16)), pce_svn=0x80))
    assert (platform.components, platform.pce_svn, platform.fmspc) == (tuple(range(16)), 0x80, m.FMSPC)
    assert parse_extension(m.sgx_extension(instance=False)).platform_instance is None
    assert parse_extension(m.sgx_extension(components=(255,) * 16, pce_svn=0xFFFF)).pce_svn == 0xFFFF


@SETTINGS
@given(st.binary(max_size=500), st.integers(0, 2000), st.integers(0, 7))
def test_chains_raise_nothing_else(data, position, bit):
    only_evidence_error(chain.verify_pck_chain, data)
    only_evidence_error(chain.verify_pck_chain, spoilt(m.pem(m.PCK, m.CA, m.ROOT), position, bit))
    only_evidence_error(
        lambda der: chain.verify_crl(der, m.CA, (m.PCK,), m.AT, "it"), spoilt(COLLATERAL.pck_crl, position, bit)
    )


@SETTINGS
@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode), st.integers(0, 4000))
def test_documents_raise_nothing_else(data, position):
    only_evidence_error(lambda raw: pcs.parse_signed(raw, "tcbInfo"), data)
    raw = COLLATERAL.tcb_info
    cut = position % len(raw)
    document = only_evidence_error(lambda raw: pcs.parse_signed(raw, "tcbInfo"), raw[:cut] + data + raw[cut:])
    if document is not None:
        only_evidence_error(pcs.parse_tcb_info, document)


@SETTINGS
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*m.TCB_INFO, "tcb"]), inner),
        max_leaves=12,
    ),
    st.sampled_from([*m.TCB_INFO]),
)
def test_documents_of_wrong_shape(value, member):
    body = json.dumps({**m.TCB_INFO, member: value})
    document = only_evidence_error(
        lambda raw: pcs.parse_signed(raw, "tcbInfo"), f'{{"tcbInfo":{body},"signature":"{"00" * 64}"}}'.encode()
    )
    if document is not None:
        only_evidence_error(pcs.parse_tcb_info, document)
        only_evidence_error(lambda it: pcs.verify_document_dates(it, m.AT, "tcb info", "it"), document)


SIGNATURE = '"signature":"' + "00" * 64 + '"'


@pytest.mark.parametrize(
    "text",
    [
        f'{{"tcbInfo":{{"id":"TDX","id":"SGX"}},{SIGNATURE}}}',
        f'{{"tcbInfo":{{"a":[{{"b":1,"b":1}}]}},{SIGNATURE}}}',
        f'{{"tcbInfo":{{}},"tcbInfo":{{}},{SIGNATURE}}}',
        f'{{"tcbInfo":{{}},{SIGNATURE},{SIGNATURE}}}',
        f'{{"tcbInfo":{{}},{SIGNATURE},"more":1}}',
        f'{{"tcbInfo":{{}},{SIGNATURE}}} x',
        f'{{"tcbInfo":{{"a":1.5}},{SIGNATURE}}}',
        f'{{"tcbInfo":{{"a":NaN}},{SIGNATURE}}}',
        f'{{"tcbInfo":{{"a":12345678901}},{SIGNATURE}}}',
        f'{{"tcbInfo":{{"a":"é"}},{SIGNATURE}}}',
        f'{{"tcbInfo":[],{SIGNATURE}}}',
        f'{{"tcbInfo":{{"a":{"[" * 100000}{"]" * 100000}}},{SIGNATURE}}}',
        f'{{"enclaveIdentity":{{}},{SIGNATURE}}}',
        '{"tcbInfo":{},"signature":"00"}',
        '{"tcbInfo":{}}',
        "{}",
        "",
    ],
)
def test_json_is_strict(text):
    with pytest.raises(EvidenceError):
        pcs.parse_signed(text.encode(), "tcbInfo")


def test_the_body_is_taken_as_received():
    body = b'{ "id" : "TDX" ,\n\t"version":3 }'
    raw = b' {\n"signature" : "' + b"aB" * 64 + b'" , "tcbInfo" : ' + body + b"\n}\n"
    document = pcs.parse_signed(raw, "tcbInfo")
    assert (document.body, document.value, document.signature) == (body, {"id": "TDX", "version": 3}, b"\xab" * 64)
