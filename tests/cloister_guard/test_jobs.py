"""Trainings through a real cloister: paid before they run, cancelled, crashed, fetched."""

import contextlib
import json
import os
import secrets
import signal
import sqlite3
import time

import psutil
import pytest
import torch

from cloister.modeling import export_model, load_weights
from cloister.transport import Transport
from cloister_data.accounts import AccountList
from cloister_data.errors import (
    BudgetRefusedError,
    CloisterError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    PolicyRefusedError,
    UnavailableError,
    UnsupportedModelError,
)
from cloister_data.framing import pack_body
from cloister_data.release import Release, ReleaseList
from cloister_data.statistics import CostView
from cloister_data.training import (
    EvaluationPlan,
    EvaluationRequest,
    JobList,
    JobView,
    ModelView,
    RehearsalReport,
    TrainingPlan,
    TrainingRequest,
)
from tests.fakes.data import PEOPLE, people
from tests.fakes.running import RunningCloister, make_policy, running_cloister

DATASET = "jobs/people"
ROWS = 1200


def network(outputs: int = 2) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, outputs))


def send_model(transport: Transport, model: torch.nn.Module, width: int = 2) -> str:
    graph, weights = export_model(model, width)
    body = pack_body(graph.to_json(), weights)
    return transport.call("POST", "/models", body, ModelView, "application/vnd.cloister.model").model


def make_plan(model: str, **changes: object) -> TrainingPlan:
    given: dict[str, object] = {
        "sources": ({"dataset": DATASET, "part": "train"},),
        "model": model,
        "features": ("height", "age"),
        "target": "ill",
        "loss": "cross_entropy",
        "optimizer": {"name": "adam", "lr": 0.05},
        "epochs": 4,
        "batch_size": 120,
        "max_grad_norm": 1.0,
        "epsilon": 3.0,
    }
    return TrainingPlan.model_validate(given | changes)


def submit(transport: Transport, plan: TrainingPlan, request_id: str | None = None) -> JobView:
    request = TrainingRequest(request_id=request_id or secrets.token_hex(16), plan=plan)
    return transport.call("POST", "/jobs", request, JobView)


def wait(transport: Transport, job: str, seconds: float = 60) -> JobView:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        view = transport.call("GET", f"/jobs/{job}", None, JobView)
        if view.state not in ("running", "cancelling"):
            return view
        time.sleep(0.05)
    raise AssertionError("the job didn't end")


def used(transport: Transport) -> dict[str, tuple[float, float]]:
    accounts = transport.call("GET", "/accounts", None, AccountList).accounts
    return {account.account: (account.used_share, account.reserved_share) for account in accounts}


def publish(found: RunningCloister, user: str, epsilon: float = 40.0) -> Transport:
    found.add_user(user, "scientist")
    policy = make_policy(DATASET, {user: epsilon}, operations=("train", "evaluate"))
    found.upload(DATASET, people(ROWS), PEOPLE, policy)
    return found.session(user).transport


@pytest.fixture(scope="module")
def ann(shared_cloister: RunningCloister) -> Transport:
    return publish(shared_cloister, "jobs-ann")


def test_a_training_is_rehearsed_priced_run_fetched_and_evaluated(ann: Transport) -> None:
    before = used(ann)
    model = network()
    plan = make_plan(send_model(ann, model))
    cost = ann.call("POST", "/jobs/cost", plan, CostView)
    report = ann.call("POST", "/rehearsals", plan, RehearsalReport)
    assert cost.admitted
    assert cost.epsilon == report.epsilon <= 3.0
    assert cost.mechanism == report.mechanism
    assert report.outputs == 2
    assert used(ann) == before

    job = wait(ann, submit(ann, plan).job)
    assert (job.state, job.steps_done, job.charged_steps) == ("done", job.steps, job.steps)
    assert job.mechanism == cost.mechanism
    account = f"{DATASET}:jobs-ann"
    assert used(ann)[account][1] == 0
    assert used(ann)[account][0] - before[account][0] == pytest.approx(cost.shares[account], abs=1e-9)
    load_weights(model, ann.raw("GET", f"/jobs/{job.job}/result"))
    assert job.job in [view.job for view in ann.call("GET", "/jobs", None, JobList).jobs]
    assert job.release in [found.release for found in ann.call("GET", "/releases", None, ReleaseList).releases]

    evaluation = EvaluationPlan(
        sources=({"dataset": DATASET, "part": "test"},),  # type: ignore[arg-type]
        model=send_model(ann, model),
        features=("height", "age"),
        target="ill",
        metric="accuracy",
        epsilon=2.0,
    )
    request = EvaluationRequest(request_id=secrets.token_hex(16), plan=evaluation)
    (estimate,) = ann.call("POST", "/evaluations", request, Release).estimates
    assert estimate.value > 0.8


