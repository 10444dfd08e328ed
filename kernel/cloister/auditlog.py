"""The audit log as a client searches and follows it: page after page, from a place in the log, across lost connections.

The caller delivers a page, then goes on from its `following`: whoever keeps that number loses no entry.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from pydantic import JsonValue, ValidationError

from cloister.session import Session
from cloister_budget.merkle import LogVerificationError
from cloister_data.audit import AuditEntry, AuditPage, AuditSearch
from cloister_data.base import UnixSeconds, Wire
from cloister_data.errors import (
    AttestationRefusedError,
    CloisterError,
    InternalError,
    SessionExpiredError,
    StorageError,
    TooManyRequestsError,
    UnavailableError,
    UnreachableError,
)

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds between tries to reach a cloister that was lost; each is twice the one before."""

AWAY = (UnreachableError, UnavailableError, TooManyRequestsError)
"""What passes by itself, however long it takes."""
DOUBTFUL = (AttestationRefusedError, SessionExpiredError, StorageError, InternalError)
"""What a restart of the cloister may look like from outside, or a new sign-in may mend; or not."""
TRIES_IN_DOUBT = 4


@dataclass(frozen=True)
class Record:
    """One entry, as its own bytes say it: `at` in Unix seconds, `facts` without their kind, `names` by ref."""

    index: int
    at: int
    kind: str
    facts: dict[str, Any]
    names: dict[str, str]

    @property
    def time(self) -> str | None:
        """RFC 3339 in UTC; None where no calendar has such a year."""
        try:
            return datetime.fromtimestamp(self.at, UTC).isoformat().replace("+00:00", "Z")
        except (OverflowError, OSError, ValueError):
            return None

    def document(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "at": self.at,
            "time": self.time,
            "kind": self.kind,
            "facts": self.facts,
            "names": self.names,
        }


@dataclass(frozen=True)
class Page:
    """Entries in the log's order. `following` is where to go on, `size` what the log has; they meet at its end."""

    records: tuple[Record, ...]
    following: int
    size: int


class _Body(Wire):
    """An entry of any kind, also one that this version doesn't know."""

    v: int
    index: int
    at: UnixSeconds
    facts: dict[str, JsonValue]


def read(entry: AuditEntry) -> Record:
    """What an entry's payload says. Raises LogVerificationError where the guard's database says something else."""
    try:
        body = _Body.from_json(entry.payload)
        facts: dict[str, Any] = dict(body.facts)
        # Numbers that JSON doesn't have; Wire bars them from its own fields alone.
        json.dumps(facts, allow_nan=False)
    except ValueError as error:
        fault = "It can't be read." if isinstance(error, ValidationError) else "It holds a number that can't be."
        raise _wrong(entry.index, fault) from error
    said = (body.index, body.at, facts.pop("kind", None))
    if said != (entry.index, entry.at, entry.kind):
        raise _wrong(entry.index, f"It is stored as {entry.kind!r}, and says itself that it is {said[2]!r}.")
    return Record(entry.index, entry.at, entry.kind, facts, dict(entry.names))


def search(session: Session, wanted: AuditSearch) -> Page:
    """The next entries from `wanted.start` on, for owners and admins. Raises LogVerificationError too."""
    found = session.transport.call("POST", "/audit/search", wanted, AuditPage)
    if found.size < wanted.start:
        raise LogVerificationError(
            f"The audit log has {found.size} entries, and {wanted.start} of it were read before.",
            why="It was set back, or it is another log.",
            next_step="Ask the operator and the data's owner. Where it was a restore that you accept, read it anew, "
            "with another cursor file.",
        )
    places = [wanted.start - 1, *(entry.index for entry in found.entries), found.following]
    ahead = all(before < after for before, after in pairwise(places))
    if not ahead or (found.following == wanted.start < found.size) or found.following > found.size:
        raise LogVerificationError(
            f"What the cloister finds from entry {wanted.start} of its audit log on is out of order.",
            next_step="Ask the operator; the cloister's own log may say more.",
        )
    return Page(tuple(read(entry) for entry in found.entries), found.following, found.size)


def walk(session: Session, wanted: AuditSearch) -> Iterator[Page]:
    """Every page from `wanted.start` to the end of the log. Raises as `search` does."""
    while True:
        page = search(session, wanted)
        yield page
        if page.following == page.size:
            return
        wanted = wanted.model_copy(update={"start": page.following})


def follow(
    session: Session,
    again: Callable[[], Session],
    wanted: AuditSearch,
    *,
    interval: float,
    told: Callable[[str], None],
    wait: Callable[[float], None] = time.sleep,
) -> Iterator[Page]:
    """`walk`, which goes on at the end by asking every `interval` seconds. It ends by an error alone.

    A lost connection is opened anew by `again`, which verifies the cloister anew; `told` hears of it. The session is
    closed at the end, as are those that `again` opened.

    Raises what doesn't pass: a log that was set back, a role that was taken, and, when it was tried a few times, a
    machine that isn't proven or a sign-in that has ended.
    """
    current: Session | None = session
    failures = doubts = 0
    try:
        while True:
            try:
                if current is None:
                    current = again()
                page = search(current, wanted)
            except (*AWAY, *DOUBTFUL) as error:
                failures += 1
                doubts = doubts + 1 if isinstance(error, DOUBTFUL) else 0
                if doubts >= TRIES_IN_DOUBT:
                    raise
                if current is not None:
                    current.close()
                    current = None
                if failures == 1:
                    told(f"{_first(error)} Trying again until it answers; no entry is lost.")
                wait(min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(failures - 1, 10)))
                continue
            if failures:
                told(f"Connected again; going on from entry {wanted.start}.")
                failures = doubts = 0
            yield page
            wanted = wanted.model_copy(update={"start": page.following})
            if page.following == page.size:
                wait(interval)
    finally:
        if current is not None:
            current.close()


def _first(error: CloisterError) -> str:
    return " ".join(part for part in (error.what, error.why) if part)


def _wrong(index: int, why: str) -> LogVerificationError:
    return LogVerificationError(
        f"Entry {index} of the audit log isn't what it should be.",
        why=why,
        next_step="Export the log and verify it: cloister audit export DIRECTORY; cloister audit verify DIRECTORY.",
    )
