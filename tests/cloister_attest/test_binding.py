"""The golden vector of docs/protocol.md, computed here a second time by hand, and what the binding tells apart."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from cloister_attest.binding import gpu_digest, report_data

GOLDEN_FIELDS = (b"spki", bytes(32), b"", b"origin\n1\nroot\n", bytes([1]) * 32)
GOLDEN = (
    "a82b0f98968fbb8b2797dfff12385567ae279192d679bfd2c0760fd4985891dc"
    "290b42627b72a3f890935819bfaa48d5d5e09b2e6eb5662d1d6c3cd7329eef1a"
)


def test_the_golden_vector():
    assert report_data(*GOLDEN_FIELDS).hex() == GOLDEN


def test_the_golden_vector_by_hand():
    content = (
        b"\x00\x00\x00\x17cloister/report-data/v1"
        b"\x00\x00\x00\x04spki" + b"\x00\x00\x00\x20" + bytes(32) + b"\x00\x00\x00\x00"
        b"\x00\x00\x00\x0eorigin\n1\nroot\n" + b"\x00\x00\x00\x20" + b"\x01" * 32
    )
    assert hashlib.sha512(content).hexdigest() == GOLDEN


def test_bytes_cannot_move_from_one_field_to_the_next():
    assert report_data(b"ab", b"c", b"", b"", b"") != report_data(b"a", b"bc", b"", b"", b"")
    assert report_data(b"a", b"", b"b", b"", b"") != report_data(b"a", b"b", b"", b"", b"")


@given(st.lists(st.binary(max_size=8), min_size=5, max_size=5), st.lists(st.binary(max_size=8), min_size=5, max_size=5))
def test_different_fields_have_different_report_data(left, right):
    assert (report_data(*left) == report_data(*right)) == (left == right)


def test_no_gpu_is_not_an_empty_gpu():
    assert gpu_digest(None) == b""
    assert gpu_digest(b"") == hashlib.sha256(b"").digest()
