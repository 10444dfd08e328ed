"""The owner's signature under what only the owner may say. The key stays there; the guard has the public half."""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import ValidationError

from cloister_data.errors import PolicyRefusedError
from cloister_data.policy import POLICY_LABEL, Policy, SignedPolicy
from cloister_data.populations import POPULATION_LABEL, PopulationStatement, SignedStatement
from cloister_data.terms import GAP_LABEL, TERMS_LABEL, GapStatement, OwnerTerms, SignedGap, SignedTerms


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    """The 32 raw bytes of the public half."""
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def sign_policy(policy: Policy, key: Ed25519PrivateKey) -> SignedPolicy:
    document = policy.canonical()
    return SignedPolicy(document=document, signature=key.sign(POLICY_LABEL + document))


def verify_policy(signed: SignedPolicy, owner_key: bytes) -> Policy:
    """The policy, once its signature by `owner_key` (32 bytes) holds. Raises PolicyRefusedError."""
    if not _holds(owner_key, signed.signature, POLICY_LABEL + signed.document):
        raise PolicyRefusedError(
            "The policy isn't signed by the dataset's owner.",
            why="Its signature doesn't verify under the key that was pinned at the first upload.",
            next_step="Sign it with the key that uploaded the dataset: cloister policy set.",
        )
    try:
        return signed.policy()
    except ValidationError as error:
        raise PolicyRefusedError("The signed policy can't be read.", why=str(error.errors()[0]["msg"])) from error


def sign_statement(statement: PopulationStatement, key: Ed25519PrivateKey) -> SignedStatement:
    document = statement.canonical()
    return SignedStatement(document=document, signature=key.sign(POPULATION_LABEL + document))


def verify_statement(signed: SignedStatement, owner_key: bytes) -> PopulationStatement:
    """The statement, once its signature by `owner_key` (32 bytes) holds. Raises PolicyRefusedError."""
    if not _holds(owner_key, signed.signature, POPULATION_LABEL + signed.document):
        raise PolicyRefusedError(
            "The statement about the population isn't signed by the owner.",
            why="Its signature doesn't verify under the key that was pinned at the first upload.",
            next_step="Sign it with that key: cloister dataset upload --other-people.",
        )
    try:
        return PopulationStatement.from_json(signed.document)
    except ValidationError as error:
        raise PolicyRefusedError("The signed statement can't be read.", why=str(error.errors()[0]["msg"])) from error


def sign_terms(terms: OwnerTerms, key: Ed25519PrivateKey) -> SignedTerms:
    document = terms.canonical()
    return SignedTerms(document=document, signature=key.sign(TERMS_LABEL + document))


def verify_terms(signed: SignedTerms, owner_key: bytes) -> OwnerTerms:
    """The terms, once their signature by `owner_key` (32 bytes) holds. Raises PolicyRefusedError."""
    if not _holds(owner_key, signed.signature, TERMS_LABEL + signed.document):
        raise PolicyRefusedError(
            "The terms aren't signed by the owner.",
            why="Their signature doesn't verify under the owner's key.",
            next_step="Sign them with the key that speaks for this owner: cloister owner init.",
        )
    try:
        return OwnerTerms.from_json(signed.document)
    except ValidationError as error:
        raise PolicyRefusedError("The signed terms can't be read.", why=str(error.errors()[0]["msg"])) from error


def sign_gap(statement: GapStatement, key: Ed25519PrivateKey) -> SignedGap:
    document = statement.canonical()
    return SignedGap(document=document, signature=key.sign(GAP_LABEL + document))


def verify_gap(signed: SignedGap, owner_key: bytes) -> GapStatement:
    """The statement, once its signature by `owner_key` (32 bytes) holds. Raises PolicyRefusedError."""
    if not _holds(owner_key, signed.signature, GAP_LABEL + signed.document):
        raise PolicyRefusedError(
            "The acceptance of the restore isn't signed by the owner.",
            why="Its signature doesn't verify under the owner's pinned key.",
            next_step="Sign it with that key: cloister owner accept.",
        )
    try:
        return GapStatement.from_json(signed.document)
    except ValidationError as error:
        raise PolicyRefusedError("The signed acceptance can't be read.", why=str(error.errors()[0]["msg"])) from error


def _holds(public_key: bytes, signature: bytes, message: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True
