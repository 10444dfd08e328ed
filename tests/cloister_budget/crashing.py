"""A guard's life with the ledger, in a process that is killed: what it prints, it relies on."""

from __future__ import annotations

import os
import random
import signal
from multiprocessing.connection import Connection
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import event

from cloister_budget.database import Database, open_database
from cloister_budget.ledger import Ledger
from cloister_budget.log import AuditLog
from cloister_data.errors import BudgetRefusedError
from cloister_data.mechanism import ThresholdedHistogram
from tests.fakes.ledgers import POPULATION, HandClock, laplace, policy, reservation, training

ACCOUNTS = (POPULATION, f"{POPULATION}:alice")
TURNS = 400
HISTOGRAM = ThresholdedHistogram(bins=1, scale=10, threshold=200)
"""A statistic with a direct delta: a few dozen of them use up what is kept back for those."""


def die_at(database: Database, event_number: int) -> None:
    """Kill this process at the n-th moment around a statement, a commit or a rollback."""
    left = [event_number]

    def count(*_: Any) -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    for moment in ("before_cursor_execute", "after_cursor_execute", "commit", "rollback"):
        event.listen(database.engine, moment, count)


def live(url: str, seed: int, event_number: int | None, told: Connection) -> None:
    """Start like a guard, then pay, mark, settle, repeat requests and change limits until the end comes.

    With `event_number` the process kills itself at that moment; else its parent does.
    """
    chance = random.Random(seed)
    database = open_database(url)
    ledger = Ledger(HandClock())
    log = AuditLog(Ed25519PrivateKey.from_private_bytes(bytes(32)), "crash.example/log", HandClock())
    if event_number is not None:
        die_at(database, event_number)
    told.send(("ready",))
    with database.write() as s:
        dead = ledger.settle_dead(s)
        for charge in dead:
            log.append(s, "settled", {"charge": charge})
    told.send(("recovered", tuple(dead)))
    requests: list[tuple[str, str]] = []
    for turn in range(TURNS):
        if requests and chance.random() < 0.15:
            request, before = chance.choice(requests)
            with database.write() as s:
                again = ledger.reserve(s, reservation(ACCOUNTS, laplace("0.01"), request=request, epsilon=1.0))
            told.send(("repeated", before, again.charge_id, again.fresh))
            continue
        if chance.random() < 0.1:
            with database.write() as s:
                ledger.set_limits(s, POPULATION, policy(50.0 + turn % 3, alice=50.0))
            continue
        request = f"{chance.getrandbits(128):032x}"
        trains = chance.random() < 0.5
        statistic = HISTOGRAM if chance.random() < 0.3 else laplace("0.01")
        mechanism = training(steps=40, sigma=40.0) if trains else statistic
        try:
            with database.write() as s:
                charge = ledger.reserve(s, reservation(ACCOUNTS, mechanism, request=request, epsilon=1.0)).charge_id
                log.append(s, "reserved", {"charge": charge})
        except BudgetRefusedError:
            continue
        told.send(("reserved", charge, request))
        requests.append((request, charge))
        if not trains and chance.random() < 0.2:
            with database.write() as s:
                ledger.refund(s, charge)
                log.append(s, "settled", {"charge": charge})
            told.send(("released", charge))
            continue
        if trains:
            for steps in (10, 20):
                with database.write() as s:
                    ledger.mark(s, charge, steps)
                told.send(("marked", charge, steps))
        with database.write() as s:
            ledger.commit(s, charge)
            log.append(s, "settled", {"charge": charge})
        told.send(("committed", charge))
    signal.pause()
