"""The commands against a real cloister: connect, users, upload, policies, budgets, and refusals."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cloister_cli.conftest import Done, Run
from tests.fakes.running import ADMIN_PASSWORD, RunningCloister, running_cloister

SCHEMA = """
description = "Visits"
[[columns]]
name = "age"
type = "integer"
low = 0
high = 120
[[columns]]
name = "ward"
type = "category"
categories = ["north", "south"]
"""
POLICY = """
population_limit = { epsilon = 10.0, delta = 1e-5 }
release_delta = 1e-5
epsilon_cap = 2.0
operations = ["count", "mean"]
platforms = ["simulated"]
minimum_sandbox = "none"
transfers = "allowed"
expires = "never"
[users]
ann = { epsilon = 5.0, delta = 1e-5 }
"""


@pytest.fixture(scope="module")
def running() -> Iterator[RunningCloister]:
    with running_cloister() as found:
        yield found


def _connect(run: Run, running: RunningCloister, user: str, password: str) -> Done:
    options = ["--trust", str(running.trust), "--user", user, "--password-stdin", "--name", user, "--no-kernel"]
    return run("connect", running.url, *options, "--json", stdin=password + "\n")


def test_an_owner_publishes_and_everybody_sees_what_is_theirs(
    run: Run, running: RunningCloister, tmp_path: Path
) -> None:
    done = _connect(run, running, "admin", "wrong password")
    assert done.returncode == 1
    assert "wrong password" not in done.stderr + done.stdout
    connected = json.loads(_connect(run, running, "admin", ADMIN_PASSWORD).stdout)
    assert connected["role"] == "admin"
    assert connected["reattest_seconds"] == 600
    assert connected["simulated"] is True
    assert {check["name"] for check in connected["verdict"]["checks"]} >= {"platform", "signature", "binding"}
    for user, role in (("north", "owner"), ("ann", "scientist")):
        done = run("user", "add", user, "--role", role, "--password-stdin", "-p", "admin", stdin="long enough\n")
        assert done.returncode == 0, done.stderr
        assert _connect(run, running, user, "long enough").returncode == 0
    listed = json.loads(run("user", "list", "-p", "admin", "--json").stdout)
    assert {each["user"] for each in listed["users"]} == {"admin", "north", "ann"}

    for name, text in (("schema", SCHEMA), ("policy", POLICY)):
        (tmp_path / f"{name}.toml").write_text(text)
    rows = tmp_path / "visits.csv"
    rows.write_text(
        "age,ward\n" + "".join(f"{20 + each % 60},{'north' if each % 3 else 'south'}\n" for each in range(60))
    )
    upload = ["dataset", "upload", str(rows), "--schema", str(tmp_path / "schema.toml"), "-p", "north"]
    done = run(*upload)
    assert done.returncode == 1
    assert "needs a policy" in done.stderr
    done = run(*upload, "--policy", str(tmp_path / "policy.toml"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"dataset": "north/visits", "version": 1, "rows": 60, "columns": ["age", "ward"]}
    assert json.loads(run(*upload, "--json").stdout)["version"] == 2

    rows.write_text("age,ward\n200,north\n")
    done = run(*upload)
    assert done.returncode == 1
    assert "age" in done.stderr
    assert "Traceback" not in done.stderr

    assert "north/visits" in run("dataset", "list", "-p", "ann").stdout
    assert "0 to 120" in run("dataset", "show", "north/visits", "-p", "ann").stdout
    assert run("dataset", "show", "north/nothing", "-p", "ann").returncode == 1
    accounts = json.loads(run("budget", "show", "-p", "ann", "--json").stdout)["accounts"]
    assert {(each["scope"], each["limit"]["epsilon"]) for each in accounts} == {("user", 5.0), ("population", 10.0)}
    assert "still fits" in run("budget", "show", "north/visits", "-p", "ann").stdout

    shown = run("policy", "show", "north/visits", "-p", "north").stdout
    changed = tmp_path / "changed.toml"
    changed.write_text(shown.replace("epsilon_cap = 2.0", "epsilon_cap = 1.0"))
    done = run("policy", "set", "north/visits", str(changed), "-p", "north", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["policy"]["version"] == 2
    assert (
        json.loads(run("policy", "show", "north/visits", "-p", "north", "--json").stdout)["policy"]["epsilon_cap"] == 1
    )
    done = run("policy", "set", "north/visits", str(changed), "-p", "ann")
    assert done.returncode == 1

    assert "nothing is used yet" in run("budget", "show", "north/visits", "--plot", "-p", "ann").stdout
    found = json.loads(run("policy", "what-if", "north/visits", str(changed), "-p", "north", "--json").stdout)
    assert found == {"dataset": "north/visits", "requests": 0, "refused": 0, "changes": []}
    assert "0 paid requests" in run("policy", "what-if", "north/visits", str(changed), "-p", "north").stdout
    assert run("policy", "what-if", "north/visits", str(changed), "-p", "ann").returncode == 1

    done = run("budget", "request", "north/visits", "2", "--reason", "A second cohort", "-p", "ann", "--json")
    assert done.returncode == 0, done.stderr
    asked = json.loads(done.stdout)["request"]
    assert "A second cohort" in run("budget", "requests", "-p", "north", "--json").stdout
    assert run("budget", "answer", asked, "-p", "north").returncode == 1
    more = tmp_path / "more.toml"
    more.write_text(shown.replace("epsilon = 5.0", "epsilon = 7.0"))
    done = run("budget", "answer", asked[:8], "--policy", str(more), "-p", "north", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["policy_version"] == 3
    accounts = json.loads(run("budget", "show", "-p", "ann", "--json").stdout)["accounts"]
    assert {each["limit"]["epsilon"] for each in accounts} == {7.0, 10.0}


def test_parts_are_declared_shown_and_have_budgets_of_their_own(
    run: Run, running: RunningCloister, tmp_path: Path
) -> None:
    for user, role in (("clinic", "owner"), ("dan", "scientist")):
        done = run("user", "add", user, "--role", role, "--password-stdin", "-p", "admin", stdin="long enough\n")
        assert done.returncode == 0, done.stderr
        assert _connect(run, running, user, "long enough").returncode == 0
    divided = 'privacy_unit = "who"\npartition = "ward"' + SCHEMA
    divided += '[[columns]]\nname = "who"\ntype = "integer"\nlow = 0\nhigh = 1000\n'
    (tmp_path / "schema.toml").write_text(divided)
    (tmp_path / "policy.toml").write_text(POLICY.replace("ann =", "dan ="))
    rows = tmp_path / "visits.csv"
    rows.write_text(
        "age,ward,who\n" + "".join(f"40,{'south' if each < 20 else 'north'},{each}\n" for each in range(60))
    )
    upload = ["dataset", "upload", str(rows), "--schema", str(tmp_path / "schema.toml"), "-p", "clinic"]
    done = run(*upload, "--policy", str(tmp_path / "policy.toml"))
    assert done.returncode == 0, done.stderr
    assert "by ward: north 40, south 20" in run("dataset", "show", "clinic/visits", "-p", "dan").stdout
    shown = run("budget", "show", "--plot", "-p", "dan").stdout
    assert shown.splitlines()[0].split()[:3] == ["population", "part", "account"]
    assert "clinic/visits (south), all users" in shown
    accounts = json.loads(run("budget", "show", "-p", "dan", "--json").stdout)["accounts"]
    assert {(each["scope"], each["part"]) for each in accounts} == {
        (scope, part) for scope in ("user", "population") for part in ("north", "south")
    }
    rows.write_text(rows.read_text().replace("south,3\n", "north,3\n"))
    done = run(*upload)
    assert done.returncode == 1
    assert "another part" in done.stderr


def test_a_port_in_use_is_said_by_the_demo(run: Run, running: RunningCloister, tmp_path: Path) -> None:
    port = running.url.rsplit(":", 1)[1]
    done = run("demo", "--state", str(tmp_path / "demo"), "--port", port)
    assert done.returncode == 1
    assert "didn't start" in done.stderr
    assert port in done.stderr
    assert "Traceback" not in done.stderr


def test_the_demo_leaves_other_folders_alone(run: Run, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    done = run("demo", "--state", str(tmp_path))
    assert done.returncode == 1
    assert "isn't a demo's" in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    done = run("demo", "--lab", "--state", str(tmp_path / "none"))
    assert done.returncode == 1
    assert "make demo" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_demo_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    import psutil

    place = tmp_path / "demo"
    process = subprocess.Popen(
        [sys.executable, "-m", "cloister_cli.main", "demo", "--state", str(place)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (place / "state" / "ready.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children  # Positive control: the cloister was there.
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    # Where the interrupt falls into an exec(), as dataclasses use it, CPython ends by the signal: a shell's 130 too.
    assert process.returncode in (130, -signal.SIGINT)
    assert b"no process" in output
    assert b"Traceback" not in output
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
