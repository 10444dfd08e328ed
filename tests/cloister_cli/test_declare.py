from pathlib import Path

import pytest

from cloister_cli.declare import load_policy, load_schema, policy_toml
from cloister_data.errors import ConfigurationError
from cloister_data.schema import DateColumn

POLICY = """
population_limit = { epsilon = 10.0, delta = 1e-5 }
release_delta = 1e-5
epsilon_cap = 2
operations = ["mean", "train"]
platforms = ["sev-snp"]
minimum_sandbox = "user"
transfers = "forbidden"
expires = 2030-01-01
[users]
alice = { epsilon = 6.0, delta = 1e-5 }
"bob.b" = { epsilon = 1e-3, delta = 1e-6 }
"""
SCHEMA = """
description = "People"
privacy_unit = "patient"
[[columns]]
name = "patient"
type = "text"
max_bytes = 64
[[columns]]
name = "born"
type = "date"
low = 1900-01-01
high = "2025-12-31"
"""


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "file.toml"
    path.write_text(text)
    return path


def test_a_policy(tmp_path: Path) -> None:
    policy = load_policy(_write(tmp_path, POLICY), "a/b", 3)
    assert (policy.dataset, policy.version, policy.expires) == ("a/b", 3, 1_893_456_000)
    assert policy.users["bob.b"].epsilon == 1e-3


@pytest.mark.parametrize("expires", ['"never"', "2030-01-01", "2030-01-01T12:30:00Z", "2030-01-01T12:30:00+02:00"])
def test_what_is_shown_can_be_set_again(tmp_path: Path, expires: str) -> None:
    policy = load_policy(_write(tmp_path, POLICY.replace("2030-01-01", expires)), "a/b", 3)
    assert load_policy(_write(tmp_path, policy_toml(policy)), "a/b", 3) == policy


def test_groups_terms_and_suspensions_are_read_and_shown(tmp_path: Path) -> None:
    text = POLICY.replace("[users]", 'suspended_users = ["alice"]\n[users]').replace(
        "alice = { epsilon = 6.0, delta = 1e-5 }",
        "alice = { epsilon = 6.0, delta = 1e-5, epsilon_cap = 0.5, expires = 2029-01-01 }",
    )
    text += '[groups.team]\nmembers = ["alice", "bob.b"]\nlimit = { epsilon = 8.0, delta = 1e-5 }\n'
    policy = load_policy(_write(tmp_path, text), "a/b", 3)
    assert policy.groups_of("bob.b") == ("team",)
    assert (policy.users["alice"].epsilon_cap, policy.users["alice"].expires) == (0.5, 1_861_920_000)
    assert (policy.suspended, policy.suspended_users) == (False, ("alice",))
    assert load_policy(_write(tmp_path, policy_toml(policy)), "a/b", 3) == policy


def test_a_schema_with_tomls_own_dates(tmp_path: Path) -> None:
    schema = load_schema(_write(tmp_path, SCHEMA))
    column = schema.columns[1]
    assert isinstance(column, DateColumn)
    assert (column.low, column.high) == ("1900-01-01", "2025-12-31")


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("expires = 2030-01-01", "", "'expires'"),
        ("expires = 2030-01-01", "expires = 5", "no date"),
        ("epsilon_cap = 2", "epsilon_cap = -2", "'epsilon_cap'"),
        ("epsilon_cap = 2", "epsilon_cap = nan", "'epsilon_cap'"),
        ("epsilon_cap = 2", "epsilon_capp = 2", "'epsilon_capp'"),
        ("epsilon_cap = 2", "epsilon_cap = 2\nversion = 4", "'version'"),
        ("release_delta = 1e-5", "", "'release_delta'"),
        ('"mean", "train"', '"read"', "operations"),
        ("alice = {", "Alice = {", "users"),
        ("[users]", "[users", "isn't TOML"),
    ],
)
def test_a_wrong_policy_is_named(tmp_path: Path, old: str, new: str, match: str) -> None:
    assert old in POLICY
    with pytest.raises(ConfigurationError, match=match) as found:
        load_policy(_write(tmp_path, POLICY.replace(old, new)), "a/b", 1)
    assert "file.toml" in found.value.what


def test_a_wrong_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="born"):
        load_schema(_write(tmp_path, SCHEMA.replace("1900-01-01", '"yesterday"')))
    with pytest.raises(ConfigurationError, match="can't be read"):
        load_schema(tmp_path / "none.toml")


def test_a_partition(tmp_path: Path) -> None:
    divided = SCHEMA.replace("[[columns]]", 'partition = "site"\n[[columns]]', 1)
    site = '[[columns]]\nname = "site"\ntype = "category"\ncategories = ["north", "south"]\n'
    assert load_schema(_write(tmp_path, divided + site)).parts == ("north", "south")
    with pytest.raises(ConfigurationError, match="not be nullable"):
        load_schema(_write(tmp_path, divided + site + "nullable = true\n"))
    with pytest.raises(ConfigurationError, match="needs a privacy_unit"):
        load_schema(_write(tmp_path, divided.replace('privacy_unit = "patient"\n', "") + site))
