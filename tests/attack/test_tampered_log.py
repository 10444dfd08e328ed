"""Somebody edits the audit log in its database, with a guard stopped or running: it is refused, on either database.

What the guard alone can't see, a whole database that was once true, is refused by who remembers a later checkpoint.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.profile import Remembered
from cloister_budget.entries import GuardStarted, LeafBody
from cloister_budget.journal import Journal
from cloister_budget.merkle import Growing, leaf_hash
from cloister_data.checkpoint import Checkpoint
from cloister_data.errors import AttestationRefusedError, StorageError
from tests.fakes.audited import believe
from tests.fakes.small_guard import ORIGIN, Hands, Row, SmallGuard, with_tree

Change = Callable[[list[Row]], list[Row]]
LOGINS = 6


class Scene:
    """A database in which a guard has worked, and somebody else's hands in it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.guard = SmallGuard(url)
        self.guard.found()
        self.guard.answer()
        # Entries that move nothing: by the books, they could as well be elsewhere, or not be.
        for number in range(LOGINS):
            self.guard.login(f"user-{number}")
        self.hands = Hands(url)

    def starts(self) -> bool:
        """Whether the stopped guard's next start is content; it then pays and answers too."""
        again = SmallGuard(self.url)
        try:
            again.start()
            again.answer()
        except StorageError as error:
            return self._refused(error)
        finally:
            again.stop()
        return True

    def restart(self) -> None:
        self.guard.stop()
        self.guard = SmallGuard(self.url).start()
        for number in range(LOGINS):
            self.guard.login(f"user-{number}")

    def anew(self) -> Iterator[str]:
        """The name of each change; the database is before each what it is now."""
        kept = self.hands.copy()
        for name in CHANGES:
            self.hands.put(kept)
            yield name

    def _refused(self, error: StorageError) -> bool:
        assert "audit log" in error.what, error
        return False

    def goes_on(self) -> bool:
        """Whether the running guard still answers."""
        try:
            self.guard.answer()
        except StorageError as error:
            return self._refused(error)
        return True


@pytest.fixture
def scene(url: str) -> Iterator[Scene]:
    found = Scene(url)
    yield found
    found.guard.stop()
    found.hands.close()


def middle(rows: list[Row]) -> int:
    """An entry that moves nothing, and more follow it."""
    return len(rows) - LOGINS + 1


def flip(at: int | None, bit: int) -> Change:
    def change(rows: list[Row]) -> list[Row]:
        index = middle(rows) if at is None else len(rows) + at
        payload = bytearray(rows[index].payload)
        # In the ref of its user: what it says is another, and it still reads.
        place = payload.index(b'"user":"') + 8
        payload[place] = ord("0123456789abcdef"[int(chr(payload[place]), 16) ^ bit])
        return [*rows[:index], replace(rows[index], payload=bytes(payload)), *rows[index + 1 :]]

    return change


def drop(rows: list[Row]) -> list[Row]:
    return [*rows[: middle(rows)], *rows[middle(rows) + 1 :]]


def swap(rows: list[Row]) -> list[Row]:
    one = middle(rows)
    first, second = rows[one], rows[one + 1]
    return [*rows[:one], replace(second, index=one), replace(first, index=one + 1), *rows[one + 2 :]]


def insert(rows: list[Row]) -> list[Row]:
    one = middle(rows)
    return [*rows[:one], rows[one + 1].at_index(one), *(replace(row, index=row.index + 1) for row in rows[one:])]


def add(rows: list[Row]) -> list[Row]:
    return [*rows, rows[-1].at_index(len(rows))]


def truncate(rows: list[Row]) -> list[Row]:
    return rows[:-2]


CHANGES: dict[str, Change] = {
    "a byte in the midst": flip(None, 1),
    "a byte of the last": flip(-1, 4),
    "one dropped": drop,
    "two swapped": swap,
    "one inserted": insert,
    "one added": add,
    "two cut off": truncate,
}


