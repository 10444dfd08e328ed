"""A worker with a model: refusals in words before rows, marks before steps, one error after."""

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from cloister.modeling import export_model
from cloister_data.errors import InternalError, InvalidRequestError, StorageError, UnsupportedModelError
from cloister_data.graph import ModelGraph
from cloister_data.training import EvaluationPlan, Optimizer, TrainingPlan
from cloister_guard.datasets.split import select_part
from cloister_guard.statistics.evaluation import plan_evaluation
from cloister_guard.worker.process import Worker, WorkerLimits
from cloister_guard.worker.protocol import failure
from tests.fakes.stored import SCHEMA, Shelf

LIMITS = WorkerLimits(answer_seconds=120)
FEATURES = ("radius", "age", "ward")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf"), rows=400)


@pytest.fixture(scope="module")
def model() -> tuple[ModelGraph, bytes]:
    torch.manual_seed(0)
    return export_model(torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)), 5)


def training(shelf: Shelf, **more: Any) -> TrainingPlan:
    return TrainingPlan.model_validate(
        {
            "sources": (shelf.ref("train"),),
            "model": "0" * 64,
            "features": FEATURES,
            "target": "benign",
            "loss": "cross_entropy",
            "optimizer": Optimizer(lr=0.05),
            "epochs": 8,
            "batch_size": 32,
            "max_grad_norm": 1.0,
            "epsilon": 4.0,
            **more,
        }
    )


def test_a_training_from_check_to_weights(shelf: Shelf, model: tuple[ModelGraph, bytes]) -> None:
    graph, weights = model
    plan, units = training(shelf), shelf.units("train")
    events: list[tuple[str, int]] = []

    async def on_mark(steps: int) -> None:
        events.append(("mark", steps))
        await asyncio.sleep(0)
        events.append(("marked", steps))

    async def on_progress(steps: int) -> None:
        events.append(("progress", steps))

    async def run() -> bytes:
        async with Worker.start(LIMITS) as worker:
            # What is wrong with a request is told, and the worker goes on.
            with pytest.raises(InvalidRequestError, match="nothing"):
                await worker.prepare(training(shelf, target="nothing"), SCHEMA, graph, weights, units)
            renamed = graph.model_copy(
                update={"nodes": tuple(node.model_copy(update={"op": "aten.erase.default"}) for node in graph.nodes)}
            )
            with pytest.raises(UnsupportedModelError, match="erase"):
                await worker.prepare(plan, SCHEMA, renamed, weights, units)
            with pytest.raises(InvalidRequestError):
                await worker.prepare(plan, SCHEMA, graph, weights[:-8], units)
            facts = await worker.prepare(plan, SCHEMA, graph, weights, units)
            assert (facts.steps, facts.sample_rate) == (plan.steps(units), plan.sample_rate(units))
            figures = await worker.rehearse()
            assert figures.seconds > 0
            assert figures.memory_bytes > 1 << 20
            trained = await worker.train([shelf.source("train")], 0.5, on_mark, on_progress)
            marks = [steps for kind, steps in events if kind == "mark"]
            assert marks == sorted(set(marks))
            assert marks[-1] == facts.steps
            before = await evaluated(worker, shelf, "accuracy", "benign", FEATURES, graph, weights)
            after = await evaluated(worker, shelf, "accuracy", "benign", FEATURES, graph, trained)
            assert 0 <= before <= 1
            assert after > 0.7
            # Predicting 0 on the [-1, 1] scale is predicting the middle of the declared range.
            line, at = export_model(torch.nn.Linear(1, 1), 1)
            zero = safetensors.torch.save({name: value * 0 for name, value in safetensors.torch.load(at).items()})
            error = await evaluated(worker, shelf, "mse", "radius", ("age",), line, zero)
            test = select_part(shelf.table, shelf.ref("test"))
            assert error == pytest.approx(((test.column("radius").to_numpy() - 20.0) ** 2).mean(), abs=0.5)
            return trained

    trained = asyncio.run(run())
    # Each mark was answered before the worker said another word.
    for before, after in itertools.pairwise(events):
        if before[0] == "mark":
            assert after == ("marked", before[1])
    found, started = safetensors.torch.load(trained), safetensors.torch.load(weights)
    assert found.keys() == started.keys()
    assert not torch.equal(found["0.weight"], started["0.weight"])


async def evaluated(
    worker: Worker,
    shelf: Shelf,
    metric: Any,
    target: str,
    features: tuple[str, ...],
    graph: ModelGraph,
    weights: bytes,
) -> float:
    """The metric of a model over the test part, with next to no noise."""
    plan = EvaluationPlan(
        sources=(shelf.ref("test"),), model="0" * 64, features=features, target=target, metric=metric, epsilon=1000.0
    )
    query = plan_evaluation(plan, SCHEMA, shelf.units("test"))
    facts = await worker.prepare_evaluation(query, graph, weights)
    assert facts.sensitivity == query.mechanism.sensitivity
    (estimate,) = await worker.evaluate([shelf.source("test")])
    assert estimate.error_95 == query.errors_95[0]
    return estimate.value


def test_a_mark_that_fails_ends_the_training(shelf: Shelf, model: tuple[ModelGraph, bytes]) -> None:
    marks: list[int] = []

    async def on_mark(steps: int) -> None:
        marks.append(steps)
        if len(marks) == 2:
            raise StorageError("The disk is full.")

    async def on_progress(steps: int) -> None: ...

    async def run() -> int:
        async with Worker.start(LIMITS) as worker:
            await worker.prepare(training(shelf), SCHEMA, *model, shelf.units("train"))
            with pytest.raises(StorageError):
                await worker.train([shelf.source("train")], 1.0, on_mark, on_progress)
            # It waits for an answer that never comes: no step runs unpaid.
            await asyncio.sleep(0.3)
            assert worker._process.stdout is not None
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(worker._process.stdout.read(1), 0.2)
            return worker.pid

    pid = asyncio.run(run())
    assert len(marks) == 2
    assert not Path(f"/proc/{pid}").exists()


def test_rows_that_fail_tell_nothing(shelf: Shelf, model: tuple[ModelGraph, bytes], tmp_path: Path) -> None:
    source = shelf.source("train")
    data = bytearray(Path(source.path).read_bytes())
    data[100] ^= 1
    (tmp_path / "tampered").write_bytes(data)
    broken = source.model_copy(update={"path": str(tmp_path / "tampered")})

    async def nothing(steps: int) -> None: ...

    async def run() -> None:
        async with Worker.start(LIMITS) as worker:
            await worker.prepare(training(shelf), SCHEMA, *model, shelf.units("train"))
            await worker.train([broken], 1.0, nothing, nothing)

    with pytest.raises(InternalError) as failed:
        asyncio.run(run())
    assert failed.value.to_problem() == failure().to_problem()
    assert "tampered" not in json.dumps(failed.value.to_problem().model_dump())


def test_nothing_runs_unprepared(shelf: Shelf) -> None:
    async def nothing(steps: int) -> None: ...

    async def run() -> None:
        async with Worker.start(LIMITS) as worker:
            with pytest.raises(InvalidRequestError, match="Nothing was prepared"):
                await worker.rehearse()
            await worker.train([shelf.source()], 1.0, nothing, nothing)

    with pytest.raises(InternalError):
        asyncio.run(run())
