"""Files encrypted in chunks, so that a change, a cut, a swap or a repeat of any chunk is detected.

Layout: magic (16 bytes), file id (16 random bytes), then chunks of 1 MiB plaintext (the last one is shorter, maybe
empty), each followed by its 16-byte tag of AES-256-GCM. The file's key is HKDF-SHA256(data key, salt = file id), so
one data key may serve several files. Chunk i has the nonce i (96 bits, big-endian) and the associated data magic +
file id + i (u64) + last (u8), as in the STREAM construction (Hoang, Reyhanitabar, Rogaway, Vizar 2015).
"""

from __future__ import annotations

import io
import os
import secrets
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister_data.errors import StorageError
from cloister_data.files import replace_whole

MAGIC = b"cloister/file/1\n"
CHUNK = 1 << 20
TAG = 16
_FILE_ID = 16
_HEADER = len(MAGIC) + _FILE_ID
_POSITION = struct.Struct(">QB")


def _cipher(key: bytes, file_id: bytes) -> AESGCM:
    return AESGCM(HKDF(algorithm=SHA256(), length=32, salt=file_id, info=MAGIC).derive(key))


def _nonce(index: int) -> bytes:
    return index.to_bytes(12, "big")


def _associated(file_id: bytes, index: int, *, last: bool) -> bytes:
    return MAGIC + file_id + _POSITION.pack(index, last)


def encrypt_to(file: BinaryIO, data: bytes | memoryview, key: bytes) -> None:
    """Write `data`, encrypted under `key` (32 bytes), to `file`. Raises OSError."""
    encrypt_stream(io.BytesIO(data), file, key)


def encrypt_stream(source: BinaryIO, file: BinaryIO, key: bytes) -> None:
    """Write what `source` gives until its end, encrypted under `key` (32 bytes), to `file`. Raises OSError."""
    file_id = secrets.token_bytes(_FILE_ID)
    cipher = _cipher(key, file_id)
    file.write(MAGIC + file_id)
    index, chunk = 0, _read_whole(source, CHUNK)
    while True:
        following = _read_whole(source, CHUNK)
        last = not following
        file.write(cipher.encrypt(_nonce(index), chunk, _associated(file_id, index, last=last)))
        if last:
            return
        index, chunk = index + 1, following


def decrypt(data: bytes | memoryview, key: bytes) -> bytes:
    """The plaintext of a whole encrypted file. Raises StorageError where one bit differs from what was written."""
    plain = io.BytesIO()
    decrypt_stream(io.BytesIO(data), plain, key)
    return plain.getvalue()


def decrypt_stream(file: BinaryIO, target: BinaryIO, key: bytes) -> None:
    """Write the plaintext of an encrypted file to `target`, chunk by chunk, each one only after its tag was checked.

    A file that was cut at a chunk's end is noticed at that end: what came before it is in `target` by then. Raises
    StorageError where one bit differs from what was written, OSError where `target` fails.
    """
    header = _read_whole(file, _HEADER)
    if len(header) < _HEADER or header[: len(MAGIC)] != MAGIC:
        raise _damaged()
    file_id = header[len(MAGIC) :]
    cipher = _cipher(key, file_id)
    index, sealed = 0, _read_whole(file, CHUNK + TAG)
    while True:
        following = _read_whole(file, CHUNK + TAG)
        last = not following
        try:
            plain = cipher.decrypt(_nonce(index), sealed, _associated(file_id, index, last=last))
        except (InvalidTag, ValueError) as error:
            raise _damaged() from error
        target.write(plain)
        if last:
            return
        index, sealed = index + 1, following


def _read_whole(source: BinaryIO, size: int) -> bytes:
    """Exactly `size` bytes, or what there is until the end: a pipe gives less at a time."""
    pieces, missing = [], size
    while missing and (piece := source.read(missing)):
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)


def write_file(path: Path, data: bytes | memoryview, key: bytes) -> None:
    """Encrypt `data` into a new file at `path` as `write_durably` does. Raises StorageError."""
    write_durably(path, lambda file: encrypt_to(file, data, key))


def write_durably(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """A new file at `path`, mode 0600, durable once this returns; nothing is left at `path` on failure.

    Raises StorageError, for example with no space left.
    """
    try:
        replace_whole(path, write)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise StorageError(
            "The cloister couldn't store a file.",
            why=f"{error.strerror or 'The disk refused'}.",
            next_step="Nothing was kept. Make room on the disk and try again.",
        ) from error


def read_file(path: Path, key: bytes) -> bytes:
    """The plaintext of the file at `path`. Raises StorageError where it is missing, unreadable or altered."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StorageError("A stored file can't be read.", why=f"{error.strerror}.") from error
    return decrypt(data, key)


def _damaged() -> StorageError:
    return StorageError(
        "A stored file isn't what was written.",
        why="It was altered or cut short, or it belongs to something else.",
        next_step="Restore it from a backup.",
    )
