"""Requests for more budget: asked, refused with a reason, granted by a signed policy; both sides see it."""

import secrets
import sqlite3

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.requests import budget_requests, request_budget
from cloister.transport import Transport
from cloister_data.accounts import AccountHistoryList, AccountList, WhatIf
from cloister_data.errors import (
    CloisterError,
    ConflictError,
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    PolicyRefusedError,
    TooManyRequestsError,
)
from cloister_data.events import Event, RequestEvent
from cloister_data.owner import sign_policy
from cloister_data.policy import SignedPolicy
from cloister_data.release import Release
from cloister_data.requests import BudgetAnswer, BudgetRequest, BudgetRequestList, BudgetRequestView
from cloister_data.statistics import QueryRequest, Question
from tests.fakes.data import PEOPLE, people
from tests.fakes.running import RunningCloister, make_policy, running_cloister

DATASET = "req-owner/people"


@pytest.fixture(scope="module")
def ready(shared_cloister: RunningCloister) -> RunningCloister:
    for user in ("req-ann", "req-bob", "req-eve"):
        shared_cloister.add_user(user, "scientist")
    shared_cloister.add_user("req-rival", "owner")
    shared_cloister.upload(DATASET, people(50), PEOPLE, make_policy(DATASET, {"req-ann": 1.0, "req-bob": 1.0}))
    return shared_cloister


def ask(found: RunningCloister, user: str, epsilon: float = 2.0) -> BudgetRequestView:
    wanted = BudgetRequest(dataset=DATASET, epsilon=epsilon, reason="A <second> cohort.")
    return found.session(user).transport.call("POST", "/requests", wanted, BudgetRequestView)


def answer(found: RunningCloister, user: str, request: str, given: BudgetAnswer) -> BudgetRequestView:
    path = f"/requests/{request}/answer"
    return found.session(user).transport.call("POST", path, given, BudgetRequestView)


def signed(found: RunningCloister, version: int, ann: float, key: Ed25519PrivateKey | None = None) -> SignedPolicy:
    policy = make_policy(DATASET, {"req-ann": ann, "req-bob": 1.0}, version=version)
    return sign_policy(policy, key or found.session("req-owner").profile.owner_key())


def limit(transport: Transport, user: str) -> float:
    accounts = transport.call("GET", "/accounts", None, AccountList).accounts
    return next(each.limit.epsilon for each in accounts if each.account == f"{DATASET}:{user}")


def test_a_request_is_granted_by_a_signed_policy_alone(ready: RunningCloister) -> None:
    ann = ready.session("req-ann").transport
    asked = ask(ready, "req-ann")
    assert (asked.state, asked.owner, asked.epsilon) == ("open", "req-owner", 2.0)
    assert ask(ready, "req-ann") == asked
    with pytest.raises(ConflictError):
        ask(ready, "req-ann", 3.0)
    grant = BudgetAnswer(granted=signed(ready, 2, 3.0))
    for user, given, error in (
        ("req-ann", grant, ForbiddenError),
        ("admin", grant, ForbiddenError),
        ("req-rival", grant, NotFoundError),
        ("req-owner", BudgetAnswer(granted=signed(ready, 2, 3.0, Ed25519PrivateKey.generate())), PolicyRefusedError),
        ("req-owner", BudgetAnswer(granted=signed(ready, 3, 3.0)), PolicyRefusedError),
        ("req-owner", BudgetAnswer(granted=signed(ready, 2, 1.0)), InvalidRequestError),
    ):
        with pytest.raises(error):
            answer(ready, user, asked.request, given)
        assert limit(ann, "req-ann") == 1.0
    # The positive control.
    view = answer(ready, "req-owner", asked.request, grant)
    assert (view.state, view.policy_version) == ("granted", 2)
    assert limit(ann, "req-ann") == 3.0
    with pytest.raises(ConflictError):
        answer(ready, "req-owner", asked.request, BudgetAnswer(refused="No."))
    assert [each.state for each in ann.call("GET", "/requests", None, BudgetRequestList).requests] == ["granted"]


