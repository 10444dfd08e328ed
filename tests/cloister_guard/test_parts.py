"""Questions and trainings about parts of the people, through a real cloister: each part pays for its own alone."""

from __future__ import annotations

import secrets
import time

import pytest
import torch

from cloister.modeling import export_model
from cloister.transport import Transport
from cloister_data.accounts import AccountList
from cloister_data.datasets import DatasetView
from cloister_data.errors import BudgetRefusedError, ConflictError, InvalidRequestError
from cloister_data.framing import pack_body
from cloister_data.release import Release
from cloister_data.statistics import CostView, QueryCostRequest, QueryRequest, Question
from cloister_data.training import EvaluationPlan, EvaluationRequest, JobView, ModelView, TrainingPlan, TrainingRequest
from tests.fakes.running import RunningCloister, make_policy
from tests.fakes.sites import AGES, SITES, SIZES, patients, sited

CLINIC, OTHER, PLAIN = "sites-clinic/people", "sites-other/people", "sites-plain/people"


@pytest.fixture(scope="module")
def ann(shared_cloister: RunningCloister) -> Transport:
    shared_cloister.add_user("sites-ann", "scientist")
    for name in (CLINIC, OTHER):
        shared_cloister.upload(name, patients(), sited(), make_policy(name, {"sites-ann": 20.0}))
    shared_cloister.upload(PLAIN, patients(), sited(partition=None), make_policy(PLAIN, {"sites-ann": 20.0}))
    return shared_cloister.session("sites-ann").transport


def question(dataset: str = CLINIC, operation: str = "mean", **rows: object) -> Question:
    column = None if operation == "count" else "age"
    return Question.model_validate({"source": {"dataset": dataset} | rows, "operation": operation, "column": column})


def ask(transport: Transport, about: Question, epsilon: float) -> Release:
    request = QueryRequest(request_id=secrets.token_hex(16), question=about, epsilon=epsilon)
    return transport.call("POST", "/queries", request, Release)


def used(transport: Transport, dataset: str = CLINIC) -> dict[str, float]:
    accounts = transport.call("GET", "/accounts", None, AccountList).accounts
    return {account.account: account.used_share for account in accounts if account.population == dataset}


def accounts_of(dataset: str, *parts: str) -> set[str]:
    return {each for part in parts for each in (f"{dataset}[{part}]", f"{dataset}[{part}]:sites-ann")}


def test_an_answer_about_a_part_is_that_parts_and_charged_to_it_alone(ann: Transport) -> None:
    view = ann.call("GET", f"/datasets/{CLINIC}", None, DatasetView)
    assert (view.units, view.part_units) == (1000, SIZES)
    assert set(used(ann)) == accounts_of(CLINIC, *SITES)
    before, requests = used(ann), set()
    for site in SITES:
        release = ask(ann, question(division=site), 0.5)
        # A sum over a public number of people: with another number than the part's own it would be far off.
        (estimate,) = release.estimates
        assert abs(estimate.value - AGES[site]) < 4 * estimate.error_95 + 0.1
        assert set(release.charge.accounts) == accounts_of(CLINIC, site)
        assert [source.division for source in release.receipt.sources] == [site]
        assert f"({site})" in release.title
        requests.add(release.receipt.request)
    assert len(requests) == len(SITES)
    after = used(ann)
    # Three questions of 0.5 cost nobody more than one.
    grown = {round(after[each] - before[each], 9) for each in after if each.endswith("sites-ann")}
    assert len(grown) == 1
    assert 0 < grown.pop() <= 0.5 / 20
    whole = ask(ann, question(), 0.5)
    assert set(whole.charge.accounts) == accounts_of(CLINIC, *SITES)
    assert whole.receipt.sources[0].division is None


def test_both_sides_of_a_parts_split_have_their_own_number_of_people(ann: Transport) -> None:
    errors, counts = [], 0.0
    for side in ("train", "test"):
        about = {"division": "south", "part": side, "test": 0.3}
        cost = ann.call("POST", "/queries/cost", QueryCostRequest(question=question(**about), epsilon=0.5), CostView)
        assert set(cost.shares) == accounts_of(CLINIC, "south")
        release = ask(ann, question(**about), 0.5)
        (estimate,) = release.estimates
        assert estimate.error_95 == cost.expected_error
        assert abs(estimate.value - AGES["south"]) < 4 * estimate.error_95 + 0.1
        errors.append(estimate.error_95)
        counts += ask(ann, question(operation="count", **about), 1.0).estimates[0].value
        assert f"(south, {side} part)" in release.title
    # The error of a mean is one over the number of people: these are 300 times 0.7 and 0.3, about.
    assert 0.2 < errors[0] / errors[1] < 0.85
    assert counts == pytest.approx(SIZES["south"], abs=40)


