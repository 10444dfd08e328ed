"""What an evaluation will cost and how its integer aggregate reads, decided before any data is opened. Pure."""

from __future__ import annotations

from pydantic import Field

from cloister_data.base import Text, Wire
from cloister_data.datasets import joint_title
from cloister_data.errors import InvalidRequestError
from cloister_data.mechanism import DiscreteLaplace
from cloister_data.schema import Schema
from cloister_data.training import EvaluationPlan
from cloister_guard.encoding import target_kind
from cloister_guard.statistics.noise import check_epsilon, discrete_laplace, quantile
from cloister_guard.statistics.plan import MAX_UNITS

ERROR_STEPS = 1 << 20
"""Lattice steps from 0 to the largest squared error. The worker checks that `training.evaluation` counts the same."""


class EvaluationQuery(Wire):
    """Everything about an evaluation's answer but its number.

    One unit moves the exact aggregate by at most `mechanism.sensitivity` under zero-out adjacency; the metric is
    `step` times the noised aggregate. A null target counts as no hit and as no error.
    """

    plan: EvaluationPlan
    data_schema: Schema
    units: int = Field(ge=1, le=MAX_UNITS)
    step: float = Field(gt=0)
    mechanism: DiscreteLaplace
    errors_95: tuple[float] = Field(min_length=1, max_length=1)
    title: Text


def plan_evaluation(plan: EvaluationPlan, schema: Schema, units: int) -> EvaluationQuery:
    """The plan of an evaluation over `units` units. Raises InvalidRequestError where metric and target don't fit."""
    check_epsilon(plan.epsilon)
    if not 1 <= units <= MAX_UNITS:
        raise InvalidRequestError(
            f"An evaluation needs 1 to {MAX_UNITS} units, and these parts hold {units}.",
            next_step="Choose another split. Nothing was charged.",
        )
    kind = target_kind(schema, plan.target, plan.metric)
    if plan.metric == "accuracy":
        sensitivity, step = 1, 1.0 / units
    else:
        # Prediction and target lie in the target's declared range, so no squared error is above its square.
        sensitivity, step = ERROR_STEPS, 4.0 * kind.half_range**2 / (ERROR_STEPS * units)
    mechanism = discrete_laplace(sensitivity, plan.epsilon)
    return EvaluationQuery(
        plan=plan,
        data_schema=schema,
        units=units,
        step=step,
        mechanism=mechanism,
        errors_95=(step * quantile(mechanism.scale, 0.95),),
        title=f"{plan.metric} for {plan.target}, {joint_title(plan.sources)}",
    )
