"""The refs that leaves hold instead of names. Pure."""

from __future__ import annotations

import hashlib

SALT_BYTES = 16
_LABEL = b"cloister/name/v1\n"


def ref_of(kind: str, name: str, salt: bytes) -> str:
    """SHA-256(label || salt || kind || newline || name), 64 hex digits."""
    return hashlib.sha256(_LABEL + salt + kind.encode() + b"\n" + name.encode()).hexdigest()
