"""The base of every message, and the bounded strings that messages are made of."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, StringConstraints


class Wire(BaseModel):
    """A message between two processes: immutable, no unknown fields, no NaN or infinity, bounded sizes.

    Bytes are base64url. A message is read with `from_json` alone: JSON that was parsed by something else may have lost
    what was wrong with it.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, ser_json_bytes="base64", val_json_bytes="base64"
    )

    def to_json(self) -> bytes:
        return self.model_dump_json().encode()

    def canonical(self) -> bytes:
        """One byte string for one value: JSON with sorted keys and no spaces. What digests and signatures cover."""
        return canonical_json(self.model_dump(mode="json"))

    def digest(self) -> str:
        """SHA-256 of `canonical()`, 64 hex digits."""
        return hashlib.sha256(self.canonical()).hexdigest()

    @classmethod
    def from_json(cls, data: bytes | str) -> Self:
        """Parse and validate strictly: no text for a number. Raises pydantic.ValidationError."""
        return cls.model_validate_json(data, strict=True)


def canonical_json(value: dict[str, Any]) -> bytes:
    """JSON with sorted keys and no spaces, in ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


Text = Annotated[str, StringConstraints(max_length=4096)]
"""Free text for people."""

Label = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]
"""A column's or a category's name: one line, no control characters."""

UserName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]

DatasetName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}/[a-z0-9][a-z0-9._-]{0,62}$")]
"""`owner/name`; the first part is the owner's user name."""

Identifier = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
"""16 random bytes in hex: jobs, releases, charges, kernels."""

RequestId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
"""Chosen by the client; the same id with the same request never charges twice."""

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256 in hex."""

UnixSeconds = int
