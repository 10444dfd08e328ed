import time

import pytest
import torch
from safetensors.torch import save
from torch import nn

import cloister
from cloister_data.errors import (
    BudgetFacts,
    BudgetRefusedError,
    InvalidRequestError,
    JobFailedError,
    UnreachableError,
    UnsupportedModelError,
)
from cloister_data.framing import unpack_body
from cloister_data.graph import ModelGraph
from cloister_data.mechanism import DpSgd
from cloister_data.training import (
    EvaluationRequest,
    JobList,
    ModelView,
    RehearsalReport,
    TrainingPlan,
    TrainingRequest,
)
from tests.fakes import answers
from tests.fakes.recording_guard import RecordingGuard

DIGEST = "d" * 64
FEATURES = ["age", "smoker", "ill"]  # 1 + 3 + 1 numbers


@pytest.fixture
def handle(guard: RecordingGuard) -> cloister.DatasetHandle:
    guard.routes["POST /models"] = ModelView(model=DIGEST, parameters=12, nodes=1)
    return cloister.dataset("hospital-a/patients")


def _train(handle: cloister.DatasetHandle, model: object = None, **changes: object) -> cloister.Job:
    given: dict[str, object] = {"features": FEATURES, "target": "weight", "loss": "mse", "epsilon": 2.0}
    return handle.train(model or nn.Linear(5, 1), **(given | changes))  # type: ignore[arg-type]


def test_train_sends_the_model_then_the_plan(guard: RecordingGuard, handle: cloister.DatasetHandle) -> None:
    guard.routes["POST /jobs"] = answers.job()
    train_set, _ = handle.split(test=0.25)
    job = _train(train_set, batch_size=32, optimizer="sgd", momentum=0.5)
    assert guard.paths() == ["/models", "/jobs"]
    sent = next(each for each in guard.asked if each.path == "/models")
    assert sent.content_type == "application/vnd.cloister.model"
    head, _ = unpack_body(sent.body)
    assert ModelGraph.from_json(head).input_shape == (5,)
    plan = TrainingRequest.from_json(guard.asked[-1].body).plan
    assert plan.model == DIGEST
    assert plan.features == tuple(FEATURES)
    assert (plan.sources[0].part, plan.sources[0].test) == ("train", 0.25)
    assert (plan.optimizer.name, plan.optimizer.momentum, plan.batch_size) == ("sgd", 0.5, 32)
    assert job.view.state == "running"
    assert "0 of 70 steps" in repr(job)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"features": ["age", "notes"]}, "no declared encoding"),
        ({"features": "age"}, "list of column names"),
        ({"features": []}, "No features"),
        ({"features": ["age", "age"]}, "twice"),
        ({"features": ["age", "hight"]}, "no column 'hight'"),
        ({"target": "age"}, "among the features"),
        ({"target": "height"}, "no column 'height'"),
        ({"target": "notes"}, "can't predict"),
        ({"loss": "cross_entropy"}, "can't predict"),
        ({"loss": "binary_cross_entropy", "features": ["age"], "target": "smoker"}, "3 classes"),
        ({"loss": "hinge"}, "hinge"),
        ({"optimizer": "lbfgs"}, "lbfgs"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"epsilon": None}, "either epsilon"),
        ({"noise_multiplier": 1.0}, "either epsilon"),
        ({"epsilon": None, "noise_multiplier": -1.0}, "noise_multiplier"),
        ({"lr": 0.0}, "lr"),
        ({"momentum": 1.0, "optimizer": "sgd"}, "momentum"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": 2.5}, "epochs"),
        ({"batch_size": True}, "batch_size"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm"),
        ({"model": nn.Linear}, "an instance"),
        ({"model": "resnet"}, "torch.nn.Module"),
    ],
)
def test_mistakes_are_found_before_anything_is_sent(
    guard: RecordingGuard, handle: cloister.DatasetHandle, changes: dict[str, object], match: str
) -> None:
    with pytest.raises(InvalidRequestError, match=match) as found:
        _train(handle, **changes)
    assert "\n" not in found.value.what
    assert guard.paths() == []


