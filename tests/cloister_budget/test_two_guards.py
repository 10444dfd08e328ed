"""Two guards, each a process of its own with its own view of the log, on one PostgreSQL at the same time."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister_budget.database import Database, open_database
from cloister_budget.ledger import Ledger
from cloister_budget.log import AuditLog
from cloister_budget.loss import UNIT
from cloister_budget.tables import Account, ChargeRow
from cloister_data.errors import BudgetRefusedError, ConflictError
from tests.cloister_budget.test_crash import check
from tests.fakes.ledgers import POPULATION, HandClock, laplace, ready, reservation, training

pytestmark = pytest.mark.postgres
SHARED = [f"{number:032x}" for number in range(10)]
"""Requests that both guards are sent."""


def guard(url: str, name: str, go: Connection, told: Connection) -> None:
    """Serve the shared requests and some of its own until the limit is reached."""
    database = open_database(url)
    ledger = Ledger(HandClock())
    log = AuditLog(Ed25519PrivateKey.generate(), f"{name}.example/log", HandClock())
    told.send("ready")
    go.recv()
    paid: list[tuple[str, str]] = []
    own = (f"{name}{number:031x}" for number in range(1000))
    for request in (*SHARED, *own):
        try:
            with database.write() as s:
                wanted = reservation([POPULATION, f"{POPULATION}:alice"], laplace("0.01"), request=request, epsilon=1.0)
                reserved = ledger.reserve(s, wanted)
                if reserved.fresh:
                    log.append(s, "reserved", {"charge": reserved.charge_id})
        except BudgetRefusedError:
            break
        if reserved.fresh:
            with database.write() as s:
                ledger.commit(s, reserved.charge_id)
                log.append(s, "settled", {"charge": reserved.charge_id})
        paid.append((request, reserved.charge_id))
    told.send(paid)
    database.close()


def test_two_guards_never_get_past_one_limit_and_write_one_log(postgres: Callable[[], str]) -> None:
    url = postgres()
    database = open_database(url)
    ready(database, 0.5, alice=0.5)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.cloister_budget.crashing"])
    guards = []
    for name in ("a", "b"):
        (go_here, go_there), (told_here, told_there) = context.Pipe(), context.Pipe()
        process = context.Process(target=guard, args=(url, name, go_there, told_there))
        process.start()
        guards.append((process, go_here, told_here))
    for _, _, told in guards:
        assert told.recv() == "ready"
    for _, go, _ in guards:
        go.send("go")
    paid = [dict(told.recv()) for _, _, told in guards]
    for process, _, _ in guards:
        process.join()
        assert process.exitcode == 0
    both = {request: (paid[0][request], paid[1][request]) for request in SHARED}
    assert all(one == other for one, other in both.values()), "a request was paid at both guards"
    assert len({*paid[0].values(), *paid[1].values()}) >= 50
    with database.read() as s:
        account = s.get_one(Account, POPULATION)
        # One more of them would not fit at any order, so not at infinity either, where they sum to epsilon.
        assert account.spent[-1] >= 0.5 * UNIT
        assert s.query(ChargeRow).count() == account.spent[-1] * 100 // UNIT
    check(database, [])
    database.close()


def test_a_charge_that_another_guard_settled_goes_no_further(postgres: Callable[[], str]) -> None:
    """A starting guard settles what is reserved, also what a living one runs: that training stops at its next mark."""
    url = postgres()
    first, second = open_database(url), open_database(url)
    ledger = ready(first, 10.0, alice=10.0)
    accounts = [POPULATION, f"{POPULATION}:alice"]
    with first.write() as s:
        running = ledger.reserve(s, reservation(accounts, training(steps=20), epsilon=1.0)).charge_id
        ledger.mark(s, running, 5)
    with second.write() as s:
        assert Ledger(HandClock()).settle_dead(s) == [running]
    with pytest.raises(ConflictError), first.write() as s:
        ledger.mark(s, running, 10)
    assert marked(first, running) == 5
    first.close()
    second.close()


def marked(database: Database, charge: str) -> int:
    with database.read() as s:
        return s.get_one(ChargeRow, charge).steps_marked
