"""Every mistake in a plan or a model is found before anything is charged, and said in the user's terms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from cloister_data.errors import CloisterError, InvalidRequestError, UnsupportedModelError
from cloister_data.training import Optimizer
from cloister_guard.training import planning
from cloister_guard.training.planning import prepare
from tests.fakes.training import exported, features, mlp, plan, schema

WIDTH, UNITS = 4, 200
nn = torch.nn


def _prepare(model: torch.nn.Module, width: int = WIDTH, units: int = UNITS, classes: int = 2, **changes: Any) -> Any:
    graph, weights = exported(model, width)
    return prepare(plan(WIDTH, **changes), schema(WIDTH, classes=classes), graph, weights, units)


def test_the_figures_of_a_training() -> None:
    facts = _prepare(mlp(WIDTH), epochs=3, batch_size=32).facts()
    assert facts.parameters == facts.trainable == sum(p.numel() for p in mlp(WIDTH).parameters())
    assert facts.steps == math.ceil(3 * UNITS / 32)
    assert facts.sample_rate == 32 / UNITS
    assert facts.outputs == 2
    assert 32 <= facts.slots <= UNITS
    assert 0 < facts.bytes_bound <= planning.MEMORY_BOUND


def test_frozen_parameters_are_counted_apart() -> None:
    model = mlp(WIDTH)
    next(model.parameters()).requires_grad_(False)
    facts = _prepare(model).facts()
    assert facts.parameters - facts.trainable == WIDTH * 8


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch_size": UNITS + 1}, "batch_size"),
        ({"target": "nothing"}, "no column 'nothing'"),
        ({"features": ("x0", "x1", "x2", "height")}, "no column 'height'"),
        ({"loss": "mse"}, "can't predict the column 'kind'"),
        ({"target": "amount"}, "can't predict the column 'amount'"),
        ({"max_grad_norm": 1e-30}, "max_grad_norm"),
        ({"epochs": 10_000, "batch_size": 1, "units": 10_000}, "steps"),
        ({"units": 0}, "no units"),
        ({"units": 2**40}, "too many"),
    ],
)
def test_a_plan_that_can_not_run_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        _prepare(mlp(WIDTH), **changes)


@pytest.mark.parametrize(
    ("model", "changes", "says"),
    [
        (nn.Linear(WIDTH, 3), {}, "2 numbers a sample"),
        (nn.Linear(WIDTH, 1), {}, "Linear layer of 2 outputs"),
        (nn.Linear(WIDTH, 2), {"loss": "binary_cross_entropy"}, "one number a sample"),
        (nn.Linear(WIDTH, 2), {"loss": "mse", "target": "amount"}, "one number a sample"),
        (nn.Sequential(nn.Linear(WIDTH, 1), nn.Sigmoid()), {"loss": "binary_cross_entropy"}, "sigmoid"),
        (nn.Sequential(nn.Linear(WIDTH, 2), nn.Unflatten(1, (2, 1))), {}, r"\[2, 1\]"),
        (nn.Sequential(nn.Linear(WIDTH, 4), nn.GLU(), nn.Linear(2, 2)), {}, r"aten.glu.default in layer '1 \(GLU\)'"),
    ],
    ids=str,
)
def test_a_model_that_does_not_fit_is_refused(model: nn.Module, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        _prepare(model, **changes)


def test_a_model_of_another_width_is_told_the_right_one() -> None:
    with pytest.raises(UnsupportedModelError, match=r"4 numbers.*layer of 4 inputs"):
        _prepare(mlp(7), width=7)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    model = mlp(WIDTH)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match="trained"):
        _prepare(model)


def test_outputs_of_one_number_may_be_squeezed() -> None:
    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).squeeze(-1)

    for model in (Squeezed(), nn.Linear(WIDTH, 1)):
        assert _prepare(model, loss="binary_cross_entropy").facts().outputs == 1
        assert _prepare(model, loss="huber", target="amount").facts().outputs == 1


def test_a_softmax_before_cross_entropy_is_noted() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 2), nn.Softmax(dim=1))
    assert "softmax" in _prepare(model).facts().notes[0]
    noted = _prepare(mlp(WIDTH), optimizer=Optimizer(name="adam", lr=0.1, weight_decay=0.1)).facts().notes
    assert "adamw" in noted[0]


def test_memory_bounds_the_slots_and_then_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    generous = _prepare(mlp(WIDTH)).facts()
    per_slot = generous.bytes_bound // generous.slots
    monkeypatch.setattr(planning, "MEMORY_BOUND", 3 * per_slot)
    assert _prepare(mlp(WIDTH)).facts().slots == 3
    monkeypatch.setattr(planning, "MEMORY_BOUND", per_slot - 1)
    with pytest.raises(UnsupportedModelError, match="smaller model"):
        _prepare(mlp(WIDTH))


def test_features_and_target_of_the_plan_fit_the_schema() -> None:
    assert plan(WIDTH).features == features(WIDTH)
    with pytest.raises(CloisterError):
        _prepare(mlp(WIDTH), target="x1", features=("x0",))
