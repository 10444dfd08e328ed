"""The rules that every message keeps: nothing unknown, nothing unbounded, no NaN, one byte string for one value."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

import cloister_data
from cloister_data.base import DatasetName, Identifier, Label, UserName, Wire
from cloister_data.identity import LoginRequest
from cloister_data.policy import Limit, SignedPolicy
from tests.fakes.messages import every_message


@pytest.mark.parametrize("message", every_message(), ids=lambda message: message.__name__)
def test_every_message_forbids_what_it_does_not_know(message: type[Wire]) -> None:
    assert message.model_config["extra"] == "forbid"
    assert message.model_config["frozen"] is True
    assert message.model_config["allow_inf_nan"] is False


def test_the_walk_over_the_messages_finds_them() -> None:
    # Positive control of the test above: it must not pass because it looked at nothing.
    names = {message.__name__ for message in every_message()}
    assert {"Policy", "Release", "TrainingPlan", "KernelLaunch", "Problem", "Event", "ModelGraph"} <= names
    assert cloister_data.__doc__


def test_unknown_fields_are_refused() -> None:
    assert LoginRequest.from_json(b'{"user": "ada", "password": "x"}').user == "ada"
    with pytest.raises(ValidationError, match="extra_forbidden"):
        LoginRequest.from_json(b'{"user": "ada", "password": "x", "role": "admin"}')


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "-1", "0"])
def test_numbers_that_are_no_epsilon_are_refused(number: str) -> None:
    assert Limit.from_json('{"epsilon": 1.0, "delta": 1e-5}').epsilon == 1.0
    with pytest.raises(ValidationError):
        Limit.from_json(f'{{"epsilon": {number}, "delta": 1e-5}}')


@pytest.mark.parametrize("number", ['"1.0"', "true", "null", "[1.0]", "{}"])
def test_what_is_no_number_is_not_made_one(number: str) -> None:
    assert Limit.from_json('{"epsilon": 1, "delta": 1e-5}').epsilon == 1.0
    with pytest.raises(ValidationError):
        Limit.from_json(f'{{"epsilon": {number}, "delta": 1e-5}}')


def test_messages_are_immutable() -> None:
    limit = Limit(epsilon=1, delta=1e-5)
    with pytest.raises(ValidationError, match="frozen"):
        limit.epsilon = 2  # type: ignore[misc]


@settings(deadline=None)
@given(document=st.binary(max_size=300), signature=st.binary(min_size=64, max_size=64))
def test_bytes_survive_json(document: bytes, signature: bytes) -> None:
    signed = SignedPolicy(document=document, signature=signature)
    assert SignedPolicy.from_json(signed.to_json()) == signed
    # base64url: neither '+' nor '/'.
    assert not set(json.loads(signed.to_json())["document"]) & set("+/")


@settings(deadline=None)
@given(epsilon=st.floats(1e-9, 1000), delta=st.floats(1e-12, 0.01))
def test_canonical_form_is_stable_under_a_round_trip(epsilon: float, delta: float) -> None:
    limit = Limit(epsilon=epsilon, delta=delta)
    again = Limit.from_json(limit.canonical())
    assert again.canonical() == limit.canonical()
    assert again.digest() == limit.digest()
    assert len(limit.digest()) == 64


def test_canonical_form_sorts_keys_and_has_no_spaces() -> None:
    canonical = Limit(epsilon=2, delta=1e-5).canonical()
    assert canonical == b'{"delta":1e-05,"epsilon":2.0,"epsilon_cap":null,"expires":null}'


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (UserName, ["a", "hospital-a", "0.x_y"], ["", "-a", "A", "a/b", "a" * 64, "a\n", "ä", ".."]),
        (DatasetName, ["a/b", "hospital-a/breast-cancer"], ["a", "a/b/c", "/a", "a/", "../b", "a/..", "a/b\n"]),
        (Identifier, ["0" * 32], ["0" * 31, "0" * 33, "G" * 32, "A" * 32, "0" * 32 + "\n"]),
        (Label, ["mean radius", "größe", "a" * 128], ["", "a\nb", "a\x1b[31m", "\x00", "\x9b", "a" * 129]),
    ],
)
def test_names(kind: object, good: list[str], bad: list[str]) -> None:
    adapter: TypeAdapter[str] = TypeAdapter(kind)
    for name in good:
        assert adapter.validate_python(name) == name
    for name in bad:
        with pytest.raises(ValidationError):
            adapter.validate_python(name)