def test_a_training_over_two_owners_charges_both(shared_cloister: RunningCloister, ann: Transport) -> None:
    other = "jobs-b/people"
    shared_cloister.upload(other, people(ROWS, seed=1), PEOPLE, make_policy(other, {"jobs-ann": 40.0}))
    before = used(ann)
    plan = make_plan(
        send_model(ann, network()),
        sources=({"dataset": DATASET, "part": "train"}, {"dataset": other, "part": "train"}),
    )
    job = wait(ann, submit(ann, plan).job)
    assert job.state == "done"
    assert job.steps == pytest.approx(4 * 2 * ROWS * 0.8 / 120, rel=0.1)
    for account in (DATASET, f"{DATASET}:jobs-ann", other, f"{other}:jobs-ann"):
        assert used(ann)[account][0] > before[account][0]


def test_the_same_request_trains_once(ann: Transport) -> None:
    request_id = secrets.token_hex(16)
    plan = make_plan(send_model(ann, network()), epochs=1)
    first = submit(ann, plan, request_id)
    wait(ann, first.job)
    after = used(ann)
    assert submit(ann, plan, request_id).job == first.job
    assert used(ann) == after
    with pytest.raises(ConflictError):
        submit(ann, make_plan(plan.model, epochs=2), request_id)
    assert used(ann) == after


def batch_normed() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"features": ("height", "shoe")}, InvalidRequestError, "shoe"),
        ({"features": ("height", "note")}, InvalidRequestError, "note"),
        ({"target": "sick"}, InvalidRequestError, "sick"),
        ({"target": "note"}, InvalidRequestError, "note"),
        ({"features": ("height",)}, CloisterError, "1"),
        ({"loss": "mse"}, CloisterError, "mse"),
        ({"target": "ward"}, CloisterError, "3"),
        ({"epsilon": 25.0}, PolicyRefusedError, "cap"),
        ({"epsilon": None, "noise_multiplier": 0.05}, PolicyRefusedError, "cap"),
        ({"sources": ({"dataset": "jobs/nothing"},)}, NotFoundError, "jobs/nothing"),
        ({"model": "0" * 64}, NotFoundError, "model"),
    ],
)
def test_a_bad_training_is_refused_in_words_and_costs_nothing(
    ann: Transport, changes: dict[str, object], error: type[CloisterError], says: str
) -> None:
    before = used(ann)
    model = send_model(ann, network())
    with pytest.raises(error) as caught:
        submit(ann, make_plan(**({"model": model} | changes)))  # type: ignore[arg-type]
    assert says in str(caught.value)
    assert caught.value.code != "internal"
    assert used(ann) == before


def test_a_model_with_an_op_that_is_not_run_here_is_refused_by_name(ann: Transport) -> None:
    before = used(ann)
    graph, weights = export_model(network(), 2)
    document = graph.to_json().replace(b"aten.tanh.default", b"aten.bernoulli.default")
    digest = ann.call(
        "POST", "/models", pack_body(document, weights), ModelView, "application/vnd.cloister.model"
    ).model
    for route, message in (("/rehearsals", make_plan(digest)),):
        with pytest.raises(UnsupportedModelError, match="bernoulli"):
            ann.call("POST", route, message, RehearsalReport)
    with pytest.raises(UnsupportedModelError, match="bernoulli"):
        submit(ann, make_plan(digest))
    assert used(ann) == before


def test_a_file_that_is_no_model_is_refused(ann: Transport) -> None:
    graph, weights = export_model(network(), 2)
    for body in (b"", b"\x00\x00\x00\x04{}", pack_body(b"{}", weights), pack_body(graph.to_json(), weights[:-4]),
                 pack_body(graph.to_json(), b"\x80\x04."), b"\xff" * 64):  # fmt: skip
        with pytest.raises(CloisterError) as caught:
            ann.call("POST", "/models", body, ModelView, "application/vnd.cloister.model")
        assert caught.value.code in ("invalid-request", "too-large"), body[:20]


def test_over_the_budget_says_how_much_would_fit(shared_cloister: RunningCloister, ann: Transport) -> None:
    name = "jobs/poor"
    shared_cloister.add_user("jobs-poor", "scientist")
    shared_cloister.upload(name, people(600), PEOPLE, make_policy(name, {"jobs-poor": 1.0}))
    poor = shared_cloister.session("jobs-poor").transport
    plan = make_plan(send_model(poor, network()), sources=({"dataset": name, "part": "train"},))
    before = used(poor)
    with pytest.raises(BudgetRefusedError) as caught:
        submit(poor, plan)
    facts = caught.value.budget
    assert facts is not None
    assert facts.asked == pytest.approx(3.0, abs=0.05)
    assert facts.left <= 1.0
    assert used(poor) == before
    assert not poor.call("GET", "/jobs", None, JobList).jobs


