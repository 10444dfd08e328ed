"""Evaluations are priced from the plan, the schema and the public number of units."""

from typing import Any

import pytest

from cloister_data.datasets import SplitRef
from cloister_data.errors import InvalidRequestError
from cloister_data.training import EvaluationPlan
from cloister_guard.statistics.evaluation import EvaluationQuery, plan_evaluation
from tests.fakes.stored import SCHEMA


def wanted(metric: Any, target: str, epsilon: float = 0.5) -> EvaluationPlan:
    return EvaluationPlan(
        sources=(SplitRef(dataset="hospital/patients", part="test"),),
        model="0" * 64,
        features=("radius",),
        target=target,
        metric=metric,
        epsilon=epsilon,
    )


def test_accuracy_counts_hits() -> None:
    found = plan_evaluation(wanted("accuracy", "benign"), SCHEMA, 200)
    assert (found.mechanism.sensitivity, found.mechanism.scale, found.step) == (1, 2.0, 1 / 200)
    assert found.errors_95 == (6 / 200,)
    assert found.title == "accuracy for benign, hospital/patients (test part)"
    assert EvaluationQuery.from_json(found.to_json()) == found


def test_mse_sums_clipped_errors() -> None:
    found = plan_evaluation(wanted("mse", "radius"), SCHEMA, 100)
    # The largest squared error is the range's square, 1600.
    assert found.step * found.mechanism.sensitivity * 100 == pytest.approx(1600)


@pytest.mark.parametrize(
    ("metric", "target", "units"),
    [("accuracy", "radius", 10), ("mse", "ward", 10), ("mse", "none", 10), ("mse", "radius", 0)],
)
def test_what_does_not_fit(metric: Any, target: str, units: int) -> None:
    with pytest.raises(InvalidRequestError):
        plan_evaluation(wanted(metric, target), SCHEMA, units)
