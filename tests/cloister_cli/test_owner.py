"""`cloister owner`: keys, the witness as its own process, and a restore from the owner's copy of the log."""

from __future__ import annotations

import json
import secrets
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import cloister.profile
import cloister.session
from cloister_budget.merkle import Growing, leaf_hash
from cloister_cli.connect import connect_profile
from cloister_data.accounts import AccountList
from cloister_data.checkpoint import Checkpoint
from cloister_data.datasets import SplitRef
from cloister_data.errors import ConfigurationError, UnavailableError
from cloister_data.release import Release, ReleaseList
from cloister_data.statistics import QueryRequest, Question
from cloister_guard.restore import read_copy
from tests.cloister_cli.conftest import Run
from tests.fakes.data import PEOPLE, people
from tests.fakes.running import RunningCloister, make_policy, running_cloister
from tests.fakes.witnesses import serving_process, until, view

OWNER, DATASET = "clinic", "clinic/people"


def _flip(copy: Path) -> None:
    entries = (copy / "entries.jsonl").read_bytes()
    (copy / "entries.jsonl").write_bytes(entries.replace(b'"kind":"login"', b'"kind":"logon"', 1))


def _cut(copy: Path) -> None:
    entries = (copy / "entries.jsonl").read_bytes()
    (copy / "entries.jsonl").write_bytes(b"\n".join(entries.split(b"\n")[:-3]) + b"\n")


def _unsign(copy: Path) -> None:
    note = (copy / "checkpoint").read_text()
    (copy / "checkpoint").write_text(note[:-12] + "AAAAAAAAAA==\n"[-12:])


WRONG: dict[str, Callable[[Path], object]] = {
    "flipped": _flip,
    "cut off": _cut,
    "not signed": _unsign,
    "without a checkpoint": lambda copy: (copy / "checkpoint").unlink(),
    "without entries": lambda copy: (copy / "entries.jsonl").unlink(),
    "nothing new": lambda copy: (copy / "entries.jsonl").write_bytes(b""),
}


class House:
    def __init__(self, cloister_: RunningCloister) -> None:
        self.cloister = cloister_
        cloister_.add_user("ann", "scientist")
        cloister_.add_user(OWNER, "owner")
        self.sign_in()

    def sign_in(self) -> None:
        connect_profile(OWNER, self.cloister.url, self.cloister.trust, OWNER, self.cloister.passwords[OWNER])

    @contextmanager
    def served(self) -> Iterator[subprocess.Popen[bytes]]:
        with serving_process("--profile", OWNER, log=self.cloister.base / "witness.log") as process:
            until(lambda: process.poll() is not None or view(self.cloister.session(OWNER)).unlocked)
            yield process

    def ask(self, epsilon: float = 0.5) -> Release:
        question = Question(source=SplitRef(dataset=DATASET), operation="count")
        wanted = QueryRequest(request_id=secrets.token_hex(16), question=question, epsilon=epsilon)
        return self.cloister.session("ann").transport.call("POST", "/queries", wanted, Release)

    def used(self) -> dict[str, float]:
        found = self.cloister.session("ann").transport.call("GET", "/accounts", None, AccountList).accounts
        return {each.account: each.used_share for each in found}

    def keep(self, where: Path) -> None:
        """A backup of the database, as an admin makes one while the cloister runs."""
        live = self.cloister.state / "cloister.db"
        with closing(sqlite3.connect(live)) as source, closing(sqlite3.connect(where)) as copy:
            source.backup(copy)

    def put_back(self, where: Path) -> None:
        for path in self.cloister.state.glob("cloister.db*"):
            path.unlink()
        shutil.copy(where, self.cloister.state / "cloister.db")


@pytest.fixture
def house() -> Iterator[House]:
    with running_cloister("lease_seconds = 2.0\n") as cloister_:
        yield House(cloister_)


