"""The policy's decision: everything is refused unless every rule admits it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from cloister_budget.policy import RULES, AccessRequest, decide, decide_transfer
from cloister_data.policy import Policy
from tests.fakes.ledgers import policy

GOOD = AccessRequest("alice", "mean", 0.5, "simulated", "user", "hospital-a/records")
NOW = 1_800_000_000
TIGHT = {"epsilon": 1, "delta": 1e-5, "epsilon_cap": 0.4}


def changed(**update: Any) -> Policy:
    return Policy.model_validate({**policy(1.0, alice=1.0).model_dump(), **update})


def test_a_request_within_every_rule_is_admitted() -> None:
    assert decide(GOOD, policy(1.0, alice=1.0), NOW).allowed
    assert decide(GOOD, changed(expires=NOW + 1), NOW).allowed
    assert decide(dataclasses.replace(GOOD, epsilon=10.0), policy(1.0, alice=1.0), NOW).allowed


@pytest.mark.parametrize(
    ("rule", "request_update", "policy_update"),
    [
        ("dataset", {"dataset": "hospital-b/records"}, {}),
        ("expired", {}, {"expires": NOW}),
        ("suspended", {}, {"suspended": True}),
        ("suspended", {}, {"suspended_users": ("alice",)}),
        ("user", {"user": "mallory"}, {}),
        ("user", {}, {"users": {}}),
        ("operation", {"operation": "train"}, {"operations": ("mean",)}),
        ("operation", {}, {"operations": ()}),
        ("epsilon", {"epsilon": 0.0}, {}),
        ("epsilon", {"epsilon": -1.0}, {}),
        ("epsilon", {"epsilon": math.nan}, {}),
        ("epsilon", {"epsilon": math.inf}, {}),
        ("epsilon_cap", {"epsilon": 10.001}, {}),
        ("account", {}, {"users": {"alice": {"epsilon": 1, "delta": 1e-5, "epsilon_cap": 0.4}}}),
        ("account", {}, {"users": {"alice": {"epsilon": 1, "delta": 1e-5, "expires": NOW}}}),
        ("account", {}, {"population_limit": {"epsilon": 1, "delta": 1e-5, "epsilon_cap": 0.4}}),
        ("account", {}, {"groups": {"team": {"limit": TIGHT, "members": ("bob", "alice")}}}),
        ("platform", {"platform": "simulated"}, {"platforms": ("sev-snp", "tdx")}),
        ("platform", {}, {"platforms": ()}),
        ("sandbox", {}, {"minimum_sandbox": "confined"}),
        ("sandbox", {"sandbox": "none"}, {"minimum_sandbox": "user"}),
    ],
)
def test_each_rule_refuses_by_its_name(
    rule: str, request_update: dict[str, Any], policy_update: dict[str, Any]
) -> None:
    decision = decide(dataclasses.replace(GOOD, **request_update), changed(**policy_update), NOW)
    assert not decision.allowed
    assert decision.rule == rule
    assert decision.reason.endswith(".")


def test_every_rule_has_a_test_and_the_first_one_decides() -> None:
    assert [name for name, _ in RULES] == [
        "dataset", "suspended", "expired", "user", "operation", "epsilon", "epsilon_cap", "account", "platform",
        "sandbox",
    ]  # fmt: skip
    both = dataclasses.replace(GOOD, user="mallory", operation="train")
    assert decide(both, changed(operations=("mean",), expires=1), NOW).rule == "expired"


def test_a_request_from_outside_a_kernel_needs_no_sandbox() -> None:
    assert decide(dataclasses.replace(GOOD, sandbox=None), changed(minimum_sandbox="confined"), NOW).allowed


def test_a_member_of_a_group_needs_no_limit_alone() -> None:
    team = {"team": {"limit": {"epsilon": 1, "delta": 1e-5}, "members": ("alice",)}}
    assert decide(GOOD, changed(users={}, groups=team), NOW).allowed
    assert not decide(dataclasses.replace(GOOD, user="bob"), changed(users={}, groups=team), NOW).allowed


def test_terms_of_other_accounts_do_not_bind() -> None:
    others = {"team": {"limit": TIGHT, "members": ("bob",)}}
    assert decide(GOOD, changed(groups=others, suspended_users=("bob",)), NOW).allowed
    just_within = {"alice": {"epsilon": 1, "delta": 1e-5, "epsilon_cap": 0.5, "expires": NOW + 1}}
    assert decide(GOOD, changed(users=just_within), NOW).allowed


def test_one_policy_that_names_the_user_and_forbids_transfers_decides() -> None:
    allows = changed(dataset="hospital-z/open", transfers="allowed")
    forbids = changed(dataset="hospital-b/closed", transfers="forbidden")
    assert decide_transfer("alice", []).allowed
    assert decide_transfer("alice", [allows]).allowed
    refused = decide_transfer("alice", [allows, forbids])
    assert (refused.allowed, refused.rule) == (False, "transfers")
    assert "hospital-b/closed" in refused.reason
    # Whatever else the policy says: what it gave out before may be in the kernel.
    for update in ({"expires": 1}, {"suspended": True}, {"suspended_users": ("alice",)}, {"operations": ()}):
        assert not decide_transfer("alice", [Policy.model_validate({**forbids.model_dump(), **update})]).allowed
    team = {"team": {"limit": {"epsilon": 1, "delta": 1e-5}, "members": ("alice",)}}
    grouped = Policy.model_validate({**forbids.model_dump(), "users": {}, "groups": team})
    assert not decide_transfer("alice", [grouped]).allowed
    # The control: nobody else is bound by it.
    assert decide_transfer("bob", [allows, forbids, grouped]).allowed
