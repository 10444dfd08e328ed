"""Many threads on one ledger: no race makes an answer cheaper than it was."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from cloister_budget import rows
from cloister_budget.database import Database, open_database
from cloister_budget.filter import admits
from cloister_budget.ledger import Ledger, Reservation
from cloister_budget.log import AuditLog, size
from cloister_budget.loss import UNIT, rdp_vector
from cloister_budget.orders import Orders
from cloister_budget.tables import Account, ChargeAccount, ChargeRow, Population
from cloister_data.errors import BudgetRefusedError, StorageError
from tests.fakes.ledgers import POPULATION, HandClock, laplace, ready, request_id, reservation, training

USERS = [f"user{number}" for number in range(6)]


def race(work: Callable[[str], None], users: Sequence[str] = USERS) -> list[BaseException]:
    """Run `work` for every user at once."""
    failures: list[BaseException] = []
    start = threading.Barrier(len(users))

    def run(user: str) -> None:
        start.wait()
        try:
            work(user)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(user,)) for user in users]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


def reserved_epsilon(database: Database) -> float:
    """What the population's account holds at infinity: the sum of the pure epsilons."""
    with database.read() as s:
        row = s.get(Account, POPULATION)
        assert row is not None
        return row.reserved[-1] / UNIT


def test_colluding_users_never_get_past_the_population(database: Database) -> None:
    ledger = ready(database, 0.5, **dict.fromkeys(USERS, 0.5))
    refused: list[str] = []

    def work(user: str) -> None:
        for _ in range(3):
            try:
                with database.write() as s:
                    ledger.reserve(s, reservation(ledger.account_ids(s, [POPULATION], user), laplace("0.1"), user=user))
            except BudgetRefusedError:
                refused.append(user)

    assert race(work) == []
    assert reserved_epsilon(database) == 0.5
    assert len(refused) == 3 * len(USERS) - 5


def test_64_kernels_at_once_get_what_the_limit_admits_and_no_more(database: Database) -> None:
    kernels = [f"kernel{number}" for number in range(64)]
    ledger = ready(database, 0.5, **dict.fromkeys(kernels, 0.5))
    log = AuditLog(Ed25519PrivateKey.generate(), "race.example/log", HandClock())
    refused: list[str] = []

    def work(user: str) -> None:
        wanted = reservation([POPULATION, f"{POPULATION}:{user}"], laplace("0.01"), user=user, epsilon=0.01)
        try:
            for _ in range(2):  # the second is a retry
                with database.write() as s:
                    reserved = ledger.reserve(s, wanted)
                    if reserved.fresh:
                        log.append(s, "reserved", {"charge": reserved.charge_id})
        except BudgetRefusedError:
            refused.append(user)
            return
        with database.write() as s:
            ledger.commit(s, reserved.charge_id)
            log.append(s, "settled", {"charge": reserved.charge_id})

    assert race(work, kernels) == []
    with database.read() as s:
        paid = s.query(ChargeRow).count()
        assert paid == 64 - len(refused) >= 50
        account = s.get_one(Account, POPULATION)
        assert account.spent == tuple(paid * loss for loss in s.query(ChargeAccount).first().vector)  # type: ignore[union-attr]
        assert set(account.reserved) == {0}
        assert any(0 < budget >= spent for budget, spent in zip(account.budgets, account.spent, strict=True))
        assert size(s) == 2 * paid


