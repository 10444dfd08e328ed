"""Trust files: everything is said, or the file is refused."""

import json

import pytest

from cloister_attest.policy import AttestationPolicy, load_policy
from cloister_attest.simulated import SimulatedHardware
from cloister_data.errors import ConfigurationError

POLICY = SimulatedHardware.generate(bytes(48)).trust()
DOCUMENT = POLICY.model_dump(mode="json")


def toml(**changes) -> str:
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in {**DOCUMENT, **changes}.items())


def test_a_policy_survives_its_file(tmp_path):
    path = tmp_path / "trust.toml"
    path.write_text(POLICY.to_toml())
    assert load_policy(path) == POLICY
    assert toml().splitlines() == POLICY.to_toml().splitlines()[2:]


@pytest.mark.parametrize("key", list(DOCUMENT))
def test_no_key_may_be_left_out(key):
    lines = [line for line in toml().splitlines() if not line.startswith(f"{key} ")]
    with pytest.raises(ConfigurationError, match=f"wrong at '{key}'. The key is missing"):
        AttestationPolicy.from_toml("\n".join(lines))


@pytest.mark.parametrize("key", ["measurement", "Debug", "verify", "sev"])
def test_no_other_key_may_be_there(key):
    with pytest.raises(ConfigurationError, match=f"wrong at '{key}'. There is no such key"):
        AttestationPolicy.from_toml(f"{toml()}\n{key} = true")


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"format": True},
        {"format": "1"},
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


@pytest.mark.parametrize("text", ["[", "a = 1\na = 2", "format = 1979-05-27", 'format = "\udcff"', "\0", ""])
def test_what_is_not_a_trust_file(text):
    with pytest.raises(ConfigurationError):
        AttestationPolicy.from_toml(text)


def test_real_platforms_load():
    policy = AttestationPolicy.from_toml(toml(platform="sev-snp", roots="vendor"))
    assert policy.platform == "sev-snp"


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
