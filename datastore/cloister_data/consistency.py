"""How a client asks a cloister to show that its audit log extends the one that was seen before."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cloister_data.base import Wire
from cloister_data.checkpoint import MAX_SIZE

MAX_HASHES = 128
"""Two for each level of the largest log."""


class ConsistencyRequest(Wire):
    """`POST /.well-known/consistency`: that the log of `second` entries begins with the one of `first`."""

    first: int = Field(ge=0, le=MAX_SIZE)
    second: int = Field(ge=0, le=MAX_SIZE)


class ConsistencyProof(Wire):
    """RFC 6962 section 2.1.2, 32 bytes each; none where there is nothing to prove, or it can't be."""

    hashes: tuple[Annotated[bytes, Field(min_length=32, max_length=32)], ...] = Field(max_length=MAX_HASHES)
