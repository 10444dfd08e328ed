"""What scientists ask for: plans that contradict themselves never reach the ledger."""

import json
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from cloister_data.control import ControlOrder, RegisterKernel
from cloister_data.events import Event
from cloister_data.kernels import KernelLaunch, KernelOrder, KernelStart
from cloister_data.mechanism import Composition, DiscreteLaplace, DpSgd, Mechanism
from cloister_data.statistics import QueryRequest
from cloister_data.training import TrainingPlan

PLAN: dict[str, Any] = {
    "sources": [{"dataset": "hospital-a/breast-cancer", "part": "train"}],
    "model": "0" * 64,
    "features": ["mean radius", "mean texture"],
    "target": "diagnosis",
    "loss": "cross_entropy",
    "optimizer": {"name": "adam", "lr": 0.001},
    "epochs": 10,
    "batch_size": 64,
    "max_grad_norm": 1.0,
    "epsilon": 2.0,
}


def plan(**changes: object) -> TrainingPlan:
    return TrainingPlan.from_json(json.dumps(PLAN | changes))


def test_a_plan_survives_json() -> None:
    assert TrainingPlan.from_json(plan().to_json()) == plan()
    assert plan(epsilon=None, noise_multiplier=1.1).noise_multiplier == 1.1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"noise_multiplier": 1.0}, "exactly one"),
        ({"epsilon": None}, "exactly one"),
        ({"epsilon": 0}, "greater than 0"),
        ({"epsilon": -1}, "greater than 0"),
        ({"epsilon": 1e9}, "less than or equal"),
        ({"features": []}, "at least 1"),
        ({"features": ["a", "a"]}, "named twice"),
        ({"features": ["diagnosis"]}, "among the features"),
        ({"sources": []}, "at least 1"),
        ({"sources": [PLAN["sources"][0]] * 17}, "at most 16"),
        ({"model": "model.pt"}, "pattern"),
        ({"loss": "my_loss"}, "Input should be"),
        ({"optimizer": {"name": "lbfgs", "lr": 1}}, "Input should be"),
        ({"optimizer": {"name": "adam", "lr": 0}}, "greater than 0"),
        ({"max_grad_norm": 0}, "greater than 0"),
        ({"epochs": 0}, "greater than or equal"),
        ({"batch_size": 0}, "greater than or equal"),
        ({"sample_rate": 0.5}, "Extra inputs"),
    ],
)
def test_what_a_plan_refuses(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        plan(**changes)


@pytest.mark.parametrize(
    ("epochs", "batch_size", "units", "steps", "rate"),
    [
        (10, 64, 640, 100, 0.1),
        (10, 64, 641, 101, 64 / 641),
        (1, 64, 10, 1, 1.0),
        (1, 64, 64, 1, 1.0),
        (3, 7, 0, 1, 1.0),
    ],
)
def test_steps_and_sample_rate(epochs: int, batch_size: int, units: int, steps: int, rate: float) -> None:
    found = plan(epochs=epochs, batch_size=batch_size)
    assert (found.steps(units), found.sample_rate(units)) == (steps, rate)


@pytest.mark.parametrize("epsilon", ["NaN", "Infinity", "0", "-0.1", "1001", '"0.1; DROP"'])
def test_a_query_costs_a_finite_positive_epsilon(epsilon: str) -> None:
    body = (
        '{{"request_id": "{0}", "question": {{"source": {{"dataset": "a/b"}}, "operation": "count"}}, "epsilon": {1}}}'
    )
    assert QueryRequest.from_json(body.format("0" * 32, "0.1")).epsilon == 0.1
    with pytest.raises(ValidationError):
        QueryRequest.from_json(body.format("0" * 32, epsilon))


@pytest.mark.parametrize(
    "mechanism",
    [
        DiscreteLaplace(sensitivity=3, scale=15.0),
        DpSgd(noise_multiplier=1.0, sample_rate=0.01, steps=1000),
        Composition(parts=(DiscreteLaplace(sensitivity=1, scale=2.0), DiscreteLaplace(sensitivity=2, scale=2.0))),
    ],
    ids=lambda mechanism: mechanism.kind,
)
def test_mechanisms_are_told_apart_by_kind(mechanism: Mechanism) -> None:
    adapter: TypeAdapter[Mechanism] = TypeAdapter(Mechanism)
    assert adapter.validate_json(mechanism.to_json()) == mechanism


def test_orders_to_the_kernel_service_are_told_apart_by_op() -> None:
    adapter: TypeAdapter[KernelOrder] = TypeAdapter(KernelOrder)
    start = KernelStart(user="ada", launch=KernelLaunch(environment={"TZ": "UTC"}))
    assert adapter.validate_json(start.to_json()) == start
    assert adapter.validate_json(f'{{"op": "attach", "kernel": "{"0" * 32}"}}').op == "attach"
    with pytest.raises(ValidationError):
        adapter.validate_json('{"op": "exec", "argv": ["sh"]}')


@pytest.mark.parametrize("name", ["LD_PRELOAD", "PYTHONPATH", "CLOISTER_GUARD_SOCKET", "HOME", "AWS_SECRET_ACCESS_KEY"])
def test_a_launch_carries_display_settings_only(name: str) -> None:
    with pytest.raises(ValidationError):
        KernelLaunch.from_json(json.dumps({"environment": {name: "x"}}))


def test_orders_to_the_guard_are_told_apart_by_op() -> None:
    adapter: TypeAdapter[ControlOrder] = TypeAdapter(ControlOrder)
    register = RegisterKernel(kernel="0" * 32, uid=200_000, user="ada", sandbox="user", service="1" * 32)
    assert adapter.validate_json(register.to_json()) == register
    for uid in (-1, 2**32 - 1):
        with pytest.raises(ValidationError):
            adapter.validate_json(json.dumps(json.loads(register.to_json()) | {"uid": uid}))


def test_an_event_id_names_the_start_and_the_place() -> None:
    body = '{{"id": "{0}", "at": 1, "body": {{"kind": "reset"}}}}'
    assert Event.from_json(body.format("0123456789abcdef-12")).body.kind == "reset"
    for wrong in ("12", "0123456789abcdef-", "0123456789abcdef-12\\ndata: x", "0123456789abcdef--1"):
        with pytest.raises(ValidationError):
            Event.from_json(body.format(wrong))
