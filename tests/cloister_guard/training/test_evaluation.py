"""Aggregates of metrics: exact, and moved by one unit at most as far as their facts say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_data.errors import CloisterError, InvalidRequestError, UnsupportedModelError
from cloister_guard.encoding import Targets, encode_features, encode_target
from cloister_guard.training import evaluation as module
from cloister_guard.training.evaluation import evaluate, evaluation_facts
from tests.fakes.training import amplifier, evaluation, exported, features, mlp, rows, schema

WIDTH, UNITS = 4, 300


def _asked(model: torch.nn.Module, **changes: Any) -> tuple[Any, Any, Any, bytes, Any, Targets]:
    graph, weights = exported(model, WIDTH)
    plan, declared, table = evaluation(WIDTH, **changes), schema(WIDTH), rows(UNITS, WIDTH)
    encoded = encode_features(table, declared, features(WIDTH))
    return plan, declared, graph, weights, encoded, encode_target(table, declared, plan.target, plan.metric)


def test_accuracy_counts_the_right_ones() -> None:
    model = mlp(WIDTH)
    asked = _asked(model)
    guess = model(torch.from_numpy(asked[4])).argmax(1).numpy()
    assert evaluate(*asked) == int((guess == asked[5].values).sum())
    facts = evaluation_facts(*asked[:4], UNITS)
    assert (facts.sensitivity, facts.step, facts.outputs) == (1, 1 / UNITS, 2)


class Subnormal(torch.nn.Module):
    """Predicts the second class of everybody, unless 1e-40 is flushed to zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tiny = (x[..., :1] * 0.0 + 1e-20) * 1e-20
        return torch.cat((x[..., :1] * 0.0 + 0.5, tiny * 1e30 * 1e10), -1)


def test_no_row_is_told_by_the_slowness_of_subnormals() -> None:
    asked = _asked(Subnormal())
    assert evaluate(*asked) == int((asked[5].values == 0).sum())
    one = torch.tensor(1e-20) * torch.tensor(1e-20)
    assert one * 1e30 * 1e10 > 0.5, "subnormals are as they were outside"


def test_accuracy_of_one_logit() -> None:
    model = mlp(WIDTH, 1)
    asked = _asked(model)
    guess = (model(torch.from_numpy(asked[4]))[:, 0] > 0).numpy()
    assert evaluate(*asked) == int((guess == asked[5].values).sum())


def test_mean_squared_error_in_the_targets_own_unit() -> None:
    model = mlp(WIDTH, 1)
    asked = _asked(model, target="amount", metric="mse")
    facts = evaluation_facts(*asked[:4], UNITS)
    predicted = np.clip(model(torch.from_numpy(asked[4]))[:, 0].detach().numpy(), -1, 1) * 5 + 5
    actual = np.asarray(rows(UNITS, WIDTH).column("amount"))
    assert evaluate(*asked) * facts.step == pytest.approx(float(np.square(predicted - actual).mean()), rel=1e-4)


def test_dropout_is_off() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, 8), torch.nn.Dropout(0.9), torch.nn.Linear(8, 2))
    asked = _asked(model)
    model.eval()
    guess = model(torch.from_numpy(asked[4])).argmax(1).numpy()
    assert {evaluate(*asked) for _ in range(3)} == {int((guess == asked[5].values).sum())}


def test_nulls_and_broken_predictions() -> None:
    asked = _asked(mlp(WIDTH))
    values, nobody = asked[5].values, np.zeros(UNITS, dtype=np.bool_)
    assert evaluate(*asked[:5], Targets(values, nobody)) == 0
    assert evaluate(*asked[:4], np.full_like(asked[4], np.nan), asked[5]) == 0
    asked = _asked(mlp(WIDTH, 1), target="amount", metric="mse")
    assert evaluate(*asked[:5], Targets(asked[5].values, nobody)) == 0
    worst = evaluation_facts(*asked[:4], UNITS).sensitivity
    assert evaluate(*asked[:4], np.full_like(asked[4], np.nan), asked[5]) == UNITS * worst


@settings(max_examples=40, deadline=None)
@given(
    slot=st.integers(0, 39),
    value=st.floats(width=32),
    present=st.booleans(),
    metric=st.sampled_from(["accuracy", "mse"]),
)
def test_one_unit_moves_the_aggregate_by_its_sensitivity(slot: int, value: float, present: bool, metric: Any) -> None:
    """Zero-out neighbours: a unit, and the null in its place. The graph amplifies last bits."""
    width = 30
    graph, weights = amplifier(width)
    declared, table = schema(width), rows(40, width)
    if metric == "mse":
        graph, weights = exported(mlp(width, 1), width)
    plan = evaluation(width, metric=metric, target="kind" if metric == "accuracy" else "amount")
    facts = evaluation_facts(plan, declared, graph, weights, 40)
    encoded = encode_features(table, declared, features(width))
    targets = encode_target(table, declared, plan.target, metric)
    encoded[slot] = value
    with_it = evaluate(plan, declared, graph, weights, encoded, targets)
    nulled, absent = encoded.copy(), targets.present.copy()
    nulled[slot], absent[slot] = 0, present and False
    without = evaluate(plan, declared, graph, weights, nulled, Targets(targets.values, absent))
    assert abs(with_it - without) <= facts.sensitivity


def test_the_microbatches_shape_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _asked(mlp(WIDTH))
    whole = evaluate(*asked)
    monkeypatch.setattr(module, "_SLOTS", 7)
    assert evaluate(*asked) == whole


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"target": "x0"}, InvalidRequestError),
        ({"target": "amount"}, InvalidRequestError),
        ({"metric": "mse"}, InvalidRequestError),
        ({"metric": "mse", "target": "amount"}, UnsupportedModelError),
        ({"features": ("x0", "x1")}, UnsupportedModelError),
        ({"features": ("x0", "x1", "x2", "age")}, InvalidRequestError),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], error: type[CloisterError]) -> None:
    graph, weights = exported(mlp(WIDTH), WIDTH)
    with pytest.raises(error):
        evaluation_facts(evaluation(WIDTH, **changes), schema(WIDTH), graph, weights, UNITS)
    with pytest.raises(InvalidRequestError):
        evaluation_facts(evaluation(WIDTH), schema(WIDTH), graph, weights[:-1], UNITS)
    with pytest.raises(InvalidRequestError):
        evaluation_facts(evaluation(WIDTH), schema(WIDTH), graph, weights, 0)
