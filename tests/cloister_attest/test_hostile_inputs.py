"""The parsers that the platforms' own tests leave out, on hostile bytes: their errors alone, and bounded memory.

What a parser may raise is part of its contract: EvidenceError, ConfigurationError for trust files, ValidationError for
messages. `tests.fuzz` runs the same parsers under guidance.
"""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cloister.receipts import ReceiptFile
from cloister_attest.channel import make_server_identity
from cloister_attest.evidence import MAX_CHECKPOINT, Evidence, EvidenceRecord
from cloister_attest.outcome import EvidenceError
from cloister_attest.policy import AttestationPolicy
from cloister_attest.simulated import abi
from cloister_attest.simulated.verify import verify_chain
from cloister_attest.snp import verify as snp_verify
from cloister_attest.snp.certificate_table import ARK_GUID, VCEK_GUID, parse_table, split_extended
from cloister_attest.snp.certificates import load_certificate, read_leaf
from cloister_attest.snp.products import PRODUCTS, decode_tcb, product_of_cpuid
from cloister_attest.tdx import abi as tdx_abi
from cloister_attest.tdx import chain
from cloister_attest.tdx import collateral as pcs
from cloister_attest.tdx.extension import parse_extension
from cloister_data.errors import ConfigurationError
from tests.cloister_attest.snp import minted
from tests.cloister_attest.tdx import minting
from tests.fakes.attested_server import FakeMachine

SETTINGS = settings(max_examples=100, deadline=None)
FAKE = FakeMachine()
SHOWN, TRUST = FAKE.evidence(make_server_identity().spki, bytes(32)), FAKE.hardware.trust()
MIB = 1 << 20
SECONDS = 5.0
"""No input here takes a tenth of it; a parser that hangs, or doubles its work with each byte, takes it all."""

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def spoilt(data: bytes, position: int, value: bytes) -> bytes:
    start = position % (len(data) + 1)
    return data[:start] + value + data[start + len(value) :]


@SETTINGS
@given(st.binary(max_size=400), st.integers(0, 400), st.binary(min_size=1, max_size=16))
def test_simulated_reports(data: bytes, position: int, value: bytes) -> None:
    body = abi.pack_body(debug=False, measurement=bytes(48), report_data=bytes(64), chip_id=bytes(64), tcb=1)
    whole = body + abi.pack_signature(1, 2)
    for given_bytes in (data, whole[: len(data)], spoilt(whole, position, value)):
        with suppress(EvidenceError):
            abi.parse(given_bytes)


@SETTINGS
@given(st.binary(max_size=300), st.integers(0, 2000), st.binary(min_size=1, max_size=8))
def test_simulated_chains(data: bytes, position: int, value: bytes) -> None:
    leaf, root = SHOWN.certificates
    for certificates in ((), (data,), (data, root), (spoilt(leaf, position, value), root), (leaf, data)):
        with suppress(EvidenceError):
            verify_chain(certificates)


@SETTINGS
@given(st.binary(max_size=300), JSON, st.sampled_from([*Evidence.model_fields, "more"]), st.integers(0, 4000))
def test_evidence_on_the_wire(data: bytes, value: object, member: str, position: int) -> None:
    text = SHOWN.to_json()
    changed = json.dumps({**json.loads(text), member: value}).encode()
    for given_bytes in (data, changed, spoilt(text, position, data or b"x")):
        for model in (Evidence, EvidenceRecord):
            with suppress(ValidationError):
                model.from_json(given_bytes)


@SETTINGS
@given(
    st.text(max_size=200) | st.text(alphabet="[]{}=.,'\"\\#abe019-:TZ\n ", max_size=200),
    JSON,
    st.sampled_from([*AttestationPolicy.model_fields, "more"]),
    st.integers(0, 4000),
)
def test_trust_files(text: str, value: object, key: str, position: int) -> None:
    whole = TRUST.to_toml()
    start = position % (len(whole) + 1)
    lines = [line for line in whole.splitlines() if not line.startswith(f"{key} ")]
    for given_text in (text, whole[:start] + text + whole[start:], "\n".join([*lines, f"{key} = {json.dumps(value)}"])):
        with suppress(ConfigurationError):
            AttestationPolicy.from_toml(given_text)


