"""The parsers: what they read, what they refuse, and that nothing but EvidenceError comes out of hostile bytes."""

from __future__ import annotations

import struct
from contextlib import suppress
from functools import cache
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_attest.outcome import EvidenceError
from cloister_attest.snp import abi, verify
from cloister_attest.snp.certificate_table import (
    ARK_GUID,
    ASK_GUID,
    CRL_GUID,
    VCEK_GUID,
    VLEK_GUID,
    CertificateTable,
    Collateral,
    parse_table,
    split_extended,
)
from cloister_attest.snp.products import PRODUCTS, Product, Tcb, decode_tcb, product_of_cpuid
from tests.cloister_attest.snp.minted import AT, CPUID, MEASUREMENT, REPORT_DATA, TCB, Minted, Recipe, mint


@cache
def minted(version: int = 5) -> Minted:
    return mint(Recipe(version=version))


def changed(report: bytes, offset: int, value: bytes) -> bytes:
    return report[:offset] + value + report[offset + len(value) :]


def test_every_field_is_read() -> None:
    report = abi.parse(minted().report)
    assert (report.version, report.guest_svn, report.vmpl, report.signature_algo) == (5, 7, 0, 1)
    assert (report.policy.abi_major, report.policy.abi_minor) == (2, 31)
    assert (report.author_key_en, report.mask_chip_key, report.signing_key) == (True, False, "VCEK")
    assert (report.family_id, report.image_id, report.host_data) == (b"f" * 16, b"g" * 16, b"h" * 32)
    assert (report.id_key_digest, report.author_key_digest) == (b"i" * 48, b"a" * 48)
    assert (report.report_data, report.measurement) == (REPORT_DATA, MEASUREMENT)
    assert (report.report_id, report.report_id_ma) == (b"r" * 32, b"\xff" * 32)
    assert (report.cpuid, report.product) == (abi.Cpuid(*CPUID["Genoa"]), "Genoa")
    assert {report.current_tcb, report.reported_tcb, report.committed_tcb, report.launch_tcb} == {TCB["Genoa"]}
    assert str(report.current) == str(report.committed) == "1.55 build 43"
    assert (report.launch_mit_vector, report.current_mit_vector) == (7, 7)
    assert report.signed == minted().report[:0x2A0]


def test_older_versions_lack_fields() -> None:
    second, fourth = abi.parse(minted(2).report), abi.parse(minted(4).report)
    assert (second.cpuid, second.product, second.launch_mit_vector) == (None, None, None)
    assert (fourth.product, fourth.launch_mit_vector, fourth.current_mit_vector) == ("Genoa", None, None)


@pytest.mark.parametrize("size", [0, 1, 0x2A0, 1183, 1185, 4096])
def test_another_length_is_refused(size: int) -> None:
    with pytest.raises(EvidenceError, match="bytes"):
        abi.parse(minted().report.ljust(size, b"\0")[:size])


@pytest.mark.parametrize(
    ("version", "offset", "value"),
    [
        (5, 0x00, b"\x01"),
        (5, 0x00, b"\x06"),
        (5, 0x34, b"\x00"),
        (5, 0x34, b"\x02"),
        (5, 0x0A, b"\x01"),
        (5, 0x0B, b"\x04"),
        (5, 0x0F, b"\x80"),
        (5, 0x30, b"\x04"),
        (5, 0x48, b"\x20"),
        (5, 0x48, b"\x08"),
        (5, 0x48, b"\x18"),
        (5, 0x4B, b"\x01"),
        (5, 0x4C, b"\x01"),
        (5, 0x18B, b"\x01"),
        (5, 0x19F, b"\x01"),
        (2, 0x188, b"\x19"),
        (2, 0x18A, b"\x01"),
        (5, 0x188, b"\x18"),
        (5, 0x189, b"\x20"),
        (5, 0x1EB, b"\x01"),
        (5, 0x1EF, b"\x01"),
        (4, 0x1F8, b"\x01"),
        (4, 0x207, b"\x01"),
        (5, 0x208, b"\x01"),
        (5, 0x29F, b"\x01"),
        (5, 0x330, b"\x01"),
        (5, 0x49F, b"\x01"),
        (5, 0x2D0, b"\x01"),
        (5, 0x2E7, b"\x01"),
        (5, 0x318, b"\x01"),
        (5, 0x2A0, bytes(72)),
        (5, 0x2E8, bytes(72)),
        (5, 0x2A0, bytes(144)),
        (5, 0x2A0, abi.P384_ORDER.to_bytes(72, "little")),
        (5, 0x2E8, abi.P384_ORDER.to_bytes(72, "little")),
    ],
)
def test_what_the_version_does_not_define_is_refused(version: int, offset: int, value: bytes) -> None:
    with pytest.raises(EvidenceError):
        abi.parse(changed(minted(version).report, offset, value))