def test_a_restore_never_lowers_what_was_spent(house: House, run: Run, tmp_path: Path) -> None:
    shown = json.loads(run("owner", "show", "--profile", OWNER, "--json").stdout)
    assert (shown["owner_key"], shown["witness"]) == (None, None)
    assert "No witness" in run("owner", "show", "--profile", OWNER).stdout
    assert run("owner", "serve", "--profile", OWNER).returncode == 1
    assert run("owner", "accept", "--profile", OWNER, "--yes").returncode == 1
    made = run("owner", "init", "--profile", OWNER, "--json")
    assert made.returncode == 0, made.stderr
    facts = json.loads(made.stdout)
    assert facts["witness_here"] is True
    assert facts["terms_version"] == 1
    assert json.loads(run("owner", "init", "--profile", OWNER, "--json").stdout)["terms_version"] == 1
    cloister_ = house.cloister
    for name in ("witness.pem", "unlock.key"):
        assert (cloister.profile.home() / "profiles" / OWNER / "witness" / name).stat().st_mode & 0o077 == 0
    with pytest.raises(UnavailableError, match="locked"):
        cloister_.upload(DATASET, people(600), PEOPLE, make_policy(DATASET, {"ann": 5.0}))
    with house.served():
        assert "open" in run("owner", "show", "--profile", OWNER).stdout
        # Two with the same memory could sign for two logs.
        again = run("owner", "serve", "--profile", OWNER)
        assert (again.returncode, "Another witness" in again.stderr) == (1, True)
        cloister_.upload(DATASET, people(600), PEOPLE, make_policy(DATASET, {"ann": 5.0}))
        house.ask()
        house.keep(tmp_path / "backup.db")
        house.ask()
    # The gap is to hold a start as well, with its evidence.
    assert cloister_.stop() == 0
    cloister_.restart()
    house.sign_in()
    with house.served():
        house.ask(1.0)
        used = house.used()
        assert run("owner", "backup", str(tmp_path / "copy"), "--profile", OWNER).returncode == 0
        assert run("owner", "backup", str(tmp_path / "copy"), "--profile", OWNER).returncode == 1
    assert cloister_.stop() == 0

    house.put_back(tmp_path / "backup.db")
    # With a copy that was changed, or of another log, it doesn't start at all.
    copied = tmp_path / "copy"
    with closing(sqlite3.connect(tmp_path / "backup.db")) as database:
        leaves = [payload for (payload,) in database.execute('SELECT payload FROM leaves ORDER BY "index"')]
    tree = Growing()
    for payload in leaves:
        tree.add(leaf_hash(payload))
    known = Checkpoint("cloister/test-cloister", tree.size, tree.root())
    for name, change in WRONG.items():
        wrong = tmp_path / "wrong"
        shutil.copytree(copied, wrong)
        change(wrong)
        with pytest.raises(ConfigurationError):
            read_copy(wrong, known)
        shutil.rmtree(wrong)
        assert name
    for other in ({"origin": "cloister/other"}, {"root": bytes(32)}, {"size": known.size - 1}):
        with pytest.raises(ConfigurationError):
            read_copy(copied, replace(known, **other))  # type: ignore[arg-type]
    # The control.
    copy = read_copy(copied, known)
    assert len(copy.entries) > 5
    assert len(copy.evidence) == 1

    cloister_.restart("--restore", str(tmp_path / "copy"))
    house.sign_in()
    after = house.used()
    assert after == used
    with house.served():
        with pytest.raises(UnavailableError, match="restored"):
            house.ask()
        told = run("owner", "show", "--profile", OWNER).stdout
        assert "waits for your signature" in told
        assert run("owner", "accept", "--profile", OWNER).returncode == 1
        accepted = run("owner", "accept", "--profile", OWNER, "--yes")
        assert accepted.returncode == 0, accepted.stderr
        house.ask()
        assert all(house.used()[name] > share for name, share in used.items())
        history = cloister_.session("ann").transport.call("GET", "/releases", None, ReleaseList)
        assert len(history.releases) == 2  # What was asked in the gap is gone; what was paid isn't.
        # The whole log verifies for anybody, over the restore.
        cloister_.session("admin")
        exported = run("audit", "export", str(tmp_path / "export"), "--profile", "admin")
        assert exported.returncode == 0, exported.stderr
        verified = run("audit", "verify", str(tmp_path / "export"), "--trust", str(cloister_.trust), "--json")
        assert json.loads(verified.stdout)["holds"], verified.stderr
