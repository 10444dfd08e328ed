"""What an owner signs about the whole cloister: who witnesses for them, and that a restore is accepted. Pure."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cloister_data.base import Digest, UserName, Wire
from cloister_data.checkpoint import MAX_SIZE

TERMS_LABEL = b"cloister/owner-terms/v1\n"
GAP_LABEL = b"cloister/restore/v1\n"
"""What the owner signs is such a label followed by the document's bytes."""

PublicKey = Annotated[bytes, Field(min_length=32, max_length=32)]
"""Ed25519, 32 raw bytes."""


class OwnerTerms(Wire):
    """The owner's standing orders to one cloister; a later version replaces the earlier one.

    `origin` is the cloister's log. `witness` is the key of the owner's witness, without which the owner's data are
    locked and no answer from them leaves. Its key may change; once there is a witness there is always one. `unlock` is
    the digest of the key to the data (`cloister_data.witness.unlock_digest`), which never changes.
    """

    format: Literal[1] = 1
    origin: str = Field(max_length=255)
    owner: UserName
    version: int = Field(ge=1, le=1_000_000)
    witness: PublicKey
    unlock: Digest


class SignedTerms(Wire):
    """The terms' canonical bytes and the owner's Ed25519 signature (64 bytes) over `TERMS_LABEL + document`."""

    document: bytes = Field(max_length=4096)
    signature: bytes = Field(min_length=64, max_length=64)


class TermsRequest(Wire):
    """`PUT /api/v1/owner`: `owner_key` is pinned where this owner has none yet."""

    owner_key: PublicKey
    terms: SignedTerms


class Gap(Wire):
    """A restore: the database held `first` entries, and those up to `end` were put back from a copy of the log.

    `restored` is the index of the entry that says so. Spending in the gap is restored exactly; what was given out in it
    (answers, models, requests for more budget) is gone.
    """

    restored: int = Field(ge=0, le=MAX_SIZE)
    first: int = Field(ge=0, le=MAX_SIZE)
    end: int = Field(ge=0, le=MAX_SIZE)


class GapStatement(Wire):
    """What an owner signs so that their data can be asked again after a restore."""

    format: Literal[1] = 1
    origin: str = Field(max_length=255)
    owner: UserName
    gap: Gap
    says: Literal["I accept this restore, and the balances that the log gives."] = (
        "I accept this restore, and the balances that the log gives."
    )


class SignedGap(Wire):
    """The statement's canonical bytes and the owner's Ed25519 signature (64 bytes) over `GAP_LABEL + document`."""

    document: bytes = Field(max_length=4096)
    signature: bytes = Field(min_length=64, max_length=64)


class OwnerView(Wire):
    """`GET /api/v1/owner`: what the cloister knows of the owner who asks.

    `owner_key` is None before anything is pinned, `terms` None without a witness. `cosigned` is the size of the log
    that the witness last signed for to this guard, `unlocked` whether the data can be asked now; `gap` a restore that
    waits for the owner's signature.
    """

    owner: UserName
    origin: str = Field(max_length=255)
    owner_key: PublicKey | None
    terms: SignedTerms | None
    cosigned: int = Field(ge=0, le=MAX_SIZE)
    unlocked: bool
    gap: Gap | None