def attack(scene: Scene, change: Change, *, careful: bool) -> None:
    """Edit the entries. With `careful` they say their new places, their tree is made anew, and the head says its size:
    everything but a signature."""
    rows = change(scene.hands.leaves())
    if careful:
        rows = with_tree([row.at_index(index) for index, row in enumerate(rows)])
        scene.hands.set_head(size=len(rows))
    scene.hands.set_leaves(rows)


@pytest.mark.parametrize("careful", [False, True], ids=["crude", "careful"])
def test_an_edited_log_starts_no_guard(scene: Scene, careful: bool) -> None:
    scene.guard.stop()
    for name in scene.anew():
        attack(scene, CHANGES[name], careful=careful)
        assert not scene.starts(), name


MAY_GO_ON = {(name, False) for name in ("a byte in the midst", "a byte of the last", "one dropped", "two swapped")}
"""A running guard doesn't read an entry again; of the hashes beside them it reads the last, and those in proofs."""


@pytest.mark.parametrize("careful", [False, True], ids=["crude", "careful"])
def test_an_edited_log_under_a_running_guard_is_refused(scene: Scene, careful: bool) -> None:
    """At the next answer; where it doesn't see it, it goes on from what it knows, and no start follows."""
    for name in scene.anew():
        scene.restart()
        attack(scene, CHANGES[name], careful=careful)
        assert not scene.goes_on() or (name, careful) in MAY_GO_ON, name
        scene.guard.stop()
        assert not scene.starts(), name


def test_the_control_rows_that_are_written_back_as_they_were_change_nothing(scene: Scene) -> None:
    attack(scene, lambda rows: rows, careful=True)
    assert scene.goes_on()
    scene.hands.put(scene.hands.copy())
    assert scene.goes_on()
    scene.guard.stop()
    attack(scene, lambda rows: rows, careful=True)
    assert scene.starts()


def test_the_control_without_the_signature_a_careful_edit_is_believed(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Journal, "_check_head", lambda *_: None)
    scene.guard.stop()
    for name in scene.anew():
        attack(scene, CHANGES[name], careful=True)
        assert scene.starts(), name


def test_the_control_without_its_memory_a_running_guard_goes_on_over_a_shorter_log(scene: Scene) -> None:
    old = scene.hands.copy()
    scene.guard.answer()
    scene.hands.put(old)
    assert not scene.goes_on()
    scene.guard.journal = Journal(scene.guard.journal.log, believe)
    scene.guard.journal.log._head = None
    assert scene.goes_on()


def remembered(checkpoint: Checkpoint, guard: SmallGuard) -> Remembered:
    key = guard.journal.log.public_key
    return Remembered(url="https://a", origin=ORIGIN, log_key=key, size=checkpoint.size, root=checkpoint.root)


def accepts(client: Remembered, guard: SmallGuard) -> bool:
    """Whether a client that remembers a checkpoint connects, as `cloister.session.open` decides."""
    now = guard.checkpoint()
    proof = guard.consistency(client.size, now.size) if 0 < client.size < now.size else []
    try:
        client.refuse_rollback(now, proof)
    except AttestationRefusedError:
        return False
    return True


def shown(guard: SmallGuard) -> tuple[int, bytes] | None:
    try:
        found = guard.checkpoint()
    except StorageError:
        return None
    return found.size, found.root


def gone_on(scene: Scene, entries: int, fresh: Callable[[], str]) -> tuple[dict[str, Any], Remembered, Remembered]:
    """(an old copy, to which another guard added so many entries elsewhere; a client that saw the copy's state, and one
    that saw what this guard has written since)."""
    old = scene.hands.copy()
    early = remembered(scene.guard.checkpoint(), scene.guard)
    scene.guard.login("user-0")
    scene.guard.answer()
    late = remembered(scene.guard.checkpoint(), scene.guard)
    if entries:
        other = SmallGuard(fresh())
        hands = Hands(other.database.engine.url.render_as_string(hide_password=False))
        hands.put(old)
        other.start()
        for _ in range(entries - 1):
            other.login("somebody")
        other.stop()
        old = hands.copy()
        hands.close()
    return old, early, late


