"""Two guards and one witness: on one database both are served, on two copies of it neither gets anything more."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import cloister.profile
import cloister.session
from cloister.profile import Profile
from cloister.session import Session
from cloister_data.datasets import SplitRef
from cloister_data.errors import UnavailableError
from cloister_data.release import Release
from cloister_data.statistics import QueryRequest, Question
from tests.fakes import witnesses
from tests.fakes.data import PEOPLE, people
from tests.fakes.postgres import running_postgres
from tests.fakes.running import RunningCloister, make_policy, running_cloister, start, write_config
from tests.fakes.witnesses import until, view

OWNER, DATASET = "clinic", "clinic/people"
LEASE = "lease_seconds = 2.0\n"


@contextlib.contextmanager
def another_guard(first: RunningCloister, extra: str, state: Path | None = None) -> Iterator[RunningCloister]:
    """A second guard with directories of its own; `state` is what its state directory begins as."""
    base, runtime = Path(tempfile.mkdtemp(prefix="clo-two-")), Path(tempfile.mkdtemp(prefix="clo-run-"))
    found: RunningCloister | None = None
    try:
        if state is not None:
            shutil.copytree(state, base / "state", ignore=shutil.ignore_patterns("ready.json"))
        found = start(base, runtime, write_config(base, runtime, extra=extra))
        yield found
    finally:
        if found is not None and found.process.poll() is None:
            found.stop()
        shutil.rmtree(base, ignore_errors=True)
        shutil.rmtree(runtime, ignore_errors=True)


def signed_in(first: RunningCloister, second: RunningCloister, user: str) -> Session:
    """A session of `user` at the second guard, under a profile of its own."""
    profile = cloister.profile.new(f"{user}-2", second.url, second.trust, user)
    profile.save()
    session = cloister.session.open(profile, need_token=False)
    cloister.session.login(session, user, first.passwords[user])
    return session


def ask(session: Session) -> Release:
    question = Question(source=SplitRef(dataset=DATASET), operation="count")
    wanted = QueryRequest(request_id=secrets.token_hex(16), question=question, epsilon=0.1)
    return session.transport.call("POST", "/queries", wanted, Release)


def profiles(*sessions: Session) -> list[Profile]:
    return [session.profile for session in sessions]


def furnish(first: RunningCloister) -> None:
    first.add_user("ann", "scientist")
    witnesses.init(first, OWNER)
    with witnesses.serving(first.session(OWNER).profile):
        until(lambda: view(first.session(OWNER)).unlocked)
        first.upload(DATASET, people(100), PEOPLE, make_policy(DATASET, {"ann": 30.0}))


@pytest.mark.postgres
def test_two_guards_on_one_database_are_served_by_one_witness() -> None:
    with running_postgres() as fresh:
        extra = f'{LEASE}database = "{fresh()}"\n'
        with running_cloister(extra) as first:
            furnish(first)
            # The data lie where both can read them, and both are simulated machines of the same maker.
            shared = Path(tempfile.mkdtemp(prefix="clo-data-"))
            for name in ("data", "master.key", "simulated-root.pem"):
                source = first.state / name
                shutil.copytree(source, shared / name) if source.is_dir() else shutil.copy(source, shared / name)
            with another_guard(first, extra, shared) as second:
                here = first.session(OWNER), first.session("ann")
                there = signed_in(first, second, OWNER), signed_in(first, second, "ann")
                with witnesses.serving(*profiles(here[0], there[0])) as serving:
                    until(lambda: serving.error or (view(here[0]).unlocked and view(there[0]).unlocked))
                    for _ in range(3):
                        for _, scientist in (here, there):
                            assert ask(scientist).receipt.rollback == "prevented by witness"
                    assert serving.error is None
                for session in there:
                    session.close()
            shutil.rmtree(shared)


def test_of_two_copies_of_one_cloister_one_at_most_is_signed_for() -> None:
    """A fork: each copy alone looks right, to a laptop that has seen no more than what both hold."""
    with running_cloister(LEASE) as first:
        furnish(first)
        kept = Path(tempfile.mkdtemp(prefix="clo-kept-"))
        shutil.copytree(first.state, kept / "state", ignore=shutil.ignore_patterns("*.db*", "ready.json"))
        with contextlib.closing(sqlite3.connect(first.state / "cloister.db")) as live:
            live.execute(f"VACUUM INTO '{kept / 'state' / 'cloister.db'}'")
        with another_guard(first, LEASE, kept / "state") as second:
            here = first.session(OWNER), first.session("ann")
            there = signed_in(first, second, OWNER), signed_in(first, second, "ann")
            with witnesses.serving(*profiles(here[0], there[0])) as serving:
                until(lambda: serving.error is not None)
            assert "signed for" in str(serving.error)
            for owner, scientist in (here, there):
                until(lambda owner=owner: not view(owner).unlocked)
                with pytest.raises(UnavailableError):
                    ask(scientist)
            for session in there:
                session.close()
        shutil.rmtree(kept)
