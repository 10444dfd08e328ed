"""Who opens another population is asked at a terminal whether its people are others; a script says so by an option."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cloister_cli.declare import policy_toml
from tests.cloister_cli.conftest import Done, Run
from tests.fakes.running import RunningCloister, make_policy

OWNER = "people-owner"
SCHEMA = """
[[columns]]
name = "age"
type = "integer"
low = 0
high = 120
"""
Upload = Callable[..., Done]


@pytest.fixture
def upload(run: Run, shared_cloister: RunningCloister, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Upload:
    """upload("staff", "--other-people") publishes `OWNER/staff`; as `run` in everything else."""
    monkeypatch.setenv("CLOISTER_HOME", str(shared_cloister.base / "laptop"))
    shared_cloister.add_user(OWNER, "owner")
    shared_cloister.session(OWNER)
    rows, schema, policy = (tmp_path / name for name in ("rows.csv", "schema.toml", "policy.toml"))
    rows.write_text("age\n40\n50\n")
    schema.write_text(SCHEMA)

    def call(name: str, *options: str, first: bool = True, **how: object) -> Done:
        policy.write_text(policy_toml(make_policy(f"{OWNER}/{name}", {"ann": 1.0})))
        words = ["dataset", "upload", str(rows), "--schema", str(schema), "--name", f"{OWNER}/{name}", "-p", OWNER]
        return run(*words, *(["--policy", str(policy)] if first else []), *options, **how)

    return call


def test_another_population_is_opened_with_the_owners_word_alone(run: Run, upload: Upload) -> None:
    def populations() -> dict[str, str]:
        listed = json.loads(run("dataset", "list", "-p", OWNER, "--json").stdout)["datasets"]
        return {each["name"].split("/")[1]: each["population"].split("/")[1] for each in listed}

    # The first one has none beside it, and nothing to state.
    done = upload("patients", "--other-people")
    assert done.returncode == 1
    assert "Leave out --other-people" in done.stderr
    assert upload("patients").returncode == 0

    # A script is told what to add; who is asked at a terminal and doesn't say yes opens nothing.
    done = upload("staff")
    assert done.returncode == 1
    for told in ("fresh accounts", f"{OWNER}/patients", "--population", "--other-people"):
        assert told in done.stderr
    done = upload("staff", terminal=True, stdin="\n")
    assert done.returncode == 1
    assert "Nobody in this population is in any of the others." in done.stderr
    assert "isn't opened" in done.stderr
    assert populations() == {"patients": "patients"}

    # These are the same people, under the name of theirs: nobody is asked.
    assert upload("visits", "--population", f"{OWNER}/patients").returncode == 0

    done = upload("staff", "--json", terminal=True, stdin="y\n")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["version"] == 1
    assert upload("guests", "--other-people").returncode == 0
    assert populations() == {"patients": "patients", "visits": "patients", "staff": "staff", "guests": "guests"}
    assert f"{OWNER}/patients" in run("dataset", "show", f"{OWNER}/visits", "-p", OWNER).stdout
    line = next(each for each in run("dataset", "list", "-p", OWNER).stdout.splitlines() if "/visits" in each)
    assert f"{OWNER}/patients" in line

    # A new version of their data says nothing anew.
    done = upload("guests", "--other-people", first=False)
    assert done.returncode == 1
    assert "Leave out --other-people" in done.stderr
    assert upload("guests", first=False).returncode == 0


def test_a_population_needs_a_name_that_can_be(upload: Upload) -> None:
    done = upload("patients-2", "--population", f"{OWNER}/Other People", "--other-people")
    assert done.returncode == 1
    assert "can't be a name" in done.stderr
