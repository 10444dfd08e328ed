"""Exact aggregates and their noise: right at a huge epsilon, within the sensitivity, total, and honest about errors."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_data.datasets import SplitRef
from cloister_data.mechanism import DiscreteLaplace
from cloister_data.schema import BooleanColumn, CategoryColumn, IntegerColumn, RealColumn, Schema
from cloister_data.statistics import Question
from cloister_guard.datasets.columns import storage_type
from cloister_guard.statistics.compute import answer, exact_vectors, noisy_count
from cloister_guard.statistics.plan import QueryPlan, plan
from tests.fakes.stored import SCHEMA, Shelf

SMALL = Schema(
    columns=(
        RealColumn(name="x", low=-3.0, high=5.0),
        RealColumn(name="y", low=-3.0, high=5.0, nullable=True),
        IntegerColumn(name="n", low=-2, high=9),
        IntegerColumn(name="big", low=-(2**53), high=2**53, nullable=True),
        BooleanColumn(name="b", nullable=True),
        CategoryColumn(name="g", categories=("p", "q", "r"), nullable=True),
    )
)
QUESTIONS = [
    (operation, column, group)
    for operation in ("count", "sum", "mean")
    for column in (None, "x", "y", "n", "big", "b")
    for group in (None, "g", "b")
    if (operation == "count" or column is not None) and (column != group or column is None)
]


def ask(
    operation: Any, column: str | None, group: str | None, units: int, epsilon: float = 1.0, schema: Schema = SMALL
) -> QueryPlan:
    question = Question(source=SplitRef(dataset="a/b"), operation=operation, column=column, group_by=group)
    return plan(question, schema, units, epsilon)


def table_of(rows: list[dict[str, object]]) -> pa.Table:
    fields = pa.schema([(column.name, storage_type(column)) for column in SMALL.columns])
    return pa.Table.from_pylist(rows, schema=fields)


NULL: dict[str, object] = dict.fromkeys(column.name for column in SMALL.columns)

row = st.fixed_dictionaries(
    {
        "x": st.floats(-3, 5),
        "y": st.none() | st.floats(-3, 5),
        "n": st.integers(-2, 9),
        "big": st.none() | st.integers(-(2**53), 2**53),
        "b": st.none() | st.booleans(),
        "g": st.none() | st.sampled_from(["p", "q", "r"]),
    }
)
# What ingest would refuse, but a total function must bear.
wild = st.fixed_dictionaries(
    {
        "x": st.floats(),
        "y": st.none() | st.floats(),
        "n": st.integers(-(2**63), 2**63 - 1),
        "big": st.none() | st.integers(-(2**63), 2**63 - 1),
        "b": st.none() | st.booleans(),
        "g": st.none() | st.sampled_from(["p", "q", "r", "s", ""]),
    }
)


@settings(max_examples=25, deadline=None)
@given(st.lists(row, max_size=12), row | wild, st.integers(0, 12))
def test_one_unit_moves_each_aggregate_by_its_sensitivity_at_most(rows: Any, extra: Any, where: int) -> None:
    where = min(where, len(rows))
    neighbour = table_of([*rows[:where], NULL, *rows[where:]])
    here = table_of([*rows[:where], extra, *rows[where:]])
    for operation, column, group in QUESTIONS:
        query = ask(operation, column, group, len(rows) + 1)
        for one, other, part in zip(
            exact_vectors(query, here), exact_vectors(query, neighbour), query.parts, strict=True
        ):
            assert np.abs(one - other).sum() <= part.sensitivity


def test_the_sensitivity_is_reached() -> None:
    """The positive control of the test above: a sensitivity of one less would fail."""
    for operation, column, value in [("mean", "x", 5.0), ("sum", "y", 5.0), ("mean", "n", 9), ("count", "y", 1.0)]:
        query = ask(operation, column, None, 1)
        (one, *_), (other, *_) = (exact_vectors(query, table_of([found])) for found in ({**NULL, column: value}, NULL))
        assert abs(int(one[0] - other[0])) == query.parts[0].sensitivity


@settings(max_examples=25, deadline=None)
@given(st.lists(wild, max_size=5))
def test_every_question_has_an_answer_whatever_the_rows(rows: Any) -> None:
    table = table_of(rows)
    for operation, column, group in QUESTIONS:
        query = ask(operation, column, group, len(rows))
        found = answer(query, table)
        assert [estimate.group for estimate in found] == list(query.groups or (None,))
        assert all(math.isfinite(estimate.value) and math.isfinite(estimate.error_95) for estimate in found)


def test_exact_at_a_huge_epsilon(tmp_path: Path) -> None:
    table = Shelf(tmp_path, rows=500).table
    radius, age = table.column("radius"), table.column("age")

    def value(operation: Any, column: str | None, group: str | None = None) -> list[float]:
        query = ask(operation, column, group, 500, 1000.0, SCHEMA)
        return [estimate.value for estimate in answer(query, table)]

    assert value("count", None) == [500]
    assert value("count", "age") == [500 - age.null_count]
    assert value("mean", "radius") == pytest.approx([pc.mean(radius).as_py()], abs=1e-3)
    assert value("sum", "radius") == pytest.approx([pc.sum(radius).as_py()], abs=0.5)
    assert value("sum", "age") == pytest.approx([pc.sum(age).as_py()], abs=2)
    assert value("mean", "age") == pytest.approx([pc.mean(age).as_py()], abs=0.01)
    assert value("mean", "benign") == pytest.approx([np.mean(table.column("benign").to_numpy())], abs=1e-3)
    frame = table.to_pandas()
    grouped = frame.groupby("ward")["radius"]
    assert value("count", None, "ward") == [250, 250, 0]
    assert value("mean", "radius", "ward")[:2] == pytest.approx(grouped.mean().tolist(), abs=0.01)
    assert value("sum", "radius", "ward")[:2] == pytest.approx(grouped.sum().tolist(), abs=1)
    assert value("mean", "radius", "benign") == pytest.approx(
        frame.groupby("benign")["radius"].mean().tolist(), abs=0.01
    )
    assert value("mean", "radius", "ward")[2] == pytest.approx(20, abs=20)


def test_integers_are_summed_exactly() -> None:
    rows = [{**NULL, "n": value} for value in (9, 9, -2, 5)]
    query = ask("mean", "n", None, 4)
    assert query.lattice is not None
    # Centred at 3.5 in halves.
    assert exact_vectors(query, table_of(rows))[0].tolist() == [11 + 11 - 11 + 3]


@pytest.mark.parametrize(
    ("operation", "column", "group"),
    [
        ("count", None, None),
        ("mean", "radius", None),
        ("sum", "age", None),
        ("mean", "age", None),
        ("mean", "radius", "benign"),
    ],
)
def test_the_stated_error_holds(tmp_path: Path, operation: Any, column: str | None, group: str | None) -> None:
    table = Shelf(tmp_path, rows=400).table
    exact = [estimate.value for estimate in answer(ask(operation, column, group, 400, 1000.0, SCHEMA), table)]
    query = ask(operation, column, group, 400, 0.5, SCHEMA)
    tries = 200
    held = sum(
        abs(estimate.value - truth) <= estimate.error_95 * 1.001 + 0.01
        for _ in range(tries)
        for estimate, truth in zip(answer(query, table), exact, strict=True)
    )
    # Binomial(200, .95) is below 178 with probability 2e-4; the stated errors of means by group are cautious.
    assert held >= 178 * len(exact)


def test_the_forecast_is_near_what_the_answer_states(tmp_path: Path) -> None:
    table = Shelf(tmp_path, rows=400).table
    for column in ("age", "radius"):
        query = ask("mean", column, "benign" if column == "radius" else None, 400, 1.0, SCHEMA)
        for estimate, forecast in zip(answer(query, table), query.errors_95, strict=True):
            assert estimate.error_95 == pytest.approx(forecast, rel=0.7)


def test_means_with_a_noised_count_stay_in_the_declared_range() -> None:
    query = ask("mean", "y", "g", 0, 0.01)
    for _ in range(20):
        for estimate in answer(query, table_of([])):
            assert -3 <= estimate.value <= 5
            assert estimate.error_95 <= 8


def test_noisy_count() -> None:
    mechanism = DiscreteLaplace(sensitivity=1, scale=0.001)
    assert noisy_count(7, mechanism).value == 7
    assert noisy_count(7, mechanism, step=0.1).value == pytest.approx(0.7)
    wide = noisy_count(7, DiscreteLaplace(sensitivity=1, scale=10.0), step=0.5)
    assert wide.error_95 == pytest.approx(0.5 * 30, abs=0.5)
