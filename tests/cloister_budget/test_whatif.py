"""Past requests put to a draft: pure, and in agreement with what the ledger itself does under the same policy."""

from __future__ import annotations

from typing import Any

import pytest

from cloister_budget.database import Database
from cloister_budget.ledger import Ledger
from cloister_budget.loss import part_of, rdp_vector
from cloister_budget.orders import freeze
from cloister_budget.past import account_histories, past_requests
from cloister_budget.whatif import PastRequest, replay
from cloister_data.policy import Policy
from tests.fakes.ledgers import POPULATION, laplace, policy, ready, reservation, training

BASE = policy(1.0, alice=1.0, bob=1.0)
ORDERS = freeze(BASE.population_limit)


def past(user: str, epsilon: str = "0.25", dataset: str = BASE.dataset, **changes: Any) -> PastRequest:
    vector = rdp_vector(laplace(epsilon), ORDERS)
    given: dict[str, Any] = {
        "charge": "0" * 32, "dataset": dataset, "user": user, "operation": "mean", "sandbox": None,
        "epsilon": float(epsilon), "at": 1000, "whole": vector, "executed": vector, "direct": 0,
    }  # fmt: skip
    return PastRequest(**given | changes)


def draft(**changes: Any) -> Policy:
    return Policy.model_validate({**BASE.model_dump(), **changes})


def rules(requests: list[PastRequest], **changes: Any) -> list[str]:
    return [change.rule for change in replay(requests, draft(**changes), ORDERS, "simulated")]


def test_the_policy_in_force_changes_nothing() -> None:
    assert rules([past("alice")] * 2 + [past("bob")] * 2) == []


LOW = {"epsilon": 0.25, "delta": 1e-5}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"operations": ("count",)}, ["operation"] * 4),
        ({"epsilon_cap": 0.2}, ["epsilon_cap"] * 4),
        ({"users": {"alice": {"epsilon": 1.0, "delta": 1e-5}}}, ["user"] * 2),
        ({"suspended_users": ("bob",)}, ["suspended"] * 2),
        ({"expires": 1000}, ["expired"] * 4),
        ({"expires": 1001}, []),
        ({"population_limit": {"epsilon": 0.5, "delta": 1e-5}}, ["budget"] * 2),
        ({"users": {"alice": LOW, "bob": LOW}}, ["budget"] * 2),
        ({"groups": {"team": {"limit": LOW, "members": ("alice", "bob")}}}, ["budget"] * 3),
    ],
)
def test_each_change_is_told_by_its_rule(changes: dict[str, Any], found: list[str]) -> None:
    assert rules([past("alice"), past("bob"), past("alice"), past("bob")], **changes) == found


def test_a_refused_request_costs_the_draft_nothing() -> None:
    half = {"population_limit": {"epsilon": 0.5, "delta": 1e-5}, "epsilon_cap": 0.3}
    assert rules([past("alice", "0.5"), past("bob"), past("alice")], **half) == ["epsilon_cap"]


def test_other_datasets_of_the_same_people_count_and_are_not_decided() -> None:
    others = [past("carol", dataset="hospital-a/images", operation="train") for _ in range(4)]
    assert rules([*others, past("alice")]) == ["budget"]
    assert rules([past("alice"), *others]) == []


def test_a_training_needs_room_for_all_and_leaves_what_it_did_not_execute() -> None:
    whole = rdp_vector(training(steps=100), ORDERS)
    wide = {"population_limit": {"epsilon": 50, "delta": 1e-5}, "users": {"alice": {"epsilon": 50, "delta": 1e-5}}}
    cut = past("alice", whole=whole, executed=part_of(whole, 1, 100), operation="train")
    assert rules([cut] * 3, **wide) == []
    assert rules([cut], users={"alice": {"epsilon": 0.01, "delta": 1e-5}}) == ["budget"]


def test_what_was_paid_is_read_back_and_agrees_with_the_ledger(database: Database) -> None:
    ledger = ready(database, 1.0, alice=1.0, bob=1.0)
    sources = f'[{{"dataset":"{BASE.dataset}","version":1,"policy_version":1,"population":"{POPULATION}"}}]'
    with database.write() as s:
        for user, epsilon in (("alice", "0.25"), ("bob", "0.5"), ("alice", "0.25")):
            wanted = reservation(ledger.account_ids(s, [POPULATION], user), laplace(epsilon), user=user)
            changed = {**vars(wanted), "sources_json": sources, "operation": "mean"}
            ledger.commit(s, ledger.reserve(s, type(wanted)(**changed)).charge_id)
            assert isinstance(ledger, Ledger)
    with database.read() as s:
        found = past_requests(s, POPULATION)
        (everybody,) = account_histories(s, [POPULATION])
        (view,) = [each for each in ledger.account_views(s) if each.account == POPULATION]
    assert [(each.user, each.operation) for each in found].count(("alice", "mean")) == 2
    assert replay(found, BASE, ORDERS, "simulated") == ()
    small = draft(population_limit={"epsilon": 0.5, "delta": 1e-5})
    assert replay(found, small, ORDERS, "simulated")
    assert everybody.points[-1].used_share == view.used_share == 1.0