def test_an_unsupported_layer_is_refused_before_anything_is_sent(
    guard: RecordingGuard, handle: cloister.DatasetHandle
) -> None:
    with pytest.raises(UnsupportedModelError, match="GroupNorm"):
        _train(handle, nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
    assert guard.paths() == []


def test_a_refusal_over_budget_keeps_its_figures(guard: RecordingGuard, handle: cloister.DatasetHandle) -> None:
    facts = BudgetFacts(account="hospital-a/patients", asked=2.0, left=1.5, fits=1.25, delta=1e-5)
    guard.routes["POST /jobs"] = BudgetRefusedError("It doesn't fit.", why="1.5 is left.", budget=facts)
    with pytest.raises(BudgetRefusedError) as found:
        _train(handle)
    assert found.value.budget == facts


def test_rehearse_and_cost(guard: RecordingGuard, handle: cloister.DatasetHandle) -> None:
    guard.routes["POST /rehearsals"] = RehearsalReport(
        mechanism=DpSgd(noise_multiplier=4.95, sample_rate=0.28, steps=70),
        epsilon=2.0,
        delta=1e-5,
        steps=70,
        units=448,
        seconds=1.5,
        memory_bytes=400 << 20,
        parameters=6,
        outputs=1,
        notes=("It doesn't fit what is left.",),
    )
    guard.routes["POST /jobs/cost"] = answers.cost(2.0, admitted=False)
    report = handle.rehearse(nn.Linear(5, 1), features=FEATURES, target="weight", loss="mse", epsilon=2.0)
    assert "nothing was charged" in repr(report)
    assert "doesn&#x27;t fit" in report._repr_html_()
    assert TrainingPlan.from_json(guard.asked[-1].body).epsilon == 2.0
    cost = handle.training_cost(nn.Linear(5, 1), features=FEATURES, target="weight", loss="mse", epsilon=2.0)
    assert not cost.admitted
    assert "NOT admitted" in repr(cost)
    assert guard.paths() == ["/models", "/rehearsals", "/jobs/cost"]


def test_the_result_is_a_trained_copy_that_evaluate_knows(
    guard: RecordingGuard, handle: cloister.DatasetHandle
) -> None:
    model = nn.Linear(5, 1)
    before = model.weight.detach().clone()
    trained = {"weight": torch.full((1, 5), 0.5), "bias": torch.zeros(1)}
    guard.routes["POST /jobs"] = answers.job()
    guard.routes["GET /jobs/a{32}"] = answers.job("done", 70)
    guard.routes["GET /jobs/a{32}/result"] = save(trained)
    guard.routes["POST /evaluations"] = answers.release(kind="evaluation")
    guard.routes["GET /releases/b{32}"] = answers.release((), kind="model", epsilon=2.0)
    job = _train(handle, model)
    with torch.no_grad():
        model.bias.fill_(7)
    result = job.result()
    assert result is not model
    assert not result.training
    assert torch.equal(result.weight, trained["weight"])  # type: ignore[arg-type]
    assert torch.equal(model.weight, before)
    assert job.release().epsilon == 2.0
    score = handle.split()[1].evaluate(result, target="weight", metric="mse", epsilon=1.0)
    assert score.value == 54.25
    plan = EvaluationRequest.from_json(guard.asked[-1].body).plan
    assert plan.features == tuple(FEATURES)
    assert plan.sources[0].part == "test"
    with pytest.raises(InvalidRequestError, match="Name them"):
        handle.evaluate(nn.Linear(5, 1), target="weight", metric="mse", epsilon=1.0)
    with pytest.raises(InvalidRequestError, match="accuracy"):
        handle.evaluate(result, target="weight", metric="accuracy", epsilon=1.0)


def test_waiting_follows_the_job_to_its_end(
    guard: RecordingGuard, handle: cloister.DatasetHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloister.job.POLL_SECONDS", 0.01)
    states = iter([answers.job(done=10), answers.job(done=35), answers.job("done", 70)])
    guard.routes["POST /jobs"] = answers.job()
    guard.routes["GET /jobs/a{32}"] = lambda body: next(states)
    job = _train(handle)
    assert job.wait() is job
    assert job.state == "done"
    assert "done: 70 steps" in repr(job)


def test_a_failed_job_says_what_stays_spent(guard: RecordingGuard, handle: cloister.DatasetHandle) -> None:
    guard.routes["POST /jobs"] = answers.job()
    guard.routes["GET /jobs/a{32}"] = answers.job("failed", 20)
    with pytest.raises(JobFailedError, match="20 of 70 steps"):
        _train(handle).wait()


def test_cancel(guard: RecordingGuard, handle: cloister.DatasetHandle) -> None:
    guard.routes["POST /jobs"] = answers.job()
    guard.routes["DELETE /jobs/a{32}"] = answers.job("cancelled", 20)
    job = _train(handle).cancel()
    assert job.state == "cancelled"
    with pytest.raises(InvalidRequestError, match="no result"):
        job.result()


def test_wait_gives_up_after_its_timeout(
    guard: RecordingGuard, handle: cloister.DatasetHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloister.job.POLL_SECONDS", 0.01)
    guard.routes["POST /jobs"] = answers.job()
    guard.routes["GET /jobs/a{32}"] = answers.job(done=5)
    with pytest.raises(TimeoutError, match="goes on"):
        _train(handle).wait(timeout=0.05)


def test_jobs_survive_the_kernel(guard: RecordingGuard, handle: cloister.DatasetHandle) -> None:
    guard.routes["GET /jobs"] = JobList(jobs=(answers.job("done", 70),))
    guard.routes["GET /jobs/a{32}/result"] = save({"weight": torch.ones(1, 5), "bias": torch.ones(1)})
    found = cloister.jobs()
    assert "done: 70 steps" in repr(found)
    assert "<table" in found._repr_html_()
    with pytest.raises(InvalidRequestError, match=r"job\.result\(model\)"):
        found[0].result()
    assert torch.equal(found[0].result(nn.Linear(5, 1)).bias.detach(), torch.ones(1))  # type: ignore[operator]


def test_a_broken_connection_repeats_the_same_request(
    guard: RecordingGuard, handle: cloister.DatasetHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloister.paid.PAUSES", (0.01, 0.01))
    seen: list[str] = []

    def flaky(body: bytes) -> cloister.CloisterError | answers.JobView:
        seen.append(TrainingRequest.from_json(body).request_id)
        return UnreachableError("gone") if len(seen) < 3 else answers.job()

    guard.routes["POST /jobs"] = flaky
    _train(handle)
    assert len(seen) == 3
    assert len(set(seen)) == 1


def test_a_connection_that_stays_broken_says_where_to_look(
    guard: RecordingGuard, handle: cloister.DatasetHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloister.paid.PAUSES", (0.01, 0.01))
    guard.routes["POST /jobs"] = UnreachableError("gone")
    with pytest.raises(UnreachableError, match=r"cloister\.jobs\(\)"):
        _train(handle)
    assert guard.paths().count("/jobs") == 3


def test_a_notebook_gets_a_live_bar(
    guard: RecordingGuard, handle: cloister.DatasetHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cloister import progress

    monkeypatch.setattr("cloister.job.make_bar", progress.WidgetBar)
    states = iter([answers.job(done=35), *[answers.job("done", 70)] * 5])
    guard.routes["POST /jobs"] = answers.job()
    guard.routes["GET /jobs/a{32}"] = lambda body: next(states)
    job = _train(handle)
    bundle = job._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert "running" in bundle["text/plain"]
    assert job._bar is not None
    deadline = time.monotonic() + 5
    while job._bar._bar.value != 70 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert job._bar._bar.value == 70
    assert job._bar._bar.bar_style == "success"
