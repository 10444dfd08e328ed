"""The conversation between a guard and an owner's witness: `POST /api/v1/witness`, over and over.

Each call names the last checkpoint that the witness has signed, brings its signature, and lends the owner's data key
for a while; each answer brings what the log has gained since, with a newer checkpoint. The witness checks all of it
before it signs in its next call. A call may wait for news; without any it only renews the lease.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field

from cloister_data.base import UserName, Wire
from cloister_data.checkpoint import MAX_NOTE, MAX_SIZE
from cloister_data.cosignature import MAX_LINE
from cloister_data.errors import AuthenticationError

WITNESS_LABEL = b"cloister/witness/v1\n"
UNLOCK_LABEL = b"cloister/unlock/v1\n"
UNLOCK_BYTES = 32
MAX_WAIT_SECONDS = 20
MAX_ENTRIES_BYTES = 4 << 20
MAX_ENTRIES = 5000
MAX_EVIDENCE_BYTES = 8 << 20


def unlock_digest(key: bytes) -> str:
    """What terms and log say of the key to an owner's data (32 random bytes): SHA-256 over a label and the key."""
    return hashlib.sha256(UNLOCK_LABEL + key).hexdigest()


class WitnessCall(Wire):
    """`size` entries are covered by the last checkpoint that the witness signed, `cosignature` is its line under it.

    Both are 0 and "" before its first. `unlock` (32 bytes) opens the owner's data; it is None until the witness has
    checked this guard's log up to its end. `wait` is for how many seconds the answer may wait for news.
    """

    owner: UserName
    size: int = Field(ge=0, le=MAX_SIZE)
    cosignature: str = Field(max_length=MAX_LINE)
    unlock: bytes | None = Field(min_length=UNLOCK_BYTES, max_length=UNLOCK_BYTES, repr=False)
    wait: int = Field(ge=0, le=MAX_WAIT_SECONDS)


class SignedCall(Wire):
    """A call's bytes, and the witness's signature (64 bytes) over `message_of` them."""

    call: bytes = Field(max_length=4096, repr=False)
    signature: bytes = Field(min_length=64, max_length=64)


class WitnessAnswer(Wire):
    """Entries from the call's `size` on, a signed checkpoint over all up to the last of them, and the lease.

    `evidence` are the evidence records (JSON) of the guards' starts among the entries, in their order. `lease` is for
    how many seconds from now the data stay open, 0 where they are locked.
    """

    entries: tuple[Annotated[bytes, Field(max_length=1 << 16)], ...] = Field(max_length=MAX_ENTRIES)
    evidence: tuple[Annotated[bytes, Field(max_length=MAX_EVIDENCE_BYTES)], ...] = Field(max_length=MAX_ENTRIES)
    checkpoint: str = Field(max_length=MAX_NOTE)
    lease: float = Field(ge=0)


def message_of(certificate: bytes, call: bytes) -> bytes:
    """What a witness signs: the label, SHA-256 of the guard's TLS certificate (32 bytes), the call's bytes.

    The certificate is the attested one, so no other guard, and nobody in between, can use the call.
    """
    return WITNESS_LABEL + certificate + call


def sign_call(call: WitnessCall, key: Ed25519PrivateKey, certificate: bytes) -> SignedCall:
    """`certificate` is the SHA-256 (32 bytes) of the certificate of the guard that it is for."""
    document = call.to_json()
    return SignedCall(call=document, signature=key.sign(message_of(certificate, document)))


def verify_call(signed: SignedCall, public_key: bytes, certificate: bytes) -> WitnessCall:
    """The call, once its signature holds. Raises AuthenticationError, or pydantic.ValidationError."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signed.signature, message_of(certificate, signed.call))
    except (InvalidSignature, ValueError) as error:
        raise not_the_witness() from error
    return WitnessCall.from_json(signed.call)


def not_the_witness() -> AuthenticationError:
    """The same for a wrong signature and for an owner without a witness."""
    return AuthenticationError(
        "The witness isn't the one that the owner named.",
        why="Its signature doesn't hold under the key in the owner's terms, or it was made for another guard.",
        next_step="Serve with the profile that ran `cloister owner init`.",
    )