def test_a_request_is_refused_with_a_reason_and_both_are_told(ready: RunningCloister) -> None:
    bob = ready.session("req-bob").transport
    asked = request_budget(DATASET, 5.0, "Because.", bob).requests[0]
    answer(ready, "req-owner", asked.request, BudgetAnswer(refused="Not this year."))
    (mine,) = budget_requests(bob)
    assert (mine.state, mine.answer, mine.policy_version) == ("refused", "Not this year.", None)
    assert "Not this year." in repr(budget_requests(bob))
    assert not ready.session("req-eve").transport.call("GET", "/requests", None, BudgetRequestList).requests
    theirs = ready.session("req-owner").transport.call("GET", "/requests", None, BudgetRequestList).requests
    assert asked.request in [each.request for each in theirs]
    # The log holds what happened, and no text.
    database = sqlite3.connect(ready.state / "cloister.db")
    payloads = b"".join(row[0] for row in database.execute("SELECT payload FROM leaves WHERE kind LIKE 'budget-%'"))
    database.close()
    assert payloads.count(asked.request.encode()) == 2
    assert b"Because" not in payloads
    assert b"Not this year" not in payloads


def test_a_draft_is_put_to_the_past_by_its_owner_alone_and_changes_nothing(ready: RunningCloister) -> None:
    name = "req-owner/past"
    ready.upload(name, people(50), PEOPLE, make_policy(name, {"req-ann": 1.0, "req-bob": 1.0}))
    question = Question.model_validate({"source": {"dataset": name}, "operation": "count"})
    for user in ("req-ann", "req-bob"):
        request = QueryRequest(request_id=secrets.token_hex(16), question=question, epsilon=0.25)
        ready.session(user).transport.call("POST", "/queries", request, Release)
    ann, owner = ready.session("req-ann").transport, ready.session("req-owner").transport
    before = ann.call("GET", "/accounts", None, AccountList)
    draft = make_policy(name, {"req-ann": 0.1})
    for user, error in (("req-ann", ForbiddenError), ("admin", ForbiddenError), ("req-rival", NotFoundError)):
        with pytest.raises(error):
            ready.session(user).transport.call("POST", f"/datasets/{name}/what-if", draft, WhatIf)
    found = owner.call("POST", f"/datasets/{name}/what-if", draft, WhatIf)
    assert (found.requests, found.refused) == (2, 2)
    assert {(each.user, each.operation, each.rule) for each in found.changes} == {
        ("req-ann", "count", "budget"),
        ("req-bob", "count", "user"),
    }
    same = owner.call("POST", f"/datasets/{name}/what-if", make_policy(name, {"req-ann": 1, "req-bob": 1}), WhatIf)
    assert (same.requests, same.refused) == (2, 0)
    assert ann.call("GET", "/accounts", None, AccountList) == before
    histories = ann.call("GET", "/accounts/history", None, AccountHistoryList).histories
    used = {each.account: each.points[-1].used_share for each in histories if each.points}
    assert used[f"{name}:req-ann"] == next(e.used_share for e in before.accounts if e.account == f"{name}:req-ann")
    assert f"{name}:req-bob" not in used


def test_who_is_not_named_cannot_ask(ready: RunningCloister) -> None:
    with pytest.raises(NotFoundError):
        ask(ready, "req-eve")


@pytest.mark.parametrize("given", [b"{}", b'{"refused":""}', b'{"refused":"x","granted":null,"more":1}'])
def test_an_answer_is_one_of_the_two(ready: RunningCloister, given: bytes) -> None:
    with pytest.raises(CloisterError) as caught:
        ready.session("req-owner").transport.raw("POST", f"/requests/{'0' * 32}/answer", given, "application/json")
    assert caught.value.code == "invalid-request"


def test_the_event_names_the_request() -> None:
    event = Event(id="0" * 16 + "-1", at=1, body=RequestEvent(request="a" * 32, state="granted"))
    assert Event.from_json(event.to_json()) == event


def test_refusals_of_one_user_are_rationed() -> None:
    with running_cloister("refusals_per_minute = 3") as own:
        for user in ("ann", "bob"):
            own.add_user(user, "scientist")
        own.upload(DATASET, people(50), PEOPLE, make_policy(DATASET, {"ann": 1.0, "bob": 1.0}, epsilon_cap=0.5))
        question = Question.model_validate({"source": {"dataset": DATASET}, "operation": "count"})

        def query(user: str, epsilon: float) -> Release:
            request = QueryRequest(request_id=secrets.token_hex(16), question=question, epsilon=epsilon)
            return own.session(user).transport.call("POST", "/queries", request, Release)

        for _ in range(3):
            with pytest.raises(PolicyRefusedError):
                query("ann", 0.9)
        for epsilon in (0.9, 0.1):
            with pytest.raises(TooManyRequestsError):
                query("ann", epsilon)
        assert query("bob", 0.1).estimates
