"""A guard that is killed at any moment: what it relied on is there, nothing is half-written, nothing is cheaper.

`make long` kills 500 on each database (CLOISTER_KILLS); a plain run of the tests kills a few.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cloister_budget import merkle
from cloister_budget.database import Database, open_database
from cloister_budget.log import reader, size
from cloister_budget.loss import Vector, part_of
from cloister_budget.tables import Account, ChargeAccount, ChargeRow, Leaf
from tests.cloister_budget.crashing import live
from tests.fakes.ledgers import ready

KILLS = int(os.environ.get("CLOISTER_KILLS", "6"))
LIVES_OF_ONE_DATABASE = 20
Fact = tuple[Any, ...]


def one_life(url: str, chance: random.Random) -> list[Fact]:
    """What a process said before it was killed: by its own hand around a statement, or by ours at any time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.cloister_budget.crashing"])
    ours, theirs = context.Pipe(duplex=False)
    moment = chance.randrange(1, 400) if chance.random() < 0.5 else None
    child = context.Process(target=live, args=(url, chance.getrandbits(32), moment, theirs))
    child.start()
    theirs.close()
    facts: list[Fact] = []
    try:
        facts.append(ours.recv())
        if moment is None:
            time.sleep(chance.uniform(0, 0.25))
            child.kill()
        while True:
            facts.append(ours.recv())
    except EOFError:
        pass
    finally:
        child.kill()
        child.join()
        ours.close()
    assert child.exitcode == -9, "it died of something else than the kill"
    return facts


def plus(left: Vector, right: Vector) -> Vector:
    return tuple(a + b for a, b in zip(left, right, strict=True))


def check(database: Database, facts: list[Fact]) -> None:
    """Every invariant, on what the dead process left."""
    with database.read() as s:
        charges = {row.id: row for row in s.query(ChargeRow)}
        check_facts(charges, facts)
        requests = [(row.user, row.request_id) for row in charges.values()]
        assert len(requests) == len(set(requests)), "a request was paid twice"
        parts: dict[str, list[ChargeAccount]] = {}
        for part in s.query(ChargeAccount):
            parts.setdefault(part.account, []).append(part)
        for account in s.query(Account):
            found = parts.get(account.id, [])
            assert {part.charge for part in found} == set(charges), "a charge isn't on every account"
            check_account(account, [(charges[part.charge], part.vector) for part in found])
        # Leaves and charges went in together: one for the reservation, one for the settlement.
        leaves = list(s.query(Leaf).order_by(Leaf.index))
        assert len(leaves) == len(charges) + sum(row.state != "reserved" for row in charges.values())
        assert merkle.root(size(s), reader(s)) == check_log(leaves)


def check_facts(charges: dict[str, ChargeRow], facts: list[Fact]) -> None:
    for kind, *rest in facts:
        if kind == "reserved":
            assert charges[rest[0]].request_id == rest[1], "a reservation that was relied on is gone"
        elif kind == "marked":
            assert charges[rest[0]].steps_marked >= rest[1], "a mark that was relied on is gone"
        elif kind in ("committed", "released"):
            assert charges[rest[0]].state == kind, "a settlement that was relied on is gone"
        elif kind == "recovered":
            assert all(charges[charge].state != "reserved" for charge in rest[0])
        elif kind == "repeated":
            assert (rest[1], rest[2]) == (rest[0], False), "a repeated request was paid again"


def check_account(account: Account, charges: list[tuple[ChargeRow, Vector]]) -> None:
    """It is the sum of its charges, at every order, and some order keeps what it holds within its budget."""
    spent = reserved = (0,) * (len(account.budgets) + 1)
    for row, vector in charges:
        whole = (*vector, row.direct_delta)
        assert (row.settled is None) == (row.state == "reserved")
        if row.steps_total is None:
            done = whole if row.state == "committed" else (0,) * len(whole)
        else:
            done = part_of(whole, row.steps_marked, row.steps_total)
        spent = plus(spent, done)
        if row.state == "reserved":
            reserved = plus(reserved, tuple(a - b for a, b in zip(whole, done, strict=True)))
    assert (*account.spent, account.direct_spent) == spent
    assert (*account.reserved, account.direct_reserved) == reserved
    *held, direct = plus(spent, reserved)
    pairs = zip(account.budgets, held, strict=True)
    assert any(0 < budget >= total for budget, total in pairs), "no order keeps what the account holds"
    assert direct <= account.direct_budget


def check_log(leaves: list[Leaf]) -> bytes:
    """The root, once each row holds the hashes that its leaf finishes."""
    tree = merkle.Growing()
    for index, leaf in enumerate(leaves):
        assert leaf.index == index
        hashes = b"".join(tree.add(merkle.leaf_hash(leaf.payload)))
        assert leaf.hashes == hashes, "the log's tree isn't the one of its leaves"
    return tree.root()


def kill(new_url: Callable[[], str], kills: int) -> None:
    chance = random.Random(kills)
    while kills > 0:
        url = new_url()
        database = open_database(url)
        ready(database, 50.0, alice=50.0)
        for _ in range(min(kills, LIVES_OF_ONE_DATABASE)):
            check(database, one_life(url, chance))
            kills -= 1
        database.close()


@pytest.mark.timeout(3600)
def test_a_guard_killed_anywhere_leaves_every_invariant(
    request: pytest.FixtureRequest, kind: str, tmp_path: Path
) -> None:
    if kind == "postgresql":
        kill(request.getfixturevalue("postgres"), KILLS)
        return
    numbers = iter(range(1_000_000))
    kill(lambda: f"sqlite:///{tmp_path / f'{next(numbers)}.db'}", KILLS)


def test_the_check_sees_a_mark_without_its_loss_and_a_charge_without_its_leaf(sqlite: Database) -> None:
    """The positive control: transactions that a crash had torn would be noticed."""
    from tests.fakes.ledgers import POPULATION, laplace, reservation

    ledger = ready(sqlite, 1.0, alice=1.0)
    accounts = [POPULATION, f"{POPULATION}:alice"]
    with sqlite.write() as s:
        charge = ledger.reserve(s, reservation(accounts, laplace("0.1"))).charge_id
    with pytest.raises(AssertionError):
        check(sqlite, [])
    with sqlite.write() as s:
        s.get_one(Account, POPULATION).reserved = (0,) * 15
    with sqlite.read() as s, pytest.raises(AssertionError):
        check_account(s.get_one(Account, POPULATION), [(s.get_one(ChargeRow, charge), (1,) * 15)])