@pytest.mark.postgres
def test_without_the_row_locks_the_ledger_loses_charges(
    postgres: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The positive control: the ledger itself, only its locks taken away."""

    def look_long(s: Session, accounts: Sequence[str]) -> list[rows.Locked]:
        found = rows.look(s, accounts)
        time.sleep(0.05)
        return found

    database = open_database(postgres())
    ledger = ready(database, 0.5, **dict.fromkeys(USERS, 0.5))
    monkeypatch.setattr(rows, "lock", look_long)
    paid: list[str] = []

    def work(user: str) -> None:
        try:
            for _ in range(3):
                with database.write() as s:
                    ledger.reserve(s, reservation(ledger.account_ids(s, [POPULATION], user), laplace("0.1"), user=user))
                paid.append(user)
        except BudgetRefusedError:
            pass

    assert race(work) == []
    assert len(paid) > 5
    assert reserved_epsilon(database) < len(paid) * 0.1
    database.close()


class CarelessLedger(Ledger):
    """The positive control: it reads the account, decides, and writes without holding what it read."""

    def reserve_carelessly(self, database: Database, wanted: Reservation) -> bool:
        with database.read() as s:
            row = s.get(Account, POPULATION)
            orders = s.get(Population, POPULATION)
            assert row is not None
            assert orders is not None
            charge = rdp_vector(wanted.mechanism, Orders(orders.orders, orders.deltas))
            fits = admits(row.budgets, row.spent, row.reserved, charge)
        time.sleep(0.1)
        if fits:
            with database.write() as s:
                again = s.get_one(Account, POPULATION)
                again.reserved = tuple(a + b for a, b in zip(again.reserved, charge, strict=True))
        return fits


def test_the_race_is_there_for_a_ledger_that_does_not_lock(database: Database) -> None:
    ready(database, 0.5, **dict.fromkeys(USERS, 0.5))
    careless = CarelessLedger(HandClock())
    admitted: list[bool] = []

    def work(user: str) -> None:
        for _ in range(3):
            wanted = reservation([POPULATION], laplace("0.1"), user=user)
            admitted.append(careless.reserve_carelessly(database, wanted))

    assert race(work) == []
    assert sum(admitted) > 5


def test_one_request_sent_many_times_at_once_is_paid_once(database: Database) -> None:
    ledger = ready(database, 1.0, alice=1.0)
    request, charges = request_id(), set()

    def work(user: str) -> None:
        with database.write() as s:
            wanted = reservation([POPULATION, f"{POPULATION}:alice"], laplace("0.1"), request=request)
            charges.add(ledger.reserve(s, wanted).charge_id)

    assert race(work) == []
    assert len(charges) == 1
    assert reserved_epsilon(database) == 0.1


def test_marks_and_settlements_of_several_trainings_do_not_disturb_each_other(database: Database) -> None:
    ledger = ready(database, 20.0, **dict.fromkeys(USERS, 20.0))

    def work(user: str) -> None:
        with database.write() as s:
            wanted = reservation(ledger.account_ids(s, [POPULATION], user), training(steps=20), user=user, epsilon=1.0)
            charge = ledger.reserve(s, wanted).charge_id
        for step in (5, 10, 15):
            with database.write() as s:
                ledger.mark(s, charge, step)
        with database.write() as s:
            ledger.commit(s, charge)

    assert race(work) == []
    with database.read() as s:
        accounts = {row.id: row for row in s.scalars(select(Account))}
    assert all(set(row.reserved) == {0} for row in accounts.values())
    users = [accounts[f"{POPULATION}:{user}"].spent for user in USERS]
    assert accounts[POPULATION].spent == tuple(map(sum, zip(*users, strict=True)))


@pytest.mark.postgres
def test_a_deadlock_is_broken_and_nothing_is_half_written(postgres: Callable[[], str]) -> None:
    """Two transactions that lock two rows in opposite orders: one is undone whole, with a StorageError."""
    database = open_database(postgres())
    ready(database, 1.0, alice=1.0, bob=1.0)
    outcomes: list[str] = []
    both = threading.Barrier(2)

    def work(first: str, second: str) -> None:
        update = text("UPDATE accounts SET suspended = true WHERE id = :id")
        try:
            with database.write() as s:
                s.execute(text("SET LOCAL deadlock_timeout = '100ms'"))
                s.execute(update, {"id": first})
                both.wait()
                s.execute(update, {"id": second})
            outcomes.append("committed")
        except StorageError:
            outcomes.append("undone")

    names = [f"{POPULATION}:alice", f"{POPULATION}:bob"]
    threads = [threading.Thread(target=work, args=order) for order in (names, names[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["committed", "undone"]
    database.close()
