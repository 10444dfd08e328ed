"""The owner's signature under what only the owner may say. The key stays there; the guard has the public half."""

from __future__ import annotations

from typing import Protocol, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import ValidationError

from cloister_data.base import Wire
from cloister_data.errors import PolicyRefusedError
from cloister_data.policy import POLICY_LABEL, Policy, SignedPolicy
from cloister_data.populations import POPULATION_LABEL, PopulationStatement, SignedStatement
from cloister_data.terms import GAP_LABEL, TERMS_LABEL, GapStatement, OwnerTerms, SignedGap, SignedTerms

W = TypeVar("W", bound=Wire)


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    """The 32 raw bytes of the public half."""
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def sign_policy(policy: Policy, key: Ed25519PrivateKey) -> SignedPolicy:
    document = policy.canonical()
    return SignedPolicy(document=document, signature=key.sign(POLICY_LABEL + document))


def verify_policy(signed: SignedPolicy, owner_key: bytes) -> Policy:
    """The policy, once its signature by `owner_key` (32 bytes) holds. Raises PolicyRefusedError."""
    return _verified(signed, owner_key, POLICY_LABEL, Policy, "policy", "cloister policy set")


def sign_statement(statement: PopulationStatement, key: Ed25519PrivateKey) -> SignedStatement:
    document = statement.canonical()
    return SignedStatement(document=document, signature=key.sign(POPULATION_LABEL + document))


def verify_statement(signed: SignedStatement, owner_key: bytes) -> PopulationStatement:
    """The statement, once its signature by `owner_key` (32 bytes) holds. Raises PolicyRefusedError."""
    what, command = "statement about the population", "cloister dataset upload --other-people"
    return _verified(signed, owner_key, POPULATION_LABEL, PopulationStatement, what, command)


def sign_terms(terms: OwnerTerms, key: Ed25519PrivateKey) -> SignedTerms:
    document = terms.canonical()
    return SignedTerms(document=document, signature=key.sign(TERMS_LABEL + document))


def verify_terms(signed: SignedTerms, owner_key: bytes) -> OwnerTerms:
    """The terms, once their signature by `owner_key` (32 bytes) holds. Raises PolicyRefusedError."""
    return _verified(signed, owner_key, TERMS_LABEL, OwnerTerms, "document of the terms", "cloister owner init")


def sign_gap(statement: GapStatement, key: Ed25519PrivateKey) -> SignedGap:
    document = statement.canonical()
    return SignedGap(document=document, signature=key.sign(GAP_LABEL + document))


def verify_gap(signed: SignedGap, owner_key: bytes) -> GapStatement:
    """The statement, once its signature by `owner_key` (32 bytes) holds. Raises PolicyRefusedError."""
    return _verified(signed, owner_key, GAP_LABEL, GapStatement, "acceptance of the restore", "cloister owner accept")


class _Signed(Protocol):
    @property
    def document(self) -> bytes: ...
    @property
    def signature(self) -> bytes: ...


def _verified(signed: _Signed, owner_key: bytes, label: bytes, kind: type[W], what: str, command: str) -> W:
    try:
        Ed25519PublicKey.from_public_bytes(owner_key).verify(signed.signature, label + signed.document)
    except (InvalidSignature, ValueError) as error:
        raise PolicyRefusedError(
            f"The {what} isn't signed by the owner.",
            why="Its signature doesn't verify under the owner's key, which was pinned when the cloister first saw it.",
            next_step=f"Sign it with that key: {command}.",
        ) from error
    try:
        return kind.from_json(signed.document)
    except ValidationError as error:
        raise PolicyRefusedError(f"The signed {what} can't be read.", why=str(error.errors()[0]["msg"])) from error
