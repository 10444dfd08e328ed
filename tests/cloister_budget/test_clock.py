"""Time never goes back, in one life of a guard and from one to the next."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister_budget.clock import SteadyClock, last_written
from cloister_budget.database import Database
from cloister_budget.log import AuditLog
from tests.fakes.ledgers import HandClock


def test_a_clock_that_is_turned_back_stands_still_until_it_has_caught_up() -> None:
    hand = HandClock(1000)
    clock = SteadyClock(hand)
    assert clock() == 1000
    hand.now = 10
    assert clock() == 1000
    hand.now = 1001
    assert clock() == 1001


def test_the_next_guard_starts_no_earlier_than_the_last_leaf(database: Database) -> None:
    with database.write() as s:
        assert last_written(s) == 0
        AuditLog(Ed25519PrivateKey.generate(), "clock.example/log", HandClock(1_800_000_120)).append(s, "note", {})
    clock = SteadyClock(HandClock(5))
    assert clock() == 5
    with database.read() as s:
        clock.not_before(last_written(s))
    assert clock() == 1_800_000_120