def test_what_is_no_part_is_refused_in_words_and_costs_nothing(ann: Transport) -> None:
    before = used(ann), used(ann, PLAIN)
    with pytest.raises(InvalidRequestError, match=r"no part 'west'.*\n?.*north, south, east"):
        ask(ann, question(division="west"), 0.1)
    with pytest.raises(InvalidRequestError, match="declares no partition"):
        ask(ann, question(PLAIN, division="north"), 0.1)
    body = QueryRequest(request_id=secrets.token_hex(16), question=question(division="north"), epsilon=0.125)
    with pytest.raises(InvalidRequestError, match="can't be read"):
        ann.raw("POST", "/queries", body.to_json().replace(b'"north"', b'["north","south"]'), "application/json")
    assert (used(ann), used(ann, PLAIN)) == before


def training(model: str, *sources: dict[str, object], **changes: object) -> TrainingPlan:
    given: dict[str, object] = {
        "sources": sources, "model": model, "features": ("age",), "target": "site", "loss": "cross_entropy",
        "optimizer": {"name": "sgd", "lr": 0.05}, "epochs": 1, "batch_size": 100, "max_grad_norm": 1.0,
        "noise_multiplier": 3.0,
    }  # fmt: skip
    return TrainingPlan.model_validate(given | changes)


@pytest.fixture(scope="module")
def model(ann: Transport) -> str:
    torch.manual_seed(0)
    graph, weights = export_model(torch.nn.Linear(1, 3), 1)
    body = pack_body(graph.to_json(), weights)
    return ann.call("POST", "/models", body, ModelView, "application/vnd.cloister.model").model


def test_a_training_and_an_evaluation_are_about_their_parts(ann: Transport, model: str) -> None:
    before = used(ann), used(ann, OTHER)
    plan = training(model, {"dataset": CLINIC, "division": "north"}, {"dataset": OTHER})
    cost = ann.call("POST", "/jobs/cost", plan, CostView)
    # Each population's own: a part of the one, the whole of the other.
    assert set(cost.shares) == accounts_of(CLINIC, "north") | accounts_of(OTHER, *SITES)
    assert cost.steps == plan.steps(SIZES["north"] + 1000)
    assert (used(ann), used(ann, OTHER)) == before

    job = ann.call("POST", "/jobs", TrainingRequest(request_id=secrets.token_hex(16), plan=plan), JobView)
    handle = _wait(ann, job.job)
    assert handle.state == "done"
    release = ann.call("GET", f"/releases/{handle.release}", None, Release)
    assert [source.division for source in release.receipt.sources] == ["north", None]
    assert set(release.charge.accounts) == set(cost.shares)

    evaluation = EvaluationPlan.model_validate(
        {"sources": ({"dataset": CLINIC, "division": "east"},), "model": model, "features": ("age",)}
        | {"target": "site", "metric": "accuracy", "epsilon": 0.5}
    )
    request = EvaluationRequest(request_id=secrets.token_hex(16), plan=evaluation)
    answer = ann.call("POST", "/evaluations", request, Release)
    assert set(answer.charge.accounts) == accounts_of(CLINIC, "east")
    grown = {account for account, share in used(ann).items() if share > before[0][account]}
    assert grown == accounts_of(CLINIC, "north", "east")


def _wait(transport: Transport, job: str) -> JobView:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        view = transport.call("GET", f"/jobs/{job}", None, JobView)
        if view.state not in ("running", "cancelling"):
            return view
        time.sleep(0.05)
    raise AssertionError("the job didn't end")


def test_two_parts_of_one_dataset_are_no_one_request(ann: Transport, model: str) -> None:
    before = used(ann)
    both = training(model, {"dataset": CLINIC, "division": "north"}, {"dataset": CLINIC, "division": "south"})
    for path in ("/jobs/cost", "/rehearsals"):
        with pytest.raises(InvalidRequestError, match="named twice"):
            ann.call("POST", path, both, CostView)
    assert used(ann) == before


def test_a_part_is_used_up_and_the_others_are_not(shared_cloister: RunningCloister) -> None:
    shared_cloister.add_user("sites-ben", "scientist")
    name = "sites-small/people"
    rows = patients(north=30, south=20)
    shared_cloister.upload(name, rows, sited(), make_policy(name, {"sites-ben": 1.0}))
    ben = shared_cloister.session("sites-ben").transport
    ask(ben, question(name, division="north"), 1.0)
    for about in (question(name, division="north"), question(name)):
        with pytest.raises(BudgetRefusedError, match=r"people\[north\]:sites-ben"):
            ask(ben, about, 0.1)
    ask(ben, question(name, division="south"), 1.0)
    # Nobody is in the east, which is public: it is answered and charged like any other part.
    ask(ben, question(name, division="east"), 0.25)
    ask(ben, question(name, "count", division="east"), 0.25)
    assert sorted(used(ben, name).values())[-3:] == pytest.approx([0.5, 1.0, 1.0])
    # The owner's next version: whoever changes their part is refused, and the accounts go on.
    moved = rows.copy()
    moved.loc[0, "site"] = "east"
    with pytest.raises(ConflictError, match="another part"):
        shared_cloister.upload(name, moved, sited(), None)
    assert shared_cloister.upload(name, rows, sited(), None).version == 2
    with pytest.raises(BudgetRefusedError):
        ask(ben, question(name, division="north"), 0.1)
