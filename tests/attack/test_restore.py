"""A backup put back: what was spent since is put back too, on either database, and what was open counts as spent."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import select

from cloister_budget.replay import Replay
from cloister_budget.tables import Account, ChargeRow, LogHead
from cloister_data.errors import StorageError
from cloister_data.terms import Gap
from cloister_guard.restore import Copy, put_back, settle
from tests.fakes.audited import begin, reserved_leaf
from tests.fakes.ledgers import request_id, reservation, training
from tests.fakes.small_guard import ACCOUNTS, PUBLISHED, Hands, SmallGuard


@pytest.fixture
def guard(url: str) -> Iterator[SmallGuard]:
    found = SmallGuard(url)
    found.found()
    yield found
    found.stop()


def train(guard: SmallGuard, marked: int) -> str:
    """Pay for a training of 100 steps, and mark some."""
    wanted = reservation(ACCOUNTS, training(), request=request_id(), epsilon=5.0)
    with guard.database.write() as s:
        reserved = guard.ledger.reserve(s, wanted)
        leaf = reserved_leaf(s, guard.journal, PUBLISHED, wanted, reserved)
        guard.journal.append(s, leaf.model_copy(update={"operation": "train", "steps": 100}))
    with guard.database.write() as s:
        guard.ledger.mark(s, reserved.charge_id, marked)
    return reserved.charge_id


def spent(guard: SmallGuard) -> dict[str, tuple[int, ...]]:
    with guard.database.read() as s:
        rows = s.scalars(select(Account)).all()
        return {row.id: tuple(a + b for a, b in zip(row.spent, row.reserved, strict=True)) for row in rows}


def test_what_the_backup_lacks_is_put_back_and_what_was_open_is_spent(guard: SmallGuard, url: str) -> None:
    hands = Hands(url)
    open_in_both, settled_later = guard.pay(), guard.pay()
    running = train(guard, 10)
    kept = hands.copy()
    guard.release(settled_later)
    with guard.database.write() as s:
        guard.ledger.mark(s, running, 70)
    guard.answer()
    open_in_the_gap = guard.pay()
    before = spent(guard)
    lost = [row.payload for row in hands.leaves()]
    with guard.database.read() as s:
        signature = s.get_one(LogHead, 1).signature
    guard.stop()

    hands.put(kept)
    first = len(hands.leaves())
    # The control: without the copy, everything after the backup is forgotten, and admitted once more.
    control = SmallGuard(url).start()
    assert all(sum(now) < sum(before[name]) for name, now in spent(control).items())
    control.stop()

    hands.put(kept)
    again = SmallGuard(url)
    with again.database.read() as s:
        again.journal.open(s)
    assert again.journal.end().size == first
    copy = Copy(first, tuple(lost[first:]), signature, ())
    with again.database.write() as s:
        put_back(s, again.journal, copy)
        begin(s, again.journal)
        settle(s, again.journal, copy)
    after = spent(again)
    assert all(a >= b for name in before for a, b in zip(after[name], before[name], strict=True))
    log = Replay()
    for row in hands.leaves():
        log.add(row.payload)
    assert [row.payload for row in hands.leaves()][: len(lost)] == lost
    assert not log.books.open_charges
    with again.database.read() as s:
        for account in s.scalars(select(Account)):
            held = log.books.held[again.journal.ref(s, "account", account.id)]
            assert (account.spent, account.direct_spent) == (held.loss, held.direct)
            assert not any(account.reserved)
        states = {row.id: row.state for row in s.scalars(select(ChargeRow))}
        assert states == dict.fromkeys((open_in_both, settled_later, running), "committed")
        owner = again.journal.ref(s, "user", "owner")
    assert open_in_the_gap not in states
    gap = again.journal.gap(owner)
    assert gap == Gap(restored=len(lost) + 1, first=first, end=len(lost) + 1)
    # Nothing is charged before the owner has signed, whatever the database's rows say.
    with pytest.raises(StorageError, match="accepted"):
        again.pay()
    again.stop()
    once_more = SmallGuard(url).start()
    assert spent(once_more) == after
    with pytest.raises(StorageError, match="accepted"):
        once_more.pay()
    once_more.stop()
    hands.close()


class PowerCutError(Exception):
    """Before anything was committed."""


def begin_from(guard: SmallGuard, copy: Copy) -> None:
    with guard.database.write() as s:
        put_back(s, guard.journal, copy)
        begin(s, guard.journal)
        raise PowerCutError


def test_a_restore_that_breaks_off_leaves_the_backup_as_it_was(guard: SmallGuard, url: str) -> None:
    hands = Hands(url)
    guard.pay()
    kept = hands.copy()
    guard.answer()
    lost = [row.payload for row in hands.leaves()]
    with guard.database.read() as s:
        signature = s.get_one(LogHead, 1).signature
    guard.stop()
    hands.put(kept)
    first = len(hands.leaves())
    again = SmallGuard(url)
    with again.database.read() as s:
        again.journal.open(s)
    with pytest.raises(PowerCutError):
        begin_from(again, Copy(first, tuple(lost[first:]), signature, ()))
    again.stop()
    assert hands.copy() == kept
    # And entries that nobody signed for are not put back by a mistake of the caller's.
    again = SmallGuard(url)
    with pytest.raises(StorageError):
        begin_from(again, Copy(first, tuple(lost[first:-1]), signature, ()))
    again.stop()
    assert hands.copy() == kept
    hands.close()
