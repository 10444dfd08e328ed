"""Accounts of users and groups: who is bound by which, their caps and expiries, on SQLite and PostgreSQL."""

from __future__ import annotations

import pytest

from cloister_budget.database import Database
from cloister_budget.ledger import Ledger
from cloister_budget.limits import group_account, user_account
from cloister_data.errors import BudgetRefusedError, PolicyRefusedError
from cloister_data.policy import Group, Limit, Policy
from tests.fakes.ledgers import POPULATION, HandClock, laplace, policy, reservation

ALICE, TEAM = user_account(POPULATION, "alice"), group_account(POPULATION, "team")


def put(database: Database, ledger: Ledger, **changes: object) -> Policy:
    draft = Policy.model_validate({**policy(2.0, alice=1.0, bob=1.0).model_dump(), **changes})
    with database.write() as s:
        ledger.set_limits(s, POPULATION, draft)
    return draft


def team(epsilon: float, *members: str, **terms: object) -> dict[str, Group]:
    limit = Limit.model_validate({"epsilon": epsilon, "delta": 1e-5, **terms})
    return {"team": Group(limit=limit, members=members)}


def pay(database: Database, ledger: Ledger, user: str, epsilon: str) -> None:
    with database.write() as s:
        ids = ledger.account_ids(s, [POPULATION], user)
        ledger.reserve(s, reservation(ids, laplace(epsilon), user=user, epsilon=float(epsilon)))


def ids(database: Database, ledger: Ledger, user: str) -> list[str]:
    with database.read() as s:
        return ledger.account_ids(s, [POPULATION], user)


def test_a_group_shares_one_account(database: Database) -> None:
    ledger = Ledger(HandClock())
    put(database, ledger, groups=team(0.5, "alice", "bob"))
    assert ids(database, ledger, "alice") == [POPULATION, TEAM, ALICE]
    pay(database, ledger, "alice", "0.25")
    pay(database, ledger, "bob", "0.25")
    for user in ("alice", "bob"):
        with pytest.raises(BudgetRefusedError, match="@team"):
            pay(database, ledger, user, "0.1")
    # The positive control: alone, each of them would have had 0.75 left.
    put(database, ledger)
    pay(database, ledger, "alice", "0.5")


def test_members_may_have_no_account_alone_and_leave_a_group(database: Database) -> None:
    ledger = Ledger(HandClock())
    put(database, ledger, users={}, groups=team(0.5, "carol", "dave"))
    assert ids(database, ledger, "carol") == [POPULATION, TEAM]
    with pytest.raises(PolicyRefusedError):
        ids(database, ledger, "alice")
    put(database, ledger, users={}, groups=team(0.5, "dave"))
    with pytest.raises(PolicyRefusedError):
        ids(database, ledger, "carol")
    assert ids(database, ledger, "dave") == [POPULATION, TEAM]


def test_another_datasets_policy_about_the_same_people_unbinds_nobody(database: Database) -> None:
    ledger = Ledger(HandClock())
    put(database, ledger, groups=team(0.5, "alice"))
    put(database, ledger, dataset="hospital-a/images", users={"alice": {"epsilon": 1.0, "delta": 1e-5}})
    assert ids(database, ledger, "alice") == [POPULATION, TEAM, ALICE]


def test_a_group_keeps_what_was_spent_when_it_is_named_again(database: Database) -> None:
    ledger = Ledger(HandClock())
    put(database, ledger, groups=team(0.5, "alice"))
    pay(database, ledger, "alice", "0.5")
    put(database, ledger)
    put(database, ledger, groups=team(0.5, "alice", "bob"))
    with pytest.raises(BudgetRefusedError):
        pay(database, ledger, "bob", "0.1")


def test_an_account_has_its_own_cap_and_expiry(database: Database) -> None:
    clock = HandClock()
    ledger = Ledger(clock)
    alice = {"epsilon": 1.0, "delta": 1e-5, "epsilon_cap": 0.2, "expires": clock.now + 10}
    put(database, ledger, users={"alice": alice, "bob": {"epsilon": 1.0, "delta": 1e-5}})
    with pytest.raises(PolicyRefusedError, match="cap"):
        pay(database, ledger, "alice", "0.25")
    pay(database, ledger, "alice", "0.2")
    pay(database, ledger, "bob", "0.25")
    clock.now += 10
    with pytest.raises(PolicyRefusedError, match="expired"):
        pay(database, ledger, "alice", "0.1")
    pay(database, ledger, "bob", "0.25")


def test_a_paid_request_is_answered_again_after_its_account_expired(database: Database) -> None:
    clock = HandClock()
    ledger = Ledger(clock)
    put(database, ledger, groups=team(1.0, "alice", expires=clock.now + 10))
    wanted = reservation(ids(database, ledger, "alice"), laplace("0.1"), request="a" * 32)
    with database.write() as s:
        first = ledger.reserve(s, wanted)
    clock.now += 60
    with database.write() as s:
        again = ledger.reserve(s, wanted)
    assert (again.charge_id, again.fresh) == (first.charge_id, False)


def test_views_show_groups_members_and_the_guarantee(database: Database) -> None:
    ledger = Ledger(HandClock())
    put(database, ledger, groups=team(0.5, "alice", "bob"))
    put(database, ledger, groups=team(0.25, "alice", "bob", epsilon_cap=0.1))
    with database.read() as s:
        views = {view.account: view for view in ledger.account_views(s, "alice")}
    assert set(views) == {POPULATION, ALICE, TEAM}
    shown = views[TEAM]
    assert (shown.scope, shown.group, shown.members) == ("group", "team", ("alice", "bob"))
    assert (shown.limit.epsilon, shown.limit.epsilon_cap, shown.guarantee.epsilon) == (0.25, 0.1, 0.5)
