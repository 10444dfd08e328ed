"""Questions through a real cloister: what they cost, what they answer, and that bad ones cost nothing."""

import secrets

import pytest

from cloister.transport import Transport
from cloister_data.accounts import AccountList
from cloister_data.datasets import DatasetList, DatasetView, SplitRef
from cloister_data.errors import (
    BudgetRefusedError,
    CloisterError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    PolicyRefusedError,
)
from cloister_data.release import Release, ReleaseList
from cloister_data.statistics import CostView, QueryCostRequest, QueryRequest, Question
from tests.fakes.data import PEOPLE, people
from tests.fakes.running import RunningCloister, make_policy

DATASET = "quest/people"
ROWS = 2000


@pytest.fixture(scope="module")
def ann(shared_cloister: RunningCloister) -> Transport:
    shared_cloister.add_user("quest-ann", "scientist")
    shared_cloister.add_user("quest-bob", "scientist")
    shared_cloister.upload(
        DATASET,
        people(ROWS),
        PEOPLE,
        make_policy(DATASET, {"quest-ann": 12.0}, epsilon_cap=10.0, operations=("count", "mean")),
    )
    return shared_cloister.session("quest-ann").transport


def question(operation: str = "mean", column: str | None = "height", **more: object) -> Question:
    return Question.model_validate({"source": {"dataset": DATASET}, "operation": operation, "column": column} | more)


def ask(transport: Transport, about: Question, epsilon: float, request_id: str | None = None) -> Release:
    request = QueryRequest(request_id=request_id or secrets.token_hex(16), question=about, epsilon=epsilon)
    return transport.call("POST", "/queries", request, Release)


def used(transport: Transport) -> dict[str, tuple[float, float]]:
    accounts = transport.call("GET", "/accounts", None, AccountList).accounts
    return {account.account: (account.used_share, account.reserved_share) for account in accounts}


def test_an_answer_is_close_charged_and_receipted(ann: Transport) -> None:
    before = used(ann)
    release = ask(ann, question(), 0.5)
    (estimate,) = release.estimates
    assert abs(estimate.value - people(ROWS).height.mean()) < 6 * estimate.error_95 + 0.1
    assert release.charge.state == "committed"
    assert release.charge.epsilon == pytest.approx(0.5)
    assert release.receipt.simulated
    assert release.receipt.sources[0].dataset == DATASET
    assert release.receipt.rollback == "not prevented"
    after = used(ann)
    assert after[f"{DATASET}:quest-ann"][0] > before[f"{DATASET}:quest-ann"][0]
    assert after[DATASET][0] > before[DATASET][0]
    assert all(reserved == 0 for _, reserved in after.values())
    assert release in ann.call("GET", "/releases", None, ReleaseList).releases


def test_groups_are_the_declared_ones(ann: Transport) -> None:
    release = ask(ann, question("mean", "height", group_by="ward"), 1.0)
    assert [estimate.group for estimate in release.estimates] == ["north", "south", "east"]
    truth = people(ROWS).groupby("ward").height.mean()
    for estimate in release.estimates:
        assert abs(estimate.value - truth[estimate.group]) < 6 * estimate.error_95 + 0.5


def test_the_parts_of_a_split_are_fixed_and_disjoint(ann: Transport) -> None:
    counts = [
        ask(
            ann,
            Question(source=SplitRef(dataset=DATASET, part=part, test=0.3), operation="count"),
            0.5,
        )
        .estimates[0]
        .value
        for part in ("train", "test")
    ]
    assert sum(counts) == pytest.approx(ROWS, abs=60)
    assert counts[1] == pytest.approx(0.3 * ROWS, abs=150)


def test_a_cost_spends_nothing_and_foretells_the_charge(ann: Transport) -> None:
    before = used(ann)
    cost = ann.call("POST", "/queries/cost", QueryCostRequest(question=question(), epsilon=0.25), CostView)
    assert cost.admitted
    assert cost.epsilon == pytest.approx(0.25)
    assert used(ann) == before
    release = ask(ann, question(), 0.25)
    assert cost.expected_error == pytest.approx(release.estimates[0].error_95)
    account = f"{DATASET}:quest-ann"
    assert used(ann)[account][0] - before[account][0] == pytest.approx(cost.shares[account], abs=1e-9)


