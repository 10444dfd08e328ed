"""Accounts of a divided population: each part pays for what is about its own units, on SQLite and PostgreSQL."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest

from cloister_budget.database import Database
from cloister_budget.ledger import Ledger
from cloister_budget.limits import MAX_ACCOUNTS, group_account, population_account, population_of, user_account
from cloister_budget.orders import Orders
from cloister_budget.past import account_histories, past_requests
from cloister_budget.tables import Account, Population
from cloister_budget.whatif import replay
from cloister_data.accounts import AccountView
from cloister_data.errors import BudgetRefusedError, InvalidRequestError, PolicyRefusedError
from cloister_data.mechanism import DpSgd
from cloister_data.policy import Group, Limit, Policy
from tests.fakes.ledgers import POPULATION, HandClock, laplace, policy, reservation, training

PARTS = ("north", "south", "east")
WHOLE = POPULATION


def divided(database: Database, parts: tuple[str, ...] = PARTS, limit: float = 1.0, **changes: Any) -> Ledger:
    """A ledger whose every request comes a second after the last one."""
    ledger = Ledger(itertools.count(HandClock().now).__next__)
    draft = Policy.model_validate({**policy(limit, alice=limit, bob=limit).model_dump(), **changes})
    with database.write() as s:
        ledger.set_limits(s, POPULATION, draft, parts)
    return ledger


def pay(
    database: Database,
    ledger: Ledger,
    part: str | None,
    epsilon: str = "0.25",
    user: str = "alice",
    settle: bool = True,
) -> str:
    """Pay a statistic about one part, or about the whole; its charge."""
    asked = {} if part is None else {POPULATION: part}
    sources = [{"dataset": "hospital-a/records", "policy_version": 1, "population": POPULATION, "division": part}]
    with database.write() as s:
        wanted = reservation(ledger.account_ids(s, [POPULATION], user, asked), laplace(epsilon), user=user)
        named = {**vars(wanted), "sources_json": json.dumps(sources), "operation": "mean"}
        charge = ledger.reserve(s, type(wanted)(**named)).charge_id
        if settle:
            ledger.commit(s, charge)
    return charge


def paid(database: Database, ledger: Ledger, wanted: Sequence[str | None]) -> list[bool]:
    """Whether each of these was admitted, one after the other."""
    outcomes = []
    for part in wanted:
        try:
            pay(database, ledger, part)
        except BudgetRefusedError:
            outcomes.append(False)
        else:
            outcomes.append(True)
    return outcomes


def used(database: Database, ledger: Ledger) -> dict[str, float]:
    return {view.account: view.used_share for view in views(database, ledger)}


def views(database: Database, ledger: Ledger) -> list[AccountView]:
    with database.read() as s:
        return ledger.account_views(s, "alice")


def test_parts_admit_as_many_times_as_there_are_what_the_whole_admits(database: Database) -> None:
    ledger = divided(database)
    assert paid(database, ledger, [*PARTS] * 4) == [True] * 12
    assert paid(database, ledger, [*PARTS, None]) == [False] * 4
    assert set(used(database, ledger).values()) == {1.0}


def test_the_whole_is_charged_to_every_part(database: Database) -> None:
    ledger = divided(database)
    assert paid(database, ledger, [None] * 4) == [True] * 4
    assert paid(database, ledger, [None, *PARTS]) == [False] * 4
    assert len(used(database, ledger)) == 2 * len(PARTS)


def test_the_whole_after_parts_and_parts_after_the_whole(database: Database) -> None:
    ledger = divided(database)
    assert paid(database, ledger, ["north", "north", "south", None]) == [True] * 4
    assert used(database, ledger)[population_account(WHOLE, "north")] == 0.75
    assert used(database, ledger)[user_account(WHOLE, "alice", "south")] == 0.5
    assert used(database, ledger)[user_account(WHOLE, "alice", "east")] == 0.25
    # The whole fits as long as its fullest part has room, each part as long as it has.
    assert paid(database, ledger, [None, None, "north"]) == [True, False, False]
    assert paid(database, ledger, ["south", "south", "east", "east", "east"]) == [True, False, True, True, False]


def test_a_refusal_names_the_part_and_charges_no_other(database: Database) -> None:
    ledger = divided(database)
    assert paid(database, ledger, ["south"] * 4) == [True] * 4
    before = used(database, ledger)
    with pytest.raises(BudgetRefusedError, match=r"patients\[south\]") as caught:
        pay(database, ledger, None)
    assert caught.value.budget is not None
    assert caught.value.budget.left == 0
    assert used(database, ledger) == before


def test_users_share_the_account_of_a_part(database: Database) -> None:
    ledger = divided(database)
    for user, part in (("alice", "north"), ("bob", "north"), ("alice", "south")):
        pay(database, ledger, part, "0.5", user)
    with pytest.raises(BudgetRefusedError, match=r"over the budget of hospital-a/patients\[north\]\."):
        pay(database, ledger, "north", "0.1", "bob")
    pay(database, ledger, "south", "0.5", "bob")


def test_a_training_gives_back_to_its_part_alone(database: Database) -> None:
    ledger = divided(database, limit=5.0)
    mechanism: DpSgd = training(steps=100)
    with database.write() as s:
        ids = ledger.account_ids(s, [WHOLE], "alice", {WHOLE: "east"})
        charge = ledger.reserve(s, reservation(ids, mechanism)).charge_id
        ledger.mark(s, charge, 30)
        ledger.commit(s, charge)
    with database.read() as s:
        rows = {row.id: row for row in s.query(Account)}
    assert ids == [population_account(WHOLE, "east"), user_account(WHOLE, "alice", "east")]
    for name, row in rows.items():
        assert any(row.spent) == (name in ids)
        assert not any(row.reserved)


def test_an_unknown_part_is_refused_and_costs_nothing(database: Database) -> None:
    ledger = divided(database)
    for part in ("west", "", "north]"):
        with pytest.raises(InvalidRequestError, match="no part"):
            pay(database, ledger, part)
    with pytest.raises(PolicyRefusedError):
        pay(database, ledger, "north", user="mallory")
    assert set(used(database, ledger).values()) == {0.0}


def test_an_undivided_population_has_no_part(database: Database) -> None:
    ledger = divided(database, parts=())
    with pytest.raises(InvalidRequestError, match="no part"):
        pay(database, ledger, "north")
    pay(database, ledger, None)
    assert set(used(database, ledger)) == {WHOLE, user_account(WHOLE, "alice")}
    assert [view.part for view in views(database, ledger)] == [None, None]


def test_the_first_limits_fix_the_parts(database: Database) -> None:
    ledger = divided(database)
    pay(database, ledger, "north", "0.5")
    members = Group(limit=Limit(epsilon=0.25, delta=1e-5), members=("alice",))
    with database.write() as s:
        draft = policy(1.0, alice=1.0, carol=1.0).model_copy(update={"groups": {"team": members}})
        ledger.set_limits(s, POPULATION, draft, ("here", "there"))
        assert s.get_one(Population, POPULATION).parts == PARTS
        ids = ledger.account_ids(s, [POPULATION], "alice")
    assert set(ids) == {
        each
        for part in PARTS
        for each in (
            population_account(WHOLE, part),
            user_account(WHOLE, "alice", part),
            group_account(WHOLE, "team", part),
        )
    }
    # Accounts that were there keep what was spent; new ones begin empty in every part.
    assert used(database, ledger)[user_account(WHOLE, "alice", "north")] == 0.5
    with pytest.raises(BudgetRefusedError, match="@team"):
        pay(database, ledger, "south", "0.5")
    pay(database, ledger, "south", "0.25")


def test_no_two_accounts_share_an_id() -> None:
    """Parts may be called like anything that an id is made of."""
    parts = ("a", "a]", "a]:alice", "a]:@team", "[a", ":alice", "@team", "]", "[", "a[b]", "a]:alice[")
    makers = [
        lambda part: population_account("h/p", part),
        lambda part: user_account("h/p", "alice", part),
        lambda part: user_account("h/p", "a", part),
        lambda part: group_account("h/p", "team", part),
    ]
    ids = [maker(part) for part, maker in itertools.product((None, *parts), makers)]
    assert len(set(ids)) == len(ids)
    assert {population_of(each) for each in ids} == {"h/p"}


def test_what_was_paid_is_read_back_with_its_part_and_put_to_a_draft(database: Database) -> None:
    ledger = divided(database)
    for part in ("north", None, "south", "north"):
        pay(database, ledger, part)
    with database.read() as s:
        found = past_requests(s, POPULATION)
        histories = {each.account: each for each in account_histories(s, list(used(database, ledger)))}
        row = s.get_one(Population, POPULATION)
        orders = Orders(row.orders, row.deltas)
    assert [each.part for each in found] == ["north", None, "south", "north"]
    for account, share in used(database, ledger).items():
        assert histories[account].points[-1].used_share == share
    assert replay(found, policy(1.0, alice=1.0), orders, "simulated", PARTS) == ()
    half = policy(0.5, alice=0.5)
    refused = replay(found, half, orders, "simulated", PARTS)
    assert [change.past.part for change in refused] == ["north"]
    assert "in north" in refused[0].reason
    # The control: without its parts the same population would have had room for two of the four.
    assert (
        len(replay([each.__class__(**{**vars(each), "part": None}) for each in found], half, orders, "simulated")) == 2
    )


def test_a_request_to_sixteen_parts_and_one_that_is_charged_too_widely(database: Database) -> None:
    parts = tuple(f"site {number}" for number in range(16))
    many = {f"g{number}": Group(limit=Limit(epsilon=1.0, delta=1e-5), members=("bob",)) for number in range(31)}
    ledger = divided(database, parts, groups=many)
    pay(database, ledger, None)
    with database.write() as s:
        ids = ledger.account_ids(s, [WHOLE], "alice")
        assert len(ids) == len(set(ids)) == 32
        with pytest.raises(InvalidRequestError, match=f"at most {MAX_ACCOUNTS}"):
            ledger.account_ids(s, [WHOLE], "bob")
        assert len(ledger.account_ids(s, [WHOLE], "bob", {WHOLE: "site 3"})) == 33
        wide = {f"g{number}": many[f"g{number}"] for number in range(30)}
        ledger.set_limits(s, WHOLE, policy(1.0, alice=1.0, bob=1.0).model_copy(update={"groups": wide}))
    pay(database, ledger, None, user="bob")
    with database.read() as s:
        assert len(ledger.account_ids(s, [WHOLE], "bob")) == MAX_ACCOUNTS
