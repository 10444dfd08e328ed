"""Plans: everything about an answer but its numbers, from public facts alone."""

import math
from typing import Any

import pytest

from cloister_data.datasets import SplitRef
from cloister_data.errors import InvalidRequestError
from cloister_data.mechanism import Composition, DiscreteLaplace
from cloister_data.schema import IntegerColumn, RealColumn, Schema
from cloister_data.statistics import Question
from cloister_guard.statistics.plan import RESOLUTION, QueryPlan, plan
from tests.fakes.stored import SCHEMA

SOURCE = SplitRef(dataset="hospital/patients")


def ask(operation: Any, column: str | None = None, group_by: str | None = None, **more: Any) -> QueryPlan:
    question = Question(source=SOURCE, operation=operation, column=column, group_by=group_by)
    return plan(question, more.get("schema", SCHEMA), more.get("units", 1000), more.get("epsilon", 0.5))


def loss(query: QueryPlan) -> float:
    return sum(part.sensitivity / part.scale for part in query.parts)


def test_a_count() -> None:
    found = ask("count")
    assert found.mechanism == DiscreteLaplace(sensitivity=1, scale=2.0)
    assert found.groups == ()
    assert found.lattice is None
    assert found.errors_95 == (6.0,)
    assert found.title == "count, hospital/patients"


def test_a_mean_over_a_known_number_is_centred() -> None:
    found = ask("mean", "radius")
    assert found.lattice is not None
    assert (found.lattice.centre, found.lattice.step * found.lattice.bound) == (20.0, 20.0)
    assert found.mechanism == DiscreteLaplace(sensitivity=RESOLUTION, scale=2.0 * RESOLUTION)
    assert found.denominator == "units"
    # The Laplace noise of scale (R/2)/(epsilon N) at 95%: ln 20 of it.
    assert found.errors_95[0] == pytest.approx(20 / (0.5 * 1000) * math.log(20), rel=1e-6)


def test_a_mean_over_an_unknown_number_pays_for_the_number_too() -> None:
    for found in (ask("mean", "age"), ask("mean", "radius", "ward"), ask("mean", "age", "benign")):
        assert isinstance(found.mechanism, Composition)
        assert len(found.parts) == 2
        assert found.parts[1].sensitivity == 1
        assert found.denominator == "noisy count"
        assert [part.sensitivity / part.scale for part in found.parts] == [0.25, 0.25]


def test_sums() -> None:
    centred, plain, grouped = ask("sum", "radius"), ask("sum", "age"), ask("sum", "radius", "ward")
    assert centred.lattice is not None
    assert plain.lattice is not None
    assert grouped.lattice is not None
    assert centred.lattice.centre == 20.0
    assert (plain.lattice.centre, plain.lattice.step, plain.lattice.bound, plain.lattice.rounding) == (0, 1, 120, 0)
    assert grouped.lattice.step * grouped.lattice.bound == 40.0
    assert len(grouped.errors_95) == 3


def test_groups_are_the_declared_ones() -> None:
    assert ask("count", None, "ward").groups == ("a", "b", "c")
    assert ask("count", None, "benign").groups == ("false", "true")


def test_no_plan_costs_more_than_asked() -> None:
    for operation, column, group in [
        ("count", None, None), ("count", "age", "ward"), ("mean", "radius", None), ("mean", "age", None),
        ("mean", "benign", "ward"), ("sum", "age", "benign"), ("sum", "radius", None),
    ]:  # fmt: skip
        for epsilon in (1e-6, 0.1, 0.3, 1 / 3, 7.0, 1000.0):
            spent = loss(ask(operation, column, group, epsilon=epsilon))
            assert epsilon * (1 - 1e-12) <= spent <= epsilon * (1 + 1e-12)


@pytest.mark.parametrize(
    ("operation", "column", "group_by", "message"),
    [
        ("mean", None, None, "needs a column"),
        ("mean", "nothing", None, "no column 'nothing'"),
        ("count", "nothing", None, "no column"),
        ("count", None, "nothing", "no column"),
        ("mean", "ward", None, "of type category"),
        ("sum", "seen", None, "of type date"),
        ("mean", "note", None, "of type text"),
        ("mean", "patient", None, "names the privacy unit"),
        ("count", "patient", None, "names the privacy unit"),
        ("count", None, "patient", "names the privacy unit"),
        ("count", None, "age", "can't be a group"),
        ("mean", "benign", "benign", "both the column and the group"),
    ],
)
def test_questions_that_make_no_sense(operation: Any, column: str | None, group_by: str | None, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as refused:
        ask(operation, column, group_by)
    assert "Nothing was charged" in refused.value.next_step or column is None


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf])
def test_bad_epsilons(epsilon: float) -> None:
    with pytest.raises(InvalidRequestError, match="epsilon"):
        ask("count", epsilon=epsilon)


@pytest.mark.parametrize(("low", "high"), [(-1e15, 1e15), (1e15 - 0.125, 1e15), (-1e-300, 1e-300)])
def test_extreme_real_bounds(low: float, high: float) -> None:
    schema = Schema(columns=(RealColumn(name="x", low=low, high=high),))
    found = ask("mean", "x", schema=schema)
    assert found.lattice is not None
    assert all(math.isfinite(error) for error in found.errors_95)


def test_bounds_without_room_for_a_lattice() -> None:
    with pytest.raises(InvalidRequestError, match="too close"):
        ask("mean", "x", schema=Schema(columns=(RealColumn(name="x", low=0.0, high=5e-324),)))


@pytest.mark.parametrize(("low", "high"), [(-(2**53), 2**53), (2**53 - 1, 2**53), (0, 1), (-1, 2**31)])
def test_extreme_integer_bounds(low: int, high: int) -> None:
    schema = Schema(columns=(IntegerColumn(name="n", low=low, high=high),))
    for operation in ("mean", "sum"):
        found = ask(operation, "n", schema=schema)
        assert found.lattice is not None
        assert found.lattice.bound <= RESOLUTION


def test_no_units_is_a_plan_like_any_other() -> None:
    for found in (
        ask("mean", "radius", units=0),
        ask("mean", "age", units=0),
        ask("count", units=0),
        ask("sum", "age", units=0),
    ):
        assert all(math.isfinite(error) for error in found.errors_95)


def test_a_plan_survives_the_wire() -> None:
    for found in (ask("mean", "age", "ward"), ask("count"), ask("sum", "radius")):
        assert QueryPlan.from_json(found.to_json()) == found
