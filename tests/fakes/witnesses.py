"""An owner's witness for tests: the real one, in a thread of this process, or `cloister owner serve` as a child."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cloister.profile import Profile
from cloister.session import Session
from cloister.witness import Witness, keys_of, opened
from cloister_data.errors import CloisterError
from cloister_data.owner import public_bytes, sign_terms
from cloister_data.terms import OwnerTerms, OwnerView, TermsRequest
from cloister_data.witness import unlock_digest
from tests.fakes.running import RunningCloister


def view(session: Session) -> OwnerView:
    return session.transport.call("GET", "/owner", None, OwnerView)


def init(cloister_: RunningCloister, owner: str) -> OwnerView:
    """What `cloister owner init` does."""
    cloister_.add_user(owner, "owner")
    session = cloister_.session(owner)
    key = session.profile.owner_key(create=True)
    keys = keys_of(session.profile, create=True)
    terms = OwnerTerms(
        origin=view(session).origin, owner=owner, version=1, witness=keys.public, unlock=unlock_digest(keys.unlock)
    )
    request = TermsRequest(owner_key=public_bytes(key), terms=sign_terms(terms, key))
    return session.transport.call("PUT", "/owner", request, OwnerView)


class Serving:
    """One witness that serves. `error` is what ended it, `said` what it told."""

    def __init__(self, profiles: Sequence[Profile], owner: str) -> None:
        self.error: CloisterError | None = None
        self.said: list[str] = []
        self.stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(profiles, owner))]
        for thread in self._threads:
            thread.start()

    def _run(self, profiles: Sequence[Profile], owner: str) -> None:
        keys = keys_of(profiles[0])
        with opened(keys, owner) as mirror:
            served = [Witness(each, keys, mirror, owner, self.said.append) for each in profiles]
            threads = [threading.Thread(target=self._serve, args=(each,)) for each in served]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def _serve(self, witness: Witness) -> None:
        try:
            witness.serve(self.stop)
        except CloisterError as error:
            self.error = error
            self.stop.set()

    def wait(self) -> None:
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()


@contextlib.contextmanager
def serving(*profiles: Profile, owner: str | None = None) -> Iterator[Serving]:
    found = Serving(profiles, owner or str(profiles[0].user))
    try:
        yield found
    finally:
        found.stop.set()
        found.wait()


@contextlib.contextmanager
def serving_process(*arguments: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`cloister owner serve` as its own process."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "cloister_cli.main", "owner", "serve", *arguments],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=dict(os.environ),
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(30)


def until(what: Callable[[], object], seconds: float = 15) -> None:
    """Wait until `what()` is true."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it didn't happen in time"
        time.sleep(0.02)
