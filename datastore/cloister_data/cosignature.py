"""A witness's signature under a checkpoint: it has seen this log, and no other that this one doesn't extend. Pure.

Sources: C2SP tlog-cosignature v1 (cosignature/v1, Ed25519) and C2SP signed-note.
"""

from __future__ import annotations

import base64
import hashlib
import struct

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cloister_data.checkpoint import SIGNATURE_LINE, Checkpoint, CheckpointError, decode_base64

_COSIGNATURE = 0x04
_KEY_ID_BYTES = 4
_TIME = struct.Struct(">Q")
SIGNATURE_BYTES = 64
MAX_LINE = 512


def witness_name(owner: str) -> str:
    """What the witness of `owner` calls itself in a note."""
    return f"{owner}/witness"


def cosigner_id(name: str, public_key: bytes) -> bytes:
    """The 4 bytes by which a note names a cosigner's key."""
    return hashlib.sha256(name.encode() + b"\n" + bytes([_COSIGNATURE]) + public_key).digest()[:_KEY_ID_BYTES]


def cosign(checkpoint: Checkpoint, name: str, key: Ed25519PrivateKey, at: int) -> str:
    """The signature line, with its newline, of the witness `name` at Unix second `at`."""
    signature = key.sign(_message(checkpoint, at))
    value = cosigner_id(name, key.public_key().public_bytes_raw()) + _TIME.pack(at) + signature
    return f"— {name} {base64.b64encode(value).decode()}\n"


def verify_cosignature(checkpoint: Checkpoint, line: str, name: str, public_key: bytes) -> int:
    """When (Unix seconds) the witness signed the checkpoint, once its line holds. Raises CheckpointError."""
    found = SIGNATURE_LINE.fullmatch(line.removesuffix("\n")) if len(line) <= MAX_LINE else None
    if found is None or found["name"] != name:
        raise CheckpointError("the witness's signature line is malformed")
    value = decode_base64(found["value"], "the witness's signature")
    head = _KEY_ID_BYTES + _TIME.size
    if len(value) != head + SIGNATURE_BYTES or value[:_KEY_ID_BYTES] != cosigner_id(name, public_key):
        raise CheckpointError("the witness's signature is by another key")
    (at,) = _TIME.unpack(value[_KEY_ID_BYTES:head])
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(value[head:], _message(checkpoint, at))
    except (InvalidSignature, ValueError) as error:
        raise CheckpointError("the witness's signature doesn't verify") from error
    return int(at)


def verify_witnessed(note: str, checkpoint: Checkpoint, name: str, public_key: bytes) -> int:
    """As `verify_cosignature`, for the line of that witness in a note whose checkpoint is verified already."""
    prefix = f"— {name} "
    lines = [line for line in note.rpartition("\n\n")[2].split("\n") if line.startswith(prefix)]
    if len(lines) != 1:
        raise CheckpointError(f"the checkpoint has {len(lines)} signatures by {name}, where there must be one")
    return verify_cosignature(checkpoint, lines[0], name, public_key)


def _message(checkpoint: Checkpoint, at: int) -> bytes:
    return f"cosignature/v1\ntime {at}\n{checkpoint.body()}".encode()
