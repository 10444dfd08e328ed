"""What an owner says of a population is one sentence about all of their others, and counts with their signature."""

import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from cloister_data.errors import InvalidRequestError, PolicyRefusedError
from cloister_data.owner import public_bytes, sign_statement, verify_statement
from cloister_data.policy import POLICY_LABEL
from cloister_data.populations import (
    MAX_OTHERS,
    POPULATION_LABEL,
    PopulationStatement,
    SignedStatement,
    statement_about,
)

STATEMENT = statement_about("hospital-a/staff", ["hospital-a/visitors", "hospital-a/patients"])


@pytest.fixture
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def test_a_signed_statement_is_read_back(key: Ed25519PrivateKey) -> None:
    signed = SignedStatement.from_json(sign_statement(STATEMENT, key).to_json())
    assert verify_statement(signed, public_bytes(key)) == STATEMENT
    assert STATEMENT.disjoint_from == ("hospital-a/patients", "hospital-a/visitors")


def test_another_key_another_label_and_another_document_are_refused(key: Ed25519PrivateKey) -> None:
    good = sign_statement(STATEMENT, key)
    other = good.document.replace(b"visitors", b"visitorz")
    for forged in (
        sign_statement(STATEMENT, Ed25519PrivateKey.generate()),
        SignedStatement(document=good.document, signature=key.sign(POLICY_LABEL + good.document)),
        SignedStatement(document=good.document, signature=key.sign(good.document)),
        SignedStatement(document=other, signature=good.signature),
    ):
        with pytest.raises(PolicyRefusedError, match="isn't signed by the owner"):
            verify_statement(forged, public_bytes(key))
    # The control: they are as good as any where the signature is the key's.
    signed = SignedStatement(document=other, signature=key.sign(POPULATION_LABEL + other))
    assert verify_statement(signed, public_bytes(key)) != STATEMENT


@pytest.mark.parametrize(
    "changed",
    [
        {"disjoint_from": []},
        {"disjoint_from": ["hospital-a/visitors", "hospital-a/patients"]},
        {"disjoint_from": ["hospital-a/patients", "hospital-a/patients"]},
        {"disjoint_from": ["hospital-a/patients", "hospital-a/staff"]},
        {"disjoint_from": [f"hospital-a/p{number:04}" for number in range(MAX_OTHERS + 1)]},
        {"population": "Hospital A"},
        {"says": "Some in this population are in the others."},
        {"format": 2},
        {"more": True},
    ],
    ids=lambda changed: f"{next(iter(changed))}-{str(changed)[:40]}",
)
def test_nothing_else_can_be_stated(changed: dict[str, object], key: Ed25519PrivateKey) -> None:
    document = json.loads(STATEMENT.canonical())
    PopulationStatement.from_json(json.dumps(document))
    wrong = json.dumps(document | changed).encode()
    with pytest.raises(ValidationError):
        PopulationStatement.from_json(wrong)
    signed = SignedStatement(document=wrong, signature=key.sign(POPULATION_LABEL + wrong))
    with pytest.raises(PolicyRefusedError, match="can't be read"):
        verify_statement(signed, public_bytes(key))


def test_the_longest_statement_fits_its_bounds(key: Ed25519PrivateKey) -> None:
    others = [f"{'a' * 63}/{number:063}" for number in range(MAX_OTHERS)]
    longest = statement_about(f"{'a' * 63}/{'b' * 63}", others)
    assert verify_statement(sign_statement(longest, key), public_bytes(key)) == longest
    with pytest.raises(InvalidRequestError, match="one population too many"):
        statement_about(longest.population, [*others, "a/b"])
