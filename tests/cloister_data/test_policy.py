"""Policies say everything by intention, and count only with the owner's signature."""

import hashlib
import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from cloister_data.errors import PolicyRefusedError
from cloister_data.owner import public_bytes, sign_policy, verify_policy
from cloister_data.policy import POLICY_LABEL, Limit, Policy, SignedPolicy

POLICY = Policy(
    dataset="hospital-a/breast-cancer",
    version=1,
    population_limit=Limit(epsilon=8, delta=1e-5),
    users={"scientist": Limit(epsilon=4, delta=1e-5)},
    groups={},
    suspended=False,
    suspended_users=(),
    release_delta=1e-5,
    epsilon_cap=4,
    operations=("count", "mean", "train"),
    platforms=("simulated",),
    minimum_sandbox="user",
    transfers="allowed",
    expires=None,
)


@pytest.fixture
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def test_a_signed_policy_is_read_back(key: Ed25519PrivateKey) -> None:
    signed = SignedPolicy.from_json(sign_policy(POLICY, key).to_json())
    assert verify_policy(signed, public_bytes(key)) == POLICY


@pytest.mark.parametrize("field", sorted(set(Policy.model_fields) - {"format"}))
def test_no_field_has_a_default_that_admits_anything(field: str) -> None:
    document = json.loads(POLICY.canonical())
    Policy.from_json(json.dumps(document))
    del document[field]
    with pytest.raises(ValidationError, match="Field required"):
        Policy.from_json(json.dumps(document))


def test_another_key_is_refused(key: Ed25519PrivateKey) -> None:
    signed = sign_policy(POLICY, Ed25519PrivateKey.generate())
    with pytest.raises(PolicyRefusedError, match="isn't signed by the owner"):
        verify_policy(signed, public_bytes(key))


def test_a_raised_limit_is_refused(key: Ed25519PrivateKey) -> None:
    signed = sign_policy(POLICY, key)
    raised = signed.document.replace(b'"epsilon_cap":4.0', b'"epsilon_cap":9.0')
    assert raised != signed.document
    with pytest.raises(PolicyRefusedError):
        verify_policy(SignedPolicy(document=raised, signature=signed.signature), public_bytes(key))


def test_a_signature_without_the_label_is_refused(key: Ed25519PrivateKey) -> None:
    document = POLICY.canonical()
    with pytest.raises(PolicyRefusedError):
        verify_policy(SignedPolicy(document=document, signature=key.sign(document)), public_bytes(key))


def test_every_bit_of_the_signature_counts(key: Ed25519PrivateKey) -> None:
    signed = sign_policy(POLICY, key)
    for place in range(0, 64, 7):
        broken = bytearray(signed.signature)
        broken[place] ^= 1
        with pytest.raises(PolicyRefusedError):
            verify_policy(SignedPolicy(document=signed.document, signature=bytes(broken)), public_bytes(key))


def test_a_signed_document_that_is_no_policy_is_refused(key: Ed25519PrivateKey) -> None:
    document = b'{"format": 2}'
    signed = SignedPolicy(document=document, signature=key.sign(POLICY_LABEL + document))
    with pytest.raises(PolicyRefusedError, match="can't be read"):
        verify_policy(signed, public_bytes(key))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epsilon_cap", 0),
        ("epsilon_cap", -1),
        ("epsilon_cap", 1001),
        ("release_delta", 0),
        ("release_delta", 0.5),
        ("population_limit", {"epsilon": 8, "delta": 0}),
        ("users", {"Ada": {"epsilon": 1, "delta": 1e-5}}),
        ("users", {"ada": {"epsilon": 0, "delta": 1e-5}}),
        ("users", {"ada": {"epsilon": 1, "delta": 1e-5, "epsilon_cap": 0}}),
        ("groups", {"team": {"limit": {"epsilon": 1, "delta": 1e-5}, "members": []}}),
        ("suspended", "no"),
        ("suspended_users", ["Ada"]),
        ("operations", ["download"]),
        ("platforms", ["any"]),
        ("minimum_sandbox", "any"),
        ("transfers", "any"),
        ("format", 1),
        ("format", 3),
        ("version", 0),
        ("dataset", "breast-cancer"),
        ("expires", "tomorrow"),
    ],
)
def test_values_that_are_refused(field: str, value: object) -> None:
    document = json.loads(POLICY.canonical()) | {field: value}
    with pytest.raises(ValidationError):
        Policy.from_json(json.dumps(document))


def test_a_policy_of_format_1_is_what_it_was_and_forbids_transfers(key: Ed25519PrivateKey) -> None:
    document = json.loads(POLICY.canonical()) | {"format": 1}
    del document["transfers"]
    written = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    signed = SignedPolicy(document=written, signature=key.sign(POLICY_LABEL + written))
    policy = verify_policy(signed, public_bytes(key))
    assert policy.transfers == "forbidden"
    assert policy.canonical() == written
    assert policy.digest() == hashlib.sha256(written).hexdigest()
    assert Policy.model_validate(policy.model_dump()) == policy
    # The control: format 2 says it, and its bytes hold it.
    assert (POLICY.format, POLICY.transfers, b'"transfers":"allowed"' in POLICY.canonical()) == (2, "allowed", True)