DEEP = 20_000


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * DEEP + "]" * DEEP,
        "a = " + "{a = " * DEEP + "1" + "}" * DEEP,
        ".".join(["a"] * DEEP) + " = 1",
        "[" + ".".join(["a"] * DEEP) + "]",
        "a = " + "9" * 100_000,
        "a = 0x" + "f" * 100_000,
        "a = 1e400",
        "a = nan",
        'a = "\\ud800"',
        "a = 1979-05-27T07:32:00Z",
        "\n".join(f"k{number} = 1" for number in range(20_000)),
    ],
    ids=range(11),
)
def test_trust_files_that_are_deep_long_or_odd(text: str) -> None:
    began = time.monotonic()
    with pytest.raises(ConfigurationError):
        AttestationPolicy.from_toml(text)
    assert time.monotonic() - began < SECONDS


@SETTINGS
@given(st.integers(0, 3000), st.binary(min_size=1, max_size=12), st.sampled_from(["leaf", "intermediate", "root"]))
def test_certificates(position: int, value: bytes, part: str) -> None:
    der = getattr(machine().collateral, part)
    with suppress(EvidenceError):
        certificate = load_certificate(spoilt(der, position, value), part)
        for product in PRODUCTS:
            for kind in ("VCEK", "VLEK"):
                with suppress(EvidenceError):
                    read_leaf(certificate, kind, product)


def machine() -> minted.Minted:
    if not MACHINES:
        MACHINES.append(minted.mint(minted.Recipe()))
    return MACHINES[0]


MACHINES: list[minted.Minted] = []


@SETTINGS
@given(st.binary(max_size=16), st.integers(-1, 300), st.integers(-1, 300))
def test_products(raw: bytes, family: int, model: int) -> None:
    for product in PRODUCTS:
        with suppress(EvidenceError):
            decode_tcb(raw, product)
    with suppress(EvidenceError):
        product_of_cpuid(family, model)


@SETTINGS
@given(st.lists(st.tuples(st.binary(min_size=16, max_size=16), *[st.integers(0, 0xFFFFFFFF)] * 2), max_size=6))
def test_tables_of_any_declared_lengths(entries: list[tuple[bytes, int, int]]) -> None:
    header = b"".join(guid + struct.pack("<II", offset, length) for guid, offset, length in entries)
    for data in (header, header + bytes(24), header + bytes(24) + b"x" * 200):
        with suppress(EvidenceError):
            parse_table(data)


def document(inner: str) -> bytes:
    return f'{{"tcbInfo":{inner},"signature":"{"00" * 64}"}}'.encode()


def entry(offset: int, length: int, count: int = 1) -> bytes:
    return (VCEK_GUID.bytes + struct.pack("<II", offset, length)) * count + bytes(24)