def test_the_same_request_is_paid_once(ann: Transport) -> None:
    request_id = secrets.token_hex(16)
    first = ask(ann, question(), 0.2, request_id)
    after = used(ann)
    assert ask(ann, question(), 0.2, request_id) == first
    assert used(ann) == after
    with pytest.raises(ConflictError):
        ask(ann, question("count", None), 0.2, request_id)
    assert used(ann) == after


@pytest.mark.parametrize(
    ("about", "epsilon", "error", "says"),
    [
        (question(column="hieght"), 0.1, InvalidRequestError, "hieght"),
        (question(column="ward"), 0.1, InvalidRequestError, "ward"),
        (question(column="note"), 0.1, InvalidRequestError, "note"),
        (question(group_by="height"), 0.1, InvalidRequestError, "group"),
        (question(column=None), 0.1, InvalidRequestError, "column"),
        (question("sum"), 0.1, PolicyRefusedError, "operation"),
        (question(), 10.5, PolicyRefusedError, "cap"),
        (question(source={"dataset": "quest/nothing"}), 0.1, NotFoundError, "quest/nothing"),
    ],
)
def test_bad_questions_are_refused_in_words_and_cost_nothing(
    ann: Transport, about: Question, epsilon: float, error: type[CloisterError], says: str
) -> None:
    before = used(ann)
    with pytest.raises(error, match=r".") as caught:
        ask(ann, about, epsilon)
    assert says in str(caught.value)
    assert used(ann) == before


@pytest.mark.parametrize(
    "epsilon", ["0", "-1", "NaN", "Infinity", "-Infinity", "1e400", "1e-400", '"1"', "null", "[1]"]
)
def test_an_epsilon_that_is_no_positive_number_is_refused(ann: Transport, epsilon: str) -> None:
    before = used(ann)
    body = QueryRequest(request_id=secrets.token_hex(16), question=question(), epsilon=0.125).to_json()
    assert body.count(b"0.125") == 1
    with pytest.raises(InvalidRequestError, match="can't be read"):
        ann.raw("POST", "/queries", body.replace(b"0.125", epsilon.encode()), "application/json")
    assert used(ann) == before


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[]", b"null", b"\xff", b'{"a":' * 5000, b'{"question": {}, "__class__": 1}']
)
def test_a_body_that_is_no_request_is_refused(ann: Transport, body: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="can't be read"):
        ann.raw("POST", "/queries", body, "application/json")


def test_over_the_limit_says_what_is_left_and_what_would_fit(shared_cloister: RunningCloister) -> None:
    name = "quest/small"
    shared_cloister.add_user("quest-cas", "scientist")
    shared_cloister.upload(name, people(100), PEOPLE, make_policy(name, {"quest-cas": 1.0}))
    cas = shared_cloister.session("quest-cas").transport
    about = Question(source=SplitRef(dataset=name), operation="mean", column="height")
    ask(cas, about, 0.6)
    before = used(cas)
    with pytest.raises(BudgetRefusedError) as caught:
        ask(cas, about, 0.6)
    facts = caught.value.budget
    assert facts is not None
    assert (facts.account, facts.asked) == (f"{name}:quest-cas", 0.6)
    assert 0 < facts.fits <= facts.left <= 0.41
    assert used(cas) == before
    ask(cas, about, facts.fits)
    with pytest.raises(BudgetRefusedError):
        ask(cas, about, 0.01)
    assert used(cas)[f"{name}:quest-cas"][0] > 0.99


def test_a_user_whom_no_policy_names_sees_nothing(shared_cloister: RunningCloister, ann: Transport) -> None:
    bob = shared_cloister.session("quest-bob").transport
    assert DATASET not in [view.name for view in bob.call("GET", "/datasets", None, DatasetList).datasets]
    messages = []
    for name in (DATASET, "quest/nothing"):
        with pytest.raises(NotFoundError) as caught:
            bob.call("GET", f"/datasets/{name}", None, DatasetView)
        messages.append(str(caught.value).replace(name, "NAME"))
        with pytest.raises(NotFoundError):
            ask(bob, question(source={"dataset": name}), 0.1)
    assert messages[0] == messages[1]
    assert DATASET not in used(bob)


def test_a_release_belongs_to_whoever_paid(shared_cloister: RunningCloister, ann: Transport) -> None:
    release = ask(ann, question("count", None), 0.1)
    assert ann.call("GET", f"/releases/{release.release}", None, Release) == release
    with pytest.raises(NotFoundError):
        shared_cloister.session("quest-bob").transport.call("GET", f"/releases/{release.release}", None, Release)