def test_a_cancelled_training_pays_for_its_marked_steps_alone(shared_cloister: RunningCloister, ann: Transport) -> None:
    before = used(ann)
    account = f"{DATASET}:jobs-ann"
    plan = make_plan(send_model(ann, network()), epochs=3000, epsilon=8.0)
    job = submit(ann, plan)
    assert job.state == "running"
    assert used(ann)[account][1] > 0
    with pytest.raises(UnavailableError):
        ann.raw("GET", f"/jobs/{job.job}/result")
    marked(shared_cloister)
    ended = ann.call("DELETE", f"/jobs/{job.job}", None, JobView)
    assert ended.state == "cancelled"
    assert 0 < ended.charged_steps < ended.steps
    after = used(ann)
    assert after[account][1] == 0
    paid = after[account][0] - before[account][0]
    whole = ann.call("POST", "/jobs/cost", plan, CostView).shares[account]
    assert 0 < paid < whole
    with pytest.raises(UnavailableError):
        ann.raw("GET", f"/jobs/{job.job}/result")
    assert ann.call("DELETE", f"/jobs/{job.job}", None, JobView) == ended


def test_a_job_is_its_users_alone(shared_cloister: RunningCloister, ann: Transport) -> None:
    shared_cloister.add_user("jobs-eve", "scientist")
    eve = shared_cloister.session("jobs-eve").transport
    job = wait(ann, submit(ann, make_plan(send_model(ann, network()), epochs=1)).job).job
    for verb, path in (("GET", f"/jobs/{job}"), ("DELETE", f"/jobs/{job}"), ("GET", f"/jobs/{job}/result")):
        with pytest.raises(NotFoundError):
            eve.raw(verb, path)
    plan = make_plan(send_model(ann, network()))
    with pytest.raises(NotFoundError):
        submit(eve, plan)


def workers(found: RunningCloister) -> list[psutil.Process]:
    children = psutil.Process(found.process.pid).children(recursive=True)
    return [child for child in children if "cloister_guard.worker" in child.cmdline()]


def marked(own: RunningCloister) -> int:
    """Waits for the running training's first marked steps, which only the guard knows; their number."""
    deadline = time.monotonic() + 60
    with contextlib.closing(sqlite3.connect(own.state / "cloister.db")) as database:
        while time.monotonic() < deadline:
            (steps,) = database.execute("SELECT max(steps_marked) FROM charges WHERE state = 'reserved'").fetchone()
            if steps:
                return int(steps)
            time.sleep(0.05)
    raise AssertionError("no step was marked")


@pytest.mark.parametrize("victim", ["worker", "guard"])
def test_a_crash_never_makes_a_training_cheaper(victim: str) -> None:
    """SIGKILL in mid-training: the marked steps stay spent, the others come back, and nobody gets the result."""
    with running_cloister() as own:
        ann = publish(own, "ann")
        account = f"{DATASET}:ann"
        plan = make_plan(send_model(ann, network()), epochs=3000, epsilon=8.0)
        whole = ann.call("POST", "/jobs/cost", plan, CostView).shares[account]
        job = submit(ann, plan)
        at_least = marked(own)
        assert used(ann)[account][0] == 0, "how far it is shows in no account"
        if victim == "worker":
            (worker,) = workers(own)
            worker.kill()
        else:
            (worker,) = workers(own)
            own.process.send_signal(signal.SIGKILL)
            own.process.wait()
            assert psutil.wait_procs([worker], timeout=10)[1] == []
            own.restart()
            ann = own.session("ann").transport
        ended = wait(ann, job.job)
        assert ended.state == "failed"
        assert ended.code in ("job-failed", "guard-restarted")
        share, reserved = used(ann)[account]
        assert 0 < share < whole
        assert reserved == 0
        assert at_least <= ended.charged_steps < ended.steps
        with pytest.raises(UnavailableError):
            ann.raw("GET", f"/jobs/{job.job}/result")
        # The log says of the charge what the ledger does: some of it was executed.
        with contextlib.closing(sqlite3.connect(own.state / "cloister.db")) as database:
            leaves = database.execute("SELECT payload FROM leaves WHERE kind = 'charge-settled'").fetchall()
        facts = [json.loads(payload)["facts"] for (payload,) in leaves]
        assert [(each["state"], each["steps"]) for each in facts] == [("committed", ended.charged_steps)]


def test_a_stopped_guard_leaves_no_process() -> None:
    with running_cloister() as own:
        ann = publish(own, "ann")
        submit(ann, make_plan(send_model(ann, network()), epochs=3000, epsilon=8.0))
        family = psutil.Process(own.process.pid).children(recursive=True)
        assert len(family) >= 2
        own.process.send_signal(signal.SIGINT)
        assert own.process.wait(timeout=20) == 0
        assert psutil.wait_procs(family, timeout=5)[1] == []
        assert not (own.state / "ready.json").exists()
        assert not list(own.runtime.glob("*.sock"))
        assert os.path.isdir(own.state)
