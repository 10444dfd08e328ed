"""The audit log as a client walks and follows it, and the cursor that remembers how far it came."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cloister import auditlog
from cloister.auditlog import Record
from cloister.auditwords import about, summary
from cloister.cursor import Cursor
from cloister_budget.merkle import LogVerificationError
from cloister_data.audit import AuditEntry, AuditPage, AuditSearch
from cloister_data.errors import (
    AttestationRefusedError,
    CloisterError,
    ConfigurationError,
    ConflictError,
    ForbiddenError,
    UnreachableError,
)

REF, OTHER = "a" * 64, "b" * 64


def entry(payload: bytes, index: int = 3, at: int = 60, kind: str = "new-kind") -> AuditEntry:
    return AuditEntry(index=index, at=at, kind=kind, payload=payload, names={REF: "ann"})


def test_entries_of_unknown_kinds_are_read_and_told() -> None:
    payload = {"v": 1, "index": 3, "at": 60, "facts": {"kind": "new-kind", "who": REF, "why": "x", "n": [1, {"a": 2}]}}
    found = auditlog.read(entry(json.dumps(payload).encode()))
    assert found.facts == {"who": REF, "why": "x", "n": [1, {"a": 2}]}
    assert found.time == "1970-01-01T00:01:00Z"
    assert about(found) == "ann"
    assert summary(found) == 'who ann, why x, n [1, {"a": 2}]'
    # A known kind in another form is told as an unknown one.
    assert summary(Record(7, 0, "upload", {"user": REF, "version": 3}, {})) == "version 3"
    assert len(summary(Record(7, 0, "new", {f"fact{n}": "y" * 5000 for n in range(50)}, {}))) <= 400
    assert about(Record(0, 0, "new", {"user": REF}, {})) == "aaaaaaaa…"
    many = {f"{n:064x}": f"user{n}" for n in range(5)}
    assert about(Record(0, 0, "new", {"who": list(many)}, many)) == "user0, user1, user2, and 2 more"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"v":1,"index":3,"at":60}',
        b'{"v":1,"index":4,"at":60,"facts":{"kind":"new-kind"}}',
        b'{"v":1,"index":3,"at":0,"facts":{"kind":"new-kind"}}',
        b'{"v":1,"index":3,"at":60,"facts":{"kind":"login"}}',
        b'{"v":1,"index":3,"at":60,"facts":{}}',
        b'{"v":1,"index":3,"at":60,"facts":{"kind":"new-kind","x":NaN}}',
        b'{"v":1,"index":3,"at":60,"facts":{"kind":"new-kind","x":1e999}}',
        b'{"v":1,"index":3,"at":60,"facts":{"kind":"new-kind","x":"\\ud800"}}',
        b'{"v":1,"index":3,"at":60,"facts":' + b"[" * 9000 + b"]" * 9000 + b"}",
    ],
)
def test_an_entry_that_says_something_else_than_its_row_is_refused(payload: bytes) -> None:
    with pytest.raises(LogVerificationError, match="Entry 3"):
        auditlog.read(entry(payload))


class Answering:
    """Stands for a session whose guard answers searches as told."""

    def __init__(self, *answers: AuditPage | CloisterError) -> None:
        self.transport, self.answers, self.asked, self.closed = self, list(answers), [], 0

    def call(self, _method: str, _path: str, wanted: AuditSearch, _receive: type[AuditPage]) -> AuditPage:
        self.asked.append(wanted.start)
        answer = self.answers.pop(0)
        if isinstance(answer, CloisterError):
            raise answer
        return answer

    def close(self) -> None:
        self.closed += 1


def page(*places: int, following: int, size: int) -> AuditPage:
    found = (
        entry(json.dumps({"v": 1, "index": n, "at": 60, "facts": {"kind": "new-kind"}}).encode(), n) for n in places
    )
    return AuditPage(entries=tuple(found), following=following, size=size)


@pytest.mark.parametrize(
    "answer",
    [
        page(following=4, size=4),
        page(5, following=5, size=9),
        page(4, following=6, size=9),
        page(6, 6, following=9, size=9),
        page(7, 6, following=9, size=9),
        page(following=5, size=9),
        page(following=10, size=9),
    ],
)
def test_a_log_that_goes_back_or_stands_still_is_refused(answer: AuditPage) -> None:
    with pytest.raises(LogVerificationError):
        list(auditlog.walk(Answering(answer), AuditSearch(start=5)))  # type: ignore[arg-type]


def follow(first: Answering, *later: Answering) -> tuple[list[int], list[str], list[float], BaseException]:
    """Follow until it raises: the entries, what was told, the pauses, the error."""
    told: list[str] = []
    waited: list[float] = []
    sessions = iter(later)
    found: list[int] = []

    def again() -> Any:
        session = next(sessions)
        if isinstance(session.answers[0], CloisterError) and session.answers[0].what == "at the door":
            raise session.answers[0]
        return session

    pages = auditlog.follow(first, again, AuditSearch(), interval=5, told=told.append, wait=waited.append)  # type: ignore[arg-type]

    def walk() -> None:
        for one in pages:
            found.extend(each.index for each in one.records)

    with pytest.raises(CloisterError) as caught:
        walk()
    for session in (first, *later):
        assert session.closed <= 1
    return found, told, waited, caught.value


def test_following_outlives_what_passes_and_nothing_else() -> None:
    away, door = UnreachableError("Gone.", why="Cut."), UnreachableError("at the door")
    restarted = AttestationRefusedError("Another key.")
    stop = ForbiddenError("No longer an admin.")
    first = Answering(page(0, 2, following=3, size=6), page(5, following=6, size=6), away)
    second = Answering(page(following=6, size=6), restarted)
    third = Answering(page(6, following=7, size=7), stop)
    found, told, waited, error = follow(first, Answering(door), Answering(door), second, third)
    assert found == [0, 2, 5, 6]
    assert first.asked == [0, 3, 6]
    assert third.asked == [6, 7]
    assert waited == [5, 1, 2, 4, 5, 1, 5]
    assert told[0] == "Gone. Cut. Trying again until it answers; no entry is lost."
    assert told[1] == "Connected again; going on from entry 6."
    assert error is stop
    assert (first.closed, second.closed, third.closed) == (1, 1, 1)

    refused = AttestationRefusedError("at the door")
    *_, waited, error = follow(Answering(restarted), *(Answering(refused) for _ in range(5)))
    assert error is refused
    assert waited == [1, 2, 4]


def test_a_cursor_is_for_one_search_and_one_process(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "cursor.json"
    wanted = AuditSearch(user="ann", kinds=("login", "release"), since=60)
    with Cursor.held(path, "cloister/x", wanted) as cursor:
        assert cursor.following == 0
        assert not path.exists()
        cursor.advance(7)
        with pytest.raises(ConflictError, match="at the moment"), Cursor.held(path, "cloister/x", wanted):
            pass
    assert path.stat().st_mode & 0o077 == 0
    # Since and until may move from one time to the next; kinds have no order.
    again = wanted.model_copy(update={"kinds": ("release", "login"), "since": None})
    with Cursor.held(path, "cloister/x", again) as cursor:
        assert cursor.following == 7
    for origin, other in (("cloister/y", wanted), ("cloister/x", wanted.model_copy(update={"user": "bob"}))):
        with pytest.raises(ConfigurationError, match="another search's"), Cursor.held(path, origin, other):
            pass
    for content in ("", "{}", "[1]", '{"format":1,"origin":"x","user":null,"dataset":null,"kinds":[],"following":-1}'):
        path.write_text(content)
        with pytest.raises(ConfigurationError, match="isn't a cursor"), Cursor.held(path, "cloister/x", wanted):
            pass