def test_every_signed_byte_counts() -> None:
    chain = verify.read_chain(minted().collateral)
    verify.verify_signature(abi.parse(minted().report), chain)
    for offset in range(0x2A0):
        for bit in (0x01, 0x80):
            value = bytes((minted().report[offset] ^ bit,))
            with pytest.raises(EvidenceError):
                verify.verify_signature(abi.parse(changed(minted().report, offset, value)), chain)


@settings(deadline=None)
@given(st.binary(max_size=1300))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for parser in (abi.parse, parse_table, split_extended):
        with suppress(EvidenceError):
            parser(data)


@settings(deadline=None)
@given(st.integers(0, 0x49F), st.binary(min_size=1, max_size=64), st.sampled_from((2, 3, 4, 5)))
def test_a_changed_report_is_read_or_refused(offset: int, value: bytes, version: int) -> None:
    data = changed(minted(version).report, offset, value)[:0x4A0]
    try:
        report = abi.parse(data)
    except EvidenceError:
        return
    for product in PRODUCTS:
        with suppress(EvidenceError):
            decode_tcb(report.reported_tcb, product)


def test_every_byte_of_a_certificate_and_of_a_list_counts() -> None:
    collateral = minted().collateral
    root = verify.read_chain(collateral).root
    for part in ("leaf", "intermediate", "crl"):
        der = getattr(collateral, part)
        for offset in range(len(der)):
            mutated = Collateral(**{part: changed(der, offset, bytes((der[offset] ^ 1,)))}).completed(collateral)
            with pytest.raises(EvidenceError):  # noqa: PT012 — whichever of them sees it
                verify.verify_links(verify.read_chain(mutated))
                verify.verify_crl(mutated.crl, root, AT)


@settings(deadline=None)
@given(st.integers(0, 900), st.binary(min_size=1, max_size=16))
def test_a_changed_list_is_refused(offset: int, value: bytes) -> None:
    crl, root = minted().collateral.crl, verify.read_chain(minted().collateral).root
    assert crl is not None
    offset %= len(crl)
    mutated = changed(crl, offset, value)[: len(crl)]
    if mutated != crl:
        with pytest.raises(EvidenceError):
            verify.verify_crl(mutated, root, AT)


@settings(deadline=None)
@given(st.integers(0, 2000), st.binary(min_size=1, max_size=16))
def test_a_changed_leaf_is_refused_somewhere(offset: int, value: bytes) -> None:
    leaf = minted().collateral.leaf
    assert leaf is not None
    offset %= len(leaf)
    mutated = changed(leaf, offset, value)[: len(leaf)]
    if mutated == leaf:
        return
    collateral = Collateral(mutated).completed(minted().collateral)
    report = abi.parse(minted().report)
    with pytest.raises(EvidenceError):  # noqa: PT012 — whichever of them sees it
        chain = verify.read_chain(collateral)
        verify.verify_links(chain)
        verify.verify_roles(chain)
        verify.verify_product(report, chain)
        verify.verify_signer_tcb(report, chain)
        verify.verify_chip(report, chain)
        verify.verify_signature(report, chain)


@pytest.mark.parametrize(
    ("family", "model", "product"),
    [
        (0x19, 0x00, "Milan"),
        (0x19, 0x01, "Milan"),
        (0x19, 0x0F, "Milan"),
        (0x19, 0x11, "Genoa"),
        (0x19, 0xA0, "Genoa"),
        (0x1A, 0x02, "Turin"),
        (0x1A, 0x11, "Turin"),
    ],
)
def test_cpuid_names_the_product(family: int, model: int, product: Product) -> None:
    assert product_of_cpuid(family, model) == product


@pytest.mark.parametrize(("family", "model"), [(0x17, 0x31), (0x19, 0x20), (0x19, 0xB0), (0x1A, 0x50), (0x00, 0x00)])
def test_an_unknown_processor_is_refused(family: int, model: int) -> None:
    with pytest.raises(EvidenceError):
        product_of_cpuid(family, model)


