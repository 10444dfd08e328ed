"""The quote's form, one rule at a time: what breaks it is refused and named."""

import pytest

from cloister_attest.outcome import EvidenceError
from cloister_attest.tdx import abi
from tests.cloister_attest.tdx import minting as m

QUOTE = m.quote()
DATA = abi.HEADER_BYTES + 6 + abi.TD_15_BYTES
"""Where the length of the signature data stands in QUOTE."""
TYPE_6 = DATA + 4 + abi.SIGNATURE_BYTES + abi.KEY_BYTES
AUTH_SIZE = TYPE_6 + 6 + abi.QE_REPORT_BYTES + abi.SIGNATURE_BYTES
TYPE_5 = AUTH_SIZE + 2 + 32


def put(offset: int, value: bytes) -> bytes:
    return QUOTE[:offset] + value + QUOTE[offset + len(value) :]


def u32_at(offset: int) -> int:
    return int.from_bytes(QUOTE[offset : offset + 4], "little")


@pytest.mark.parametrize(
    ("quote", "reason"),
    [
        (put(abi.HEADER_VERSION, b"\x03\0"), "version 3"),
        (put(abi.HEADER_ATTESTATION_KEY_TYPE, b"\x03\0"), "attestation key has type 3"),
        (put(abi.HEADER_TEE_TYPE, bytes(4)), "TEE of type 0x0"),
        (put(abi.HEADER_QE_VENDOR_ID, bytes(16)), "isn't Intel"),
        (put(abi.HEADER_BYTES, b"\x01\0"), "body of type 1"),
        (put(abi.HEADER_BYTES, b"\x02\0"), "body of type 2 with 648"),
        (put(DATA, m.u32(u32_at(DATA) + 1)), "ends within its signature data"),
        (put(DATA, m.u32(u32_at(DATA) - 1))[:-1], "ends within its QE certification data"),
        (put(DATA, m.u32(10)) + bytes(9), "follow the quote's declared length"),
        (put(TYPE_6, m.u16(5)), "QE certification data has type 5"),
        (put(TYPE_6 + 2, m.u32(u32_at(TYPE_6 + 2) - 1)), "signature data has 1 bytes more than it declares"),
        (put(AUTH_SIZE, m.u16(0xFFFF)), "ends within its auth data"),
        (put(TYPE_5, m.u16(1)), "PCK certification data has type 1"),
        (put(TYPE_5 + 2, m.u32(u32_at(TYPE_5 + 2) - 1)), "QE certification data has 1 bytes more than it declares"),
        (QUOTE + bytes(70) + b"\1", "follow the quote's declared length"),
        (QUOTE + bytes(abi.MAX_QUOTE), "more than 65536"),
    ],
)
def test_refused(quote, reason):
    with pytest.raises(EvidenceError, match=reason):
        abi.parse_quote(quote)


@pytest.mark.parametrize("size", range(0, len(QUOTE), 97))
def test_cut_short(size):
    with pytest.raises(EvidenceError):
        abi.parse_quote(QUOTE[:size])


def test_bodies_of_another_length():
    for size in (0, 583, 585, 647, 649):
        with pytest.raises(EvidenceError, match="TD report has"):
            abi.parse_td_report(bytes(size))
    for size in (0, 383, 385):
        with pytest.raises(EvidenceError, match="QE report has"):
            abi.parse_qe_report(bytes(size))


def test_zeros_may_follow():
    assert abi.parse_quote(QUOTE + bytes(3000)) == abi.parse_quote(QUOTE)