QUOTE = minting.quote()
SIZE = len(tdx_abi.parse_quote(QUOTE).signed)
HOSTILE: dict[str, tuple[Callable[[bytes], object], bytes]] = {
    "a table whose entry declares 4 GiB": (parse_table, entry(48, 0xFFFFFFFF)),
    "a table whose entries share their bytes": (
        parse_table,
        (VCEK_GUID.bytes + struct.pack("<II", 72, 900_000))
        + (ARK_GUID.bytes + struct.pack("<II", 72, 900_000))
        + bytes(24 + 900_000),
    ),
    "a table of one entry 40000 times": (parse_table, entry(0, 0, 40_000)),
    "an extended report with a table too long": (split_extended, bytes(1184 + (1 << 20) + 1)),
    "a quote that declares 4 GiB": (tdx_abi.parse_quote, QUOTE[:SIZE] + b"\xff" * 4 + QUOTE[SIZE + 4 :]),
    "a quote with a body of 4 GiB": (tdx_abi.parse_quote, QUOTE[:50] + b"\xff" * 4 + QUOTE[54:]),
    "a quote padded beyond the bound": (tdx_abi.parse_quote, QUOTE + bytes(1 << 20)),
    "an extension of 4 GiB": (parse_extension, b"\x30\x84\xff\xff\xff\xff" + bytes(100)),
    "an extension nested deeply": (parse_extension, b"\x30\x82\x7f\xff" * 8000),
    "a chain of bytes without an end": (chain.verify_pck_chain, b"-----BEGIN CERTIFICATE-----\n" + b"A" * 32_000),
    "a chain of many beginnings": (chain.verify_pck_chain, b"-----BEGIN CERTIFICATE-----\n" * 1100),
    "a certificate of 16 KiB": (lambda data: load_certificate(data, "it"), b"\x30\x82\x3f\xfc" + bytes(16_380)),
    "a certificate of 4 GiB": (lambda data: load_certificate(data, "it"), b"\x30\x84\xff\xff\xff\xff" + bytes(9)),
    "a document of many brackets": (lambda data: pcs.parse_signed(data, "tcbInfo"), document("[" * 200_000)),
    "a document of a long number": (lambda data: pcs.parse_signed(data, "tcbInfo"), document("9" * 400_000)),
    "a document of white space": (lambda data: pcs.parse_signed(data, "tcbInfo"), b" " * 500_000),
    "a document too long": (lambda data: pcs.parse_signed(data, "tcbInfo"), document('"' + "a" * 600_000 + '"')),
    "a document of many levels": (
        lambda data: pcs.parse_tcb_info(pcs.parse_signed(data, "tcbInfo")),
        document(json.dumps(minting.TCB_INFO | {"tcbLevels": [minting.level()] * 257})),
    ),
    "a simulated report of 1 MiB": (abi.parse, bytes(1 << 20)),
    "a list too long": (
        lambda data: snp_verify.verify_crl(data, snp_verify.read_chain(machine().collateral).root, minted.AT),
        b"\x30\x84\x00\x20\x00\x00" + bytes(1 << 21),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_memory_and_time_are_bounded(name: str) -> None:
    """Whatever lengths it declares, an input of n bytes takes no more than 16 MiB beside itself."""
    parse, data = HOSTILE[name]
    machine()
    tracemalloc.start()
    began = time.monotonic()
    try:
        with pytest.raises(EvidenceError):
            parse(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * MIB
    assert time.monotonic() - began < SECONDS


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 1_000_000,
        b'{"a":' * 200_000,
        b'{"report":"' + b"A" * 1_000_000,
        b'{"log_key":' + b"9" * 1_000_000 + b"}",
    ],
    ids=range(4),
)
def test_messages_of_hostile_shape(text: bytes) -> None:
    began = time.monotonic()
    with pytest.raises(ValidationError):
        Evidence.from_json(text)
    assert time.monotonic() - began < SECONDS


@pytest.mark.parametrize("kind", [Evidence, EvidenceRecord, ReceiptFile])
@pytest.mark.parametrize("part", [b"{}", b"0"])
def test_few_faults_are_told_of_evidence_of_many_parts(kind: type[Evidence], part: bytes) -> None:
    """pydantic keeps each fault: the megabytes that an unproven machine may send made gigabytes of them."""
    for text in (
        b'{"collateral":[' + part + (b"," + part) * MIB + b"]}",
        b"{" + b",".join(b'"%d":' % number + part for number in range(MIB // 8)) + b"}",
    ):
        for given_text in (text, text.decode()):
            with pytest.raises(ValidationError) as refused:
                kind.from_json(given_text)
            assert refused.value.error_count() == 1
            assert "more than 32768 parts" in str(refused.value)


def test_evidence_may_hold_as_many_commas_as_its_texts_do() -> None:
    shown = SHOWN.model_copy(update={"checkpoint": "," * MAX_CHECKPOINT})
    assert Evidence.from_json(shown.to_json()) == shown


MANY = [{}] * 100_000
LEVEL = minting.level()
LISTS = {
    "levels": {"tcbLevels": MANY},
    "modules": {"tdxModuleIdentities": MANY},
    "levels of a module": {"tdxModuleIdentities": [minting.TCB_INFO["tdxModuleIdentities"][0] | {"tcbLevels": MANY}]},
    "advisories": {"tcbLevels": [LEVEL | {"advisoryIDs": MANY}]},
    "components": {"tcbLevels": [LEVEL | {"tcb": LEVEL["tcb"] | {"sgxtcbcomponents": MANY}}]},
}


@pytest.mark.parametrize("name", LISTS)
def test_intel_s_documents_are_refused_at_the_first_fault_of_a_list(name: str) -> None:
    document = pcs.parse_signed(minting.document("tcbInfo", minting.TCB_INFO | LISTS[name]), "tcbInfo")
    with pytest.raises(EvidenceError) as refused:
        pcs.parse_tcb_info(document)
    assert isinstance(refused.value.__cause__, ValidationError)
    assert refused.value.__cause__.error_count() < 10
