"""A witness's cosignature, against the specification's words and against whoever changes a byte."""

from __future__ import annotations

import base64
import hashlib
import struct

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from cloister_data.checkpoint import Checkpoint, CheckpointError, sign_checkpoint, verify_checkpoint
from cloister_data.cosignature import cosign, verify_cosignature, verify_witnessed, witness_name

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw()
NAME = witness_name("clinic")
SEEN = Checkpoint("cloister/ward", 7, hashlib.sha256(b"root").digest())


def test_the_line_is_what_the_specification_says() -> None:
    """C2SP tlog-cosignature v1, written out by hand."""
    root = base64.b64encode(SEEN.root).decode()
    message = f"cosignature/v1\ntime 1700000000\ncloister/ward\n7\n{root}\n".encode()
    key_id = hashlib.sha256(b"clinic/witness\n\x04" + PUBLIC).digest()[:4]
    value = key_id + struct.pack(">Q", 1_700_000_000) + KEY.sign(message)
    expected = f"\u2014 clinic/witness {base64.b64encode(value).decode()}\n"
    assert cosign(SEEN, NAME, KEY, 1_700_000_000) == expected
    assert verify_cosignature(SEEN, expected, NAME, PUBLIC) == 1_700_000_000


def test_it_stands_in_a_signed_note_beside_the_log_s_own() -> None:
    log = Ed25519PrivateKey.generate()
    note = sign_checkpoint(SEEN, log) + cosign(SEEN, NAME, KEY, 1)
    assert verify_checkpoint(note, log.public_key().public_bytes_raw()) == SEEN
    assert verify_witnessed(note, SEEN, NAME, PUBLIC) == 1
    for wrong in (sign_checkpoint(SEEN, log), note + cosign(SEEN, NAME, KEY, 2)):
        with pytest.raises(CheckpointError):
            verify_witnessed(wrong, SEEN, NAME, PUBLIC)


def test_another_tree_another_name_and_another_key_are_refused() -> None:
    line = cosign(SEEN, NAME, KEY, 5)
    other = Ed25519PrivateKey.generate()
    for seen, name, key in (
        (Checkpoint("cloister/other", SEEN.size, SEEN.root), NAME, PUBLIC),
        (Checkpoint(SEEN.origin, 8, SEEN.root), NAME, PUBLIC),
        (Checkpoint(SEEN.origin, SEEN.size, bytes(32)), NAME, PUBLIC),
        (SEEN, witness_name("other"), PUBLIC),
        (SEEN, NAME, other.public_key().public_bytes_raw()),
    ):
        with pytest.raises(CheckpointError):
            verify_cosignature(seen, line, name, key)
    with pytest.raises(CheckpointError):
        verify_cosignature(SEEN, cosign(SEEN, NAME, other, 5), NAME, PUBLIC)


@given(st.data())
def test_no_changed_line_verifies(data: st.DataObject) -> None:
    line = cosign(SEEN, NAME, KEY, 5)
    place = data.draw(st.integers(0, len(line) - 2))
    char = data.draw(st.characters(exclude_characters=line[place], exclude_categories=("Cs",)))
    with pytest.raises(CheckpointError):
        verify_cosignature(SEEN, line[:place] + char + line[place + 1 :], NAME, PUBLIC)