def test_a_tcb_has_its_products_layout() -> None:
    assert decode_tcb(TCB["Milan"], "Milan") == Tcb(None, 4, 1, 24, 219)
    assert decode_tcb(TCB["Turin"], "Turin") == Tcb(2, 4, 1, 24, 219)
    assert str(decode_tcb(TCB["Turin"], "Turin")) == "fmc 2, bootloader 4, tee 1, snp 24, microcode 219"
    for raw, product in ((TCB["Turin"], "Genoa"), (TCB["Genoa"], "Turin"), (b"", "Milan")):
        with pytest.raises(EvidenceError):
            decode_tcb(raw, product)


def test_no_component_makes_up_for_another() -> None:
    minimum = Tcb(None, 3, 0, 24, 219)
    assert Tcb(None, 4, 0, 24, 219).at_least(minimum)
    assert not Tcb(None, 4, 0, 25, 218).at_least(minimum)
    assert not Tcb(1, 1, 1, 1, 1).at_least(Tcb(2, 1, 1, 1, 1))
    with pytest.raises(EvidenceError):
        Tcb(1, 4, 0, 24, 219).at_least(minimum)


def table(*entries: tuple[UUID, bytes], pad: int = 0) -> bytes:
    header, body = b"", b""
    start = 24 * (len(entries) + 1)
    for guid, value in entries:
        header += guid.bytes + struct.pack("<II", start + len(body), len(value))
        body += value
    return header + bytes(24) + body + bytes(pad)


ENTRIES = ((VCEK_GUID, b"vcek"), (VLEK_GUID, b"vlek"), (ASK_GUID, b"ask"), (ARK_GUID, b"ark"), (CRL_GUID, b"crl"))


def test_a_table_is_read_by_its_declared_lengths() -> None:
    found = parse_table(table(*ENTRIES, pad=4096))
    assert found == CertificateTable(b"vcek", b"vlek", b"ask", b"ark", b"crl")
    assert found.collateral("VCEK") == Collateral(b"vcek", b"ask", b"ark", b"crl")
    assert found.collateral("VLEK") == Collateral(b"vlek", b"ask", b"ark", b"crl")
    assert found.collateral("NONE").leaf is None
    report, behind = split_extended(minted().report + table(*ENTRIES))
    assert (report, behind) == (minted().report, found)
    # Its order in the written form: 63da758d-e664-...
    assert table(*ENTRIES).startswith(bytes.fromhex("63da758de6644564"))


def test_a_table_may_be_empty_and_may_hold_what_nobody_knows() -> None:
    for data in (b"", table(), table(pad=4096), table((UUID(int=7), b"other")), table((VCEK_GUID, b""))):
        assert parse_table(data) == CertificateTable()


@pytest.mark.parametrize(
    "data",
    [
        table(*ENTRIES)[:-1],
        table(*ENTRIES) + b"\x01",
        table(*ENTRIES, pad=100) + b"\x01",
        table((VCEK_GUID, b"a"), (VCEK_GUID, b"b")),
        VCEK_GUID.bytes + struct.pack("<II", 0, 4) + bytes(24) + b"vcek",
        VCEK_GUID.bytes + struct.pack("<II", 49, 4) + bytes(24) + b"xvcek",
        VCEK_GUID.bytes + struct.pack("<II", 48, 0xFFFFFFFF) + bytes(24) + b"vcek",
        VCEK_GUID.bytes + struct.pack("<II", 24, 4),
        table(*((UUID(int=number), b"x") for number in range(1, 34))),
        bytes((1 << 20) + 1),
        b"\0",
    ],
)
def test_a_table_that_declares_otherwise_is_refused(data: bytes) -> None:
    with pytest.raises(EvidenceError):
        parse_table(data)


def test_collateral_is_completed_from_elsewhere() -> None:
    evidence = Collateral.from_certificates((b"leaf", b"issuer"))
    assert evidence == Collateral(b"leaf", b"issuer")
    other = Collateral(b"other", b"other", b"root", b"crl")
    assert evidence.completed(other) == Collateral(b"leaf", b"issuer", b"root", b"crl")
    with pytest.raises(EvidenceError):
        Collateral.from_certificates((b"1", b"2", b"3", b"4"))
