"""Encrypted files: every change to the bytes is noticed."""

import contextlib
import errno
import io
import os
import secrets
from pathlib import Path

import pytest

from cloister_data import crypt
from cloister_data.crypt import CHUNK, MAGIC, TAG, decrypt, encrypt_to, read_file, write_file
from cloister_data.errors import StorageError

KEY = bytes(range(32))
HEADER = len(MAGIC) + 16
STEP = CHUNK + TAG


def sealed(data: bytes, key: bytes = KEY) -> bytes:
    file = io.BytesIO()
    encrypt_to(file, data, key)
    return file.getvalue()


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
def test_round_trip(size: int) -> None:
    data = secrets.token_bytes(size)
    assert decrypt(sealed(data), KEY) == data


def test_ciphertext_holds_no_plaintext_and_never_repeats() -> None:
    data = b"a patient's name" * 100
    first, second = sealed(data), sealed(data)
    assert b"patient" not in first
    assert first[HEADER:] != second[HEADER:]


def test_every_kind_of_tampering_is_noticed() -> None:
    whole = sealed(bytes(2 * CHUNK + 10))
    assert len(decrypt(whole, KEY)) == 2 * CHUNK + 10
    chunks = [whole[HEADER + index * STEP : HEADER + (index + 1) * STEP] for index in range(3)]
    head = whole[:HEADER]
    other = sealed(bytes(2 * CHUNK + 10))
    damaged = {
        "cut at a chunk": head + chunks[0] + chunks[1],
        "cut inside a chunk": whole[:-1],
        "only a header": head,
        "nothing": b"",
        "reordered": head + chunks[1] + chunks[0] + chunks[2],
        "repeated": head + chunks[0] + chunks[0] + chunks[2],
        "dropped": head + chunks[0] + chunks[2],
        "appended": whole + chunks[2],
        "a byte added": whole + b"\0",
        "a chunk of another file": head + other[HEADER : HEADER + STEP] + chunks[1] + chunks[2],
        "another file's id": other[:HEADER] + whole[HEADER:],
        "another magic": b"x" + whole[1:],
    }
    for position in (len(MAGIC), HEADER, HEADER + STEP + 5, len(whole) - 1):
        damaged[f"bit at {position}"] = whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :]
    unnoticed = []
    for name, data in damaged.items():
        with contextlib.suppress(StorageError):
            decrypt(data, KEY)
            unnoticed.append(name)
    assert unnoticed == []
    with pytest.raises(StorageError):
        decrypt(whole, bytes(32))


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(crypt.os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        write_file(tmp_path / "data", b"rows", KEY)
    assert list(tmp_path.iterdir()) == []


def test_files_are_private_and_missing_ones_are_an_error(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        write_file(tmp_path / "data", b"rows", KEY)
    finally:
        os.umask(old)
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o600
    assert read_file(tmp_path / "data", KEY) == b"rows"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    with pytest.raises(StorageError):
        read_file(tmp_path / "none", KEY)
