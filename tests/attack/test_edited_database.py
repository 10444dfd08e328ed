"""Somebody edits the database, of a guard that runs or is stopped: no limit is raised and no spending is forgotten."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import sqlite3
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import cloister.profile
import cloister.session
from cloister_budget import merkle
from cloister_data.checkpoint import Checkpoint
from cloister_data.datasets import PolicyView, SplitRef
from cloister_data.errors import AttestationRefusedError, BudgetRefusedError, CloisterError, StorageError
from cloister_data.owner import public_bytes, sign_policy
from cloister_data.policy import Policy
from cloister_data.release import Release, ReleaseList
from cloister_data.statistics import QueryRequest, Question
from tests.fakes.data import PEOPLE, people
from tests.fakes.running import RunningCloister, make_policy, running_cloister

DATASET = "edit/people"
ACCOUNT = f"{DATASET}:ann"


class House:
    """A cloister of its own, and the hands of somebody who has its database and the passwords, but no key."""

    def __init__(self, cloister: RunningCloister) -> None:
        self.cloister = cloister
        for name in ("ann", "bob"):
            cloister.add_user(name, "scientist")
        cloister.upload(DATASET, people(100), PEOPLE, make_policy(DATASET, {"ann": 1.0}))
        self.key = cloister.session("edit").profile.owner_key()

    def sql(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        with contextlib.closing(sqlite3.connect(self.cloister.state / "cloister.db", timeout=30)) as database:
            rows = database.execute(statement, values).fetchall()
            database.commit()
            return rows

    def ask(self, epsilon: float, user: str = "ann") -> Release:
        question = Question(source=SplitRef(dataset=DATASET), operation="count")
        request = QueryRequest(request_id=secrets.token_hex(16), question=question, epsilon=epsilon)
        return self.cloister.session(user).transport.call("POST", "/queries", request, Release)

    def put(self, policy: Policy, key: Ed25519PrivateKey | None = None) -> PolicyView:
        signed = sign_policy(policy, key or self.key)
        return self.cloister.session("edit").transport.call("PUT", f"/datasets/{DATASET}/policy", signed, PolicyView)

    def answers(self) -> int:
        found = self.cloister.session("ann").transport.call("GET", "/releases", None, ReleaseList)
        return len(found.releases)

    def forget(self) -> None:
        (spent,) = self.sql("SELECT spent FROM accounts WHERE id = ?", ACCOUNT)[0]
        self.sql("UPDATE accounts SET spent = ?", json.dumps([0] * len(json.loads(spent))))

    def append(self, facts: dict[str, Any]) -> int:
        """Add an entry with the hashes of a true tree; its index. Nobody has signed for it yet."""
        known = dict(self.sql('SELECT "index", hashes FROM leaves'))
        index = len(known)
        (at,) = self.sql("SELECT MAX(at) FROM leaves")[0]
        payload = json.dumps({"at": at, "facts": facts, "index": index, "v": 1}, sort_keys=True, separators=(",", ":"))

        def read(level: int, place: int) -> bytes:
            return bytes(known[((place + 1) << level) - 1][32 * level : 32 * (level + 1)])

        tree = merkle.Growing(index, [read(level, place) for level, place in reversed(merkle.edge(index))])
        hashes = b"".join(tree.add(merkle.leaf_hash(payload.encode())))
        self.sql(
            'INSERT INTO leaves ("index", kind, at, payload, hashes) VALUES (?, ?, ?, ?, ?)',
            index, facts["kind"], at, payload.encode(), hashes,
        )  # fmt: skip
        return index

    def sign(self, key: Ed25519PrivateKey) -> None:
        """Sign for all entries that are there."""
        tree = merkle.Growing()
        for (payload,) in self.sql('SELECT payload FROM leaves ORDER BY "index"'):
            tree.add(merkle.leaf_hash(payload))
        body = Checkpoint("cloister/test-cloister", tree.size, tree.root()).body().encode()
        self.sql("UPDATE log_heads SET size = ?, signature = ?", tree.size, key.sign(body))

    def raise_limits(self) -> None:
        (budgets,) = self.sql("SELECT budgets FROM accounts WHERE id = ?", ACCOUNT)[0]
        self.sql("UPDATE accounts SET epsilon = 900, budgets = ?", json.dumps([10**15] * len(json.loads(budgets))))


@pytest.fixture
def house() -> Iterator[House]:
    with running_cloister() as cloister:
        yield House(cloister)


def refused_as_edited(house: House, epsilon: float, user: str = "ann") -> None:
    before = house.answers()
    with pytest.raises(StorageError, match="audit log"):
        house.ask(epsilon, user)
    assert house.answers() == before


def test_forgotten_spending_and_raised_limits_buy_nothing(house: House) -> None:
    house.ask(0.6)
    with pytest.raises(BudgetRefusedError):
        house.ask(0.6)
    house.forget()
    # The control: by its rows, the ledger would admit it; the guard's own books don't.
    assert json.loads(house.sql("SELECT spent FROM accounts WHERE id = ?", ACCOUNT)[0][0])[-1] == 0
    refused_as_edited(house, 0.6)
    house.raise_limits()
    refused_as_edited(house, 5.0)
    # What really fits is still answered: nobody is locked out by somebody else's edit.
    assert house.ask(0.1).charge.state == "committed"


def test_orders_at_which_everything_costs_less_buy_nothing(house: House) -> None:
    """A charge's loss is computed at its population's orders: near 1 it is far below what the budgets are for."""
    (orders,) = house.sql("SELECT orders FROM populations")[0]
    near_one = json.dumps([f"1.{number:04}" for number in range(1, len(json.loads(orders)) + 1)])
    house.sql("UPDATE populations SET orders = ?", near_one)
    refused_as_edited(house, 0.2)
    house.sql("UPDATE populations SET orders = ?", orders)
    # The control: at the orders that were frozen it is answered.
    assert house.ask(0.2).charge.state == "committed"


def test_an_older_or_another_policy_admits_nothing(house: House) -> None:
    house.put(make_policy(DATASET, {"ann": 0.1}, version=2))
    with pytest.raises(BudgetRefusedError):
        house.ask(0.5)
    house.sql("UPDATE datasets SET policy_version = 1")
    house.raise_limits()
    refused_as_edited(house, 0.5)
    house.sql("UPDATE datasets SET policy_version = 2")
    # A document that names somebody else, with an account to go with it.
    forged = make_policy(DATASET, {"ann": 0.1, "bob": 50.0}, version=2).canonical()
    house.sql("UPDATE policies SET document = ? WHERE version = 2", forged)
    columns = [row[1] for row in house.sql("PRAGMA table_info(accounts)")]
    others = ", ".join(f'"{name}"' for name in columns if name not in ("id", "user"))
    house.sql(
        f'INSERT INTO accounts (id, "user", {others}) SELECT ?, ?, {others} FROM accounts WHERE id = ?',
        f"{DATASET}:bob", "bob", ACCOUNT,
    )  # fmt: skip
    house.sql('INSERT INTO account_users (dataset, "user", account) VALUES (?, ?, ?)', DATASET, "bob", f"{DATASET}:bob")
    refused_as_edited(house, 0.05, "bob")


def test_another_owners_key_in_the_database_signs_nothing(house: House) -> None:
    thief = Ed25519PrivateKey.generate()
    house.sql("UPDATE owners SET public_key = ?", public_bytes(thief))
    with pytest.raises(StorageError, match="another key"):
        house.put(make_policy(DATASET, {"ann": 900.0}, version=2), thief)
    house.sql("UPDATE owners SET public_key = ?", public_bytes(house.key))
    # The control: the owner's own key does.
    assert house.put(make_policy(DATASET, {"ann": 2.0}, version=2)).signed.policy().version == 2


def test_a_stopped_guard_does_not_start_over_an_edited_log(house: House) -> None:
    house.ask(0.3)
    assert house.cloister.stop() == 0
    path = house.cloister.state / "cloister.db"
    shutil.copy(path, path.with_name("kept"))

    def starts() -> bool:
        try:
            house.cloister.restart()
        except AssertionError:
            return False
        return True

    def back() -> None:
        for leftover in path.parent.glob("cloister.db*"):
            leftover.unlink()
        shutil.copy(path.with_name("kept"), path)

    (last,) = house.sql('SELECT MAX("index") FROM leaves')[0]
    # An entry is changed, its hash left.
    index, payload = house.sql("""SELECT "index", payload FROM leaves WHERE kind = 'release'""")[0]
    house.sql('UPDATE leaves SET payload = ? WHERE "index" = ?', payload.replace(b"release", b"rebates"), index)
    assert not starts()
    back()
    # An entry in the midst of it is gone.
    house.sql('DELETE FROM leaves WHERE "index" = ?', last - 1)
    assert not starts()
    back()
    # Entries are cut off, and the head says so: nobody has signed for what is left.
    house.sql('DELETE FROM leaves WHERE "index" = ?', last)
    house.sql("UPDATE log_heads SET size = ?", last)
    assert not starts()
    back()
    # An entry is added as a guard would, but nobody can sign for it.
    house.append({"kind": "login", "user": "0" * 64})
    house.sql("UPDATE log_heads SET size = ?", last + 2)
    assert not starts()
    assert "signed for" in (house.cloister.base / "serve.log").read_text()
    back()
    # A start with a log key of somebody's own, who signs for all of it: no proven machine vouches for that key.
    key = Ed25519PrivateKey.generate()
    (previous,) = house.sql("SELECT payload FROM leaves WHERE kind = 'guard-started' ORDER BY \"index\" DESC")[0]
    begun = {
        **json.loads(previous)["facts"],
        "log_key": key.public_key().public_bytes_raw().hex(),
        "previous_key": json.loads(previous)["facts"]["log_key"],
    }
    for evidence in ("0" * 64, begun["evidence"]):
        forged = house.append({**begun, "evidence": evidence})
        house.sign(key)
        assert not starts(), evidence
        assert f"start at entry {forged}" in (house.cloister.base / "serve.log").read_text()
        back()
    # The control: as it was, it starts, and goes on from what was spent.
    assert starts()
    house.ask(0.3)
    with pytest.raises(CloisterError):
        house.ask(0.6)


def test_a_database_put_back_whole_is_refused_by_who_saw_more(house: House) -> None:
    path = house.cloister.state / "cloister.db"
    house.ask(0.3)
    assert house.cloister.stop() == 0
    shutil.copy(path, path.with_name("kept"))
    house.cloister.restart()
    house.ask(0.3)
    seen = cloister.profile.load("ann").remembered()
    assert seen is not None
    assert house.cloister.stop() == 0
    for leftover in path.parent.glob("cloister.db*"):
        leftover.unlink()
    shutil.copy(path.with_name("kept"), path)
    # The guard itself can't tell: it wrote this once.
    house.cloister.restart()
    # A test's cloister gets another port at each start, and what was seen belongs to an address.
    known = cloister.profile.new("witness", house.cloister.url, house.cloister.trust, "ann")
    known.remember(Checkpoint(seen.origin, seen.size, seen.root), seen.log_key)
    with pytest.raises(AttestationRefusedError, match="set back or replaced") as caught:
        cloister.session.open(known, need_token=False)
    assert seen.root.hex() in str(caught.value)
    # The control: for whoever saw nothing before, it is a cloister like any other.
    fresh = cloister.profile.new("newcomer", house.cloister.url, house.cloister.trust, "ann")
    cloister.session.open(fresh, need_token=False).close()


def test_a_name_that_is_given_to_another_one_s_ref_admits_nothing(house: House) -> None:
    """An owner of their own opens a dataset with endless limits, whose refs then get the names of somebody else's."""
    other = "thief/people"
    house.cloister.upload(other, people(100), PEOPLE, make_policy(other, {"ann": 900.0}))
    house.ask(0.6)
    assert house.cloister.stop() == 0
    house.sql("UPDATE names SET name = 'x/' || name WHERE name LIKE ?", f"{DATASET}%")
    house.sql("UPDATE names SET name = replace(name, ?, ?) WHERE name LIKE ?", other, DATASET, f"{other}%")
    forged = make_policy(DATASET, {"ann": 900.0})
    house.cloister.restart()
    thief = house.cloister.session("thief").profile.owner_key()
    house.sql("UPDATE datasets SET owner = 'thief' WHERE name = ?", DATASET)
    house.sql("UPDATE owners SET public_key = ?", public_bytes(thief))
    policy = forged.model_copy(update={"version": 2})
    with pytest.raises(StorageError, match="stands for another"):
        house.cloister.session("thief").transport.call(
            "PUT", f"/datasets/{DATASET}/policy", sign_policy(policy, thief), PolicyView
        )
    with pytest.raises(StorageError, match="stands for another"):
        house.ask(0.1)
