"""Direct deltas are held, spent and given back with the charge that has them, within 1% of the limit's delta."""

from __future__ import annotations

import pytest

from cloister_budget.database import Database
from cloister_budget.loss import direct_delta
from cloister_budget.orders import DIRECT_UNIT
from cloister_budget.tables import Account, ChargeRow
from cloister_data.errors import BudgetRefusedError
from cloister_data.mechanism import Composition, ThresholdedHistogram
from tests.fakes.ledgers import POPULATION, laplace, policy, ready, reservation

ACCOUNTS = [POPULATION, f"{POPULATION}:alice"]
# 4.1e-8 a time: two are within 1e-7, the 1% of delta 1e-5.
HISTOGRAM = ThresholdedHistogram(bins=1, scale=100, threshold=1632)
ONCE = Composition(parts=(HISTOGRAM,))


def columns(database: Database) -> dict[str, tuple[int, int, int]]:
    with database.read() as s:
        return {row.id: (row.direct_budget, row.direct_spent, row.direct_reserved) for row in s.query(Account)}


def test_direct_deltas_follow_their_charge(database: Database) -> None:
    ledger, direct = ready(database, 5.0), direct_delta(HISTOGRAM)
    budget = DIRECT_UNIT // 10**7
    assert 2 * direct <= budget < 3 * direct
    with database.write() as s:
        first = ledger.reserve(s, reservation(ACCOUNTS, ONCE, epsilon=0.01)).charge_id
        second = ledger.reserve(s, reservation(ACCOUNTS, ONCE, epsilon=0.01)).charge_id
        row = s.get(ChargeRow, first)
        assert row is not None
        assert row.direct_delta == direct
    assert set(columns(database).values()) == {(budget, 0, 2 * direct)}
    with pytest.raises(BudgetRefusedError), database.write() as s:
        ledger.reserve(s, reservation(ACCOUNTS, ONCE, epsilon=0.01))
    assert set(columns(database).values()) == {(budget, 0, 2 * direct)}
    with database.write() as s:
        ledger.commit(s, first)
        ledger.commit(s, first)
        ledger.refund(s, second)
    assert set(columns(database).values()) == {(budget, direct, 0)}
    with database.write() as s:
        ledger.reserve(s, reservation(ACCOUNTS, ONCE, epsilon=0.01))
        ledger.settle_dead(s)
    assert set(columns(database).values()) == {(budget, 2 * direct, 0)}


def test_a_charge_without_a_direct_delta_needs_no_room_for_one(database: Database) -> None:
    ledger = ready(database, 5.0)
    with database.write() as s:
        ledger.commit(s, ledger.reserve(s, reservation(ACCOUNTS, ONCE, epsilon=0.01)).charge_id)
        # Lowered below what is spent: what has a direct delta is refused, what has none isn't.
        ledger.set_limits(s, POPULATION, policy(5.0, delta=1e-8))
    with pytest.raises(BudgetRefusedError), database.write() as s:
        ledger.reserve(s, reservation(ACCOUNTS, ONCE, epsilon=0.01))
    with database.write() as s:
        assert ledger.reserve(s, reservation(ACCOUNTS, laplace("0.2"))).fresh
