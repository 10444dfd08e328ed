"""The audit log's signed checkpoint: what the guard writes and every client reads. Pure.

Sources: C2SP tlog-checkpoint and C2SP signed-note (both v1), RFC 6962 section 2.1 for the root hash.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

MAX_NOTE = 8192
MAX_SIGNATURES = 32
MAX_SIZE = (1 << 63) - 1
_ED25519 = 0x01
_KEY_ID_BYTES = 4
SIGNATURE_LINE = re.compile("— (?P<name>[^ +\t\r\n]+) (?P<value>[A-Za-z0-9+/]+={0,2})")
_ORIGIN = re.compile(r"[^\s+]{1,255}")
_SIZE = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)
_EMPTY_ROOT = hashlib.sha256(b"").digest()


class CheckpointError(Exception):
    """The checkpoint doesn't hold. The text is for people and quotes nothing of the note."""


@dataclass(frozen=True)
class Checkpoint:
    """A log's state: its name, how many leaves it has, and the Merkle tree hash over them (32 bytes)."""

    origin: str
    size: int
    root: bytes

    def body(self) -> str:
        """The three lines that are signed."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"

    def is_signed(self, signature: bytes, public_key: bytes) -> bool:
        """Whether `signature` (64 bytes) is that of the key (32 bytes) over the body."""
        try:
            Ed25519PublicKey.from_public_bytes(public_key).verify(signature, self.body().encode())
        except (InvalidSignature, ValueError):
            return False
        return True


def key_id(name: str, public_key: bytes) -> bytes:
    """The 4 bytes by which a signed note names an Ed25519 key (signed-note, "Signatures")."""
    return hashlib.sha256(name.encode() + b"\n" + bytes([_ED25519]) + public_key).digest()[:_KEY_ID_BYTES]


def check_origin(origin: str) -> str:
    """`origin`, if it can be the name of a log. Raises ValueError."""
    if not _ORIGIN.fullmatch(origin) or not origin.isprintable():
        raise ValueError("an origin is a name without spaces and plus signs, of at most 255 characters")
    return origin


def sign_checkpoint(checkpoint: Checkpoint, key: Ed25519PrivateKey) -> str:
    """The note: the body, a blank line, and one signature line under the origin's name."""
    body = checkpoint.body()
    signature = key_id(checkpoint.origin, key.public_key().public_bytes_raw()) + key.sign(body.encode())
    return f"{body}\n— {checkpoint.origin} {base64.b64encode(signature).decode()}\n"


def verify_checkpoint(note: str, public_key: bytes) -> Checkpoint:
    """The checkpoint in `note`, once its signature by `public_key` (32 bytes) in the log's own name holds.

    Signatures of others (witnesses) may stand beside it. Raises CheckpointError.
    """
    return _verified(note, public_key)[0]


def log_signature(note: str, public_key: bytes) -> bytes:
    """The log's own signature (64 bytes) in a note, once it holds. Raises CheckpointError."""
    return _verified(note, public_key)[1]


def _verified(note: str, public_key: bytes) -> tuple[Checkpoint, bytes]:
    if len(note) > MAX_NOTE:
        raise CheckpointError("the checkpoint is too large")
    text, separator, signatures = note.rpartition("\n\n")
    if not separator or not signatures.endswith("\n"):
        raise CheckpointError("the checkpoint isn't a signed note")
    body = text + "\n"
    origin, size, root = _read_body(body)
    lines = signatures[:-1].split("\n")
    if len(lines) > MAX_SIGNATURES:
        raise CheckpointError(f"the checkpoint has more than {MAX_SIGNATURES} signatures")
    wanted = key_id(origin, public_key)
    ours: list[bytes] = []
    for line in lines:
        found = SIGNATURE_LINE.fullmatch(line)
        if found is None:
            raise CheckpointError("a signature line of the checkpoint is malformed")
        value = decode_base64(found["value"], "a signature of the checkpoint")
        if found["name"] == origin and value[:_KEY_ID_BYTES] == wanted:
            ours.append(value[_KEY_ID_BYTES:])
    if len(ours) != 1:
        raise CheckpointError(f"the checkpoint has {len(ours)} signatures by the log's key, where there must be one")
    # Extension lines are signed too, so it is the note's own body that counts.
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(ours[0], body.encode())
    except (InvalidSignature, ValueError) as error:
        raise CheckpointError("the checkpoint's signature doesn't verify under the log's key") from error
    return Checkpoint(origin, size, root), ours[0]


def _read_body(body: str) -> tuple[str, int, bytes]:
    if any(ord(char) < 0x20 and char != "\n" for char in body):
        raise CheckpointError("the checkpoint holds control characters")
    lines = body.split("\n")
    # origin, size, root hash, then extension lines that aren't empty, and the end after the last newline
    if len(lines) < 4 or lines[-1] or not all(lines[:-1]) or len(lines[0]) > 256:
        raise CheckpointError("the checkpoint hasn't the three lines of a tlog-checkpoint")
    if not _SIZE.fullmatch(lines[1]) or int(lines[1]) > MAX_SIZE:
        raise CheckpointError("the checkpoint's size isn't a decimal number")
    root = decode_base64(lines[2], "the checkpoint's root hash")
    size = int(lines[1])
    if len(root) != hashlib.sha256().digest_size or (size == 0) != (root == _EMPTY_ROOT):
        raise CheckpointError("the checkpoint's root hash doesn't fit a tree of its size")
    return lines[0], size, root


def decode_base64(text: str, what: str) -> bytes:
    """The bytes behind canonical base64. Raises CheckpointError, which calls them `what`."""
    try:
        value = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise CheckpointError(f"{what} isn't base64") from error
    if base64.b64encode(value).decode() != text:
        raise CheckpointError(f"{what} isn't canonical base64")
    return value