@pytest.fixture
def fresh(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Makes another empty database."""
    if kind == "sqlite":
        return lambda: f"sqlite:///{tmp_path / 'other.db'}"
    made: Callable[[], str] = request.getfixturevalue("postgres")
    return made


@pytest.mark.parametrize("entries", [0, 1, 3, 9], ids=["rolled back", "forked, shorter", "forked, as long", "longer"])
def test_an_old_copy_is_refused_by_a_running_guard_and_by_who_saw_more(
    scene: Scene, entries: int, fresh: Callable[[], str]
) -> None:
    old, early, late = gone_on(scene, entries, fresh)
    now = scene.hands.copy()
    assert len(old["leaves"]) - len(now["leaves"]) == entries - 3
    scene.hands.put(old)
    assert not scene.goes_on()
    # What it shows to clients is its own log still, or nothing.
    assert shown(scene.guard) in (None, (late.size, late.root))
    scene.hands.put(now)
    assert scene.goes_on()
    assert accepts(late, scene.guard)
    scene.guard.stop()
    # The stopped guard can't tell: guards of this cloister wrote all of it. Who saw more can.
    scene.hands.put(old)
    assert scene.starts()
    again = SmallGuard(scene.url)
    again.start()
    assert not accepts(late, again)
    assert accepts(early, again)
    again.stop()


def test_a_fork_that_no_guard_wrote_starts_no_guard(scene: Scene) -> None:
    old = scene.hands.leaves()
    scene.guard.answer()
    size = len(scene.hands.leaves())
    scene.guard.stop()
    forked = list(old)
    while len(forked) < size:
        forked = add(forked)
    scene.hands.set_leaves(with_tree(forked))
    assert not scene.starts()


def root_of(rows: list[Row]) -> bytes:
    tree = Growing()
    for row in rows:
        tree.add(leaf_hash(row.payload))
    return tree.root()


def test_a_running_guard_signs_nothing_that_it_did_not_read(scene: Scene) -> None:
    """Anybody may ask for evidence, and it holds a signed checkpoint: over an edited tree it would be the signature
    that the edit lacks."""
    for name in scene.anew():
        scene.restart()
        attack(scene, CHANGES[name], careful=True)
        forged = scene.hands.leaves()
        assert shown(scene.guard) != (len(forged), root_of(forged)), name
        # An answer, whose receipt would hold one, doesn't leave.
        assert not scene.goes_on(), name


def test_the_control_a_guard_that_signed_what_is_stored_would_sign_for_a_forged_entry(scene: Scene) -> None:
    attack(scene, add, careful=True)
    forged = scene.hands.leaves()
    note = scene.guard.journal.log.sign(len(forged), root_of(forged))
    # The note's last line ends with base64 of the key's id, 4 bytes, and the signature.
    scene.hands.set_head(signature=base64.b64decode(note.split()[-1])[4:])
    assert scene.goes_on()
    scene.guard.stop()
    assert scene.starts()


def test_a_start_that_nobody_must_vouch_for_would_sign_for_anything(scene: Scene) -> None:
    """The control of `test_edited_database.py`, where it is refused: this guard believes every start.

    Somebody writes a start with a log key of their own, after it what they like, and signs for all of it.
    """
    scene.guard.stop()
    rows, key = scene.hands.leaves(), Ed25519PrivateKey.generate()
    start = GuardStarted(
        evidence="0" * 64, platform="simulated", log_key=key.public_key().public_bytes_raw().hex(),
        previous_key=scene.guard.journal.log.public_key.hex(), certificate="0" * 64,
    )  # fmt: skip
    payload = LeafBody(index=len(rows), at=rows[-1].at, facts=start).canonical()
    believed = Row(len(rows), "guard-started", rows[-1].at, payload, b"")
    forged = with_tree([*rows, believed, rows[-1].at_index(len(rows) + 1)])
    scene.hands.set_leaves(forged)
    signed = Checkpoint(ORIGIN, len(forged), root_of(forged)).body().encode()
    scene.hands.set_head(size=len(forged), signature=key.sign(signed))
    assert scene.starts()
