"""Trust files: everything is said, or the file is refused."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cloister_attest.policy import AttestationPolicy, load_policy
from cloister_attest.simulated.hardware import SimulatedHardware
from cloister_data.errors import ConfigurationError
from tests.cloister_attest.policies import SNP_POLICY, TDX_POLICY

POLICY = SimulatedHardware.generate(bytes(48)).trust()
DOCUMENT = POLICY.model_dump(mode="json")


KEYS = [*DOCUMENT, *(f"hardware.{key}" for key in DOCUMENT["hardware"])]


def toml(**changes) -> str:
    """The trust file with other values of keys, wherever they stand."""
    hardware = {**DOCUMENT["hardware"], **{key: value for key, value in changes.items() if key in DOCUMENT["hardware"]}}
    top = {**DOCUMENT, **{key: value for key, value in changes.items() if key not in hardware}}
    del top["hardware"]
    lines = [f"{key} = {json.dumps(value)}" for key, value in top.items()]
    return "\n".join([*lines, "", "[hardware]", *(f"{key} = {json.dumps(value)}" for key, value in hardware.items())])


def test_a_policy_survives_its_file(tmp_path):
    path = tmp_path / "trust.toml"
    path.write_text(POLICY.to_toml())
    assert load_policy(path) == POLICY
    assert AttestationPolicy.from_toml(toml()) == POLICY


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=256))
@example('cloister/\N{HOSPITAL}\x7f\x00"\\\u2028')
def test_a_name_of_any_characters_survives_the_file(name):
    named = POLICY.model_copy(update={"log_origin": name})
    assert AttestationPolicy.from_toml(named.to_toml()) == named


@pytest.mark.parametrize("key", [key for key in KEYS if key != "hardware"])
def test_no_key_may_be_left_out(key):
    name = key.removeprefix("hardware.")
    lines = [line for line in toml().splitlines() if not line.startswith(f"{name} ")]
    with pytest.raises(ConfigurationError, match=f"wrong at '{key}'. (The key is missing|It must be)"):
        AttestationPolicy.from_toml("\n".join(lines))


@pytest.mark.parametrize("key", ["measurement", "Debug", "verify", "sev"])
def test_no_other_key_may_be_there(key):
    with pytest.raises(ConfigurationError, match=f"wrong at 'hardware.{key}'. There is no such key"):
        AttestationPolicy.from_toml(f"{toml()}\n{key} = true")
    with pytest.raises(ConfigurationError, match=f"wrong at '{key}'. There is no such key"):
        AttestationPolicy.from_toml(f"{key} = true\n{toml()}")


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 1},
        {"format": 3},
        {"format": True},
        {"format": "2"},
        {"platform": "any"},
        {"platform": "sgx"},
        {"roots": "any"},
        {"roots": []},
        {"roots": "vendor"},
        {"roots": ["00"]},
        {"measurements": []},
        {"measurements": "none"},
        {"measurements": "00" * 48},
        {"measurements": ["00" * 32]},
        {"measurements": ["any"]},
        {"measurements": ["AB" * 48]},
        {"debug": False},
        {"debug": "allowed"},
        {"minimum_tcb": -1},
        {"minimum_tcb": "3"},
        {"minimum_tcb": 1.5},
        {"minimum_tcb": True},
        {"chips_allowed": []},
        {"chips_allowed": ["00"]},
        {"chips_denied": "any"},
        {"gpu": "none"},
        {"gpu": ""},
        {"log_key": "00"},
        {"log_origin": ""},
    ],
    ids=str,
)
def test_values_that_are_refused(changes):
    with pytest.raises(ConfigurationError, match=r"The trust file .* is wrong at"):
        AttestationPolicy.from_toml(toml(**changes))


def test_a_key_of_many_parts_is_refused_before_it_is_read():
    """tomllib takes a time that grows with the square of the parts; quotes may hold what Python calls line ends."""
    for separator in (".", '."\u2028".', '."\x85".'):
        with pytest.raises(ConfigurationError) as refused:
            AttestationPolicy.from_toml(separator.join([".".join(["a"] * 90)] * 10) + " = 1")
        assert "more than 100 dots" in str(refused.value.why)


@pytest.mark.parametrize("text", ["[", "a = 1\na = 2", "format = 1979-05-27", 'format = "\udcff"', "\0", ""])
def test_what_is_not_a_trust_file(text):
    with pytest.raises(ConfigurationError):
        AttestationPolicy.from_toml(text)


@pytest.mark.parametrize("hardware", [SNP_POLICY, TDX_POLICY], ids=["sev-snp", "tdx"])
def test_real_platforms_load(hardware):
    policy = POLICY.model_copy(update={"hardware": hardware})
    assert AttestationPolicy.from_toml(policy.to_toml()) == policy
    for key in type(hardware).model_fields:
        lines = [line for line in policy.to_toml().splitlines() if not line.startswith(f"{key} ")]
        with pytest.raises(ConfigurationError, match=f"wrong at 'hardware.{key}'"):
            AttestationPolicy.from_toml("\n".join(lines))
        with pytest.raises(ConfigurationError, match=f"wrong at 'hardware.{key}'"):
            AttestationPolicy.from_toml("\n".join([*lines, f"{key} = 1.5"]))


def test_a_publisher_and_published_values_go_together():
    publisher = {"key": "00" * 32, "image": "cloister-vm", "minimum_version": "1.2"}
    text = toml(measurements="published").replace('publisher = "none"\n', "")
    table = "\n\n[publisher]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in publisher.items())
    read = AttestationPolicy.from_toml(text + table)
    assert read.publisher.model_dump() == publisher
    assert AttestationPolicy.from_toml(read.to_toml()) == read
    for wrong in (toml(measurements="published"), toml().replace('publisher = "none"\n', "") + table):
        with pytest.raises(ConfigurationError, match="wrong at 'publisher'"):
            AttestationPolicy.from_toml(wrong)
    for key in publisher:
        for bent in ("", f"{key} = 7"):
            lines = [bent if line.startswith(f"{key} ") else line for line in (text + table).splitlines()]
            with pytest.raises(ConfigurationError, match=f"wrong at 'publisher.{key}'"):
                AttestationPolicy.from_toml("\n".join(lines))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigurationError, match="can't be read"):
        load_policy(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ConfigurationError, match="UTF-8"):
        load_policy(tmp_path / "binary.toml")
    (tmp_path / "open.toml").write_text(POLICY.to_toml())
    load_policy(tmp_path / "open.toml")
    (tmp_path / "open.toml").chmod(0o666)
    with pytest.raises(ConfigurationError, match="Anybody on this computer may change"):
        load_policy(tmp_path / "open.toml")
    (tmp_path / "large.toml").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigurationError, match="larger"):
        load_policy(tmp_path / "large.toml")
