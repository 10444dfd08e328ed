"""Schemas: bounds stand in order, names differ, and nothing is unbounded."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cloister_data.datasets import SplitRef, joint_title
from cloister_data.schema import (
    BooleanColumn,
    CategoryColumn,
    DateColumn,
    IntegerColumn,
    RealColumn,
    Schema,
    TensorColumn,
    TextColumn,
)

EVERY_TYPE = Schema(
    description="One column of each type.",
    privacy_unit="patient",
    columns=(
        IntegerColumn(name="patient", low=0, high=10**9),
        RealColumn(name="mean radius", low=0, high=50, nullable=True),
        CategoryColumn(name="diagnosis", categories=("benign", "malignant")),
        BooleanColumn(name="smoker"),
        DateColumn(name="seen", low="2000-01-01", high="2030-12-31"),
        TextColumn(name="note", max_bytes=1000),
        TensorColumn(name="scan", shape=(1, 28, 28), dtype="uint8", low=0, high=255),
    ),
)


def test_every_type_survives_json() -> None:
    again = Schema.from_json(EVERY_TYPE.to_json())
    assert again == EVERY_TYPE
    assert [column.type for column in again.columns] == [
        "integer",
        "real",
        "category",
        "boolean",
        "date",
        "text",
        "tensor",
    ]


def test_a_column_is_found_by_name() -> None:
    found = EVERY_TYPE.column("diagnosis")
    assert isinstance(found, CategoryColumn)
    assert EVERY_TYPE.column("diagnosis ") is None


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ("[]", "at least 1"),
        ('[{"type": "real", "name": "a", "low": 1, "high": 1}]', "low must be below high"),
        ('[{"type": "integer", "name": "a", "low": 2, "high": 1}]', "low must be below high"),
        ('[{"type": "real", "name": "a", "low": NaN, "high": 1}]', "finite number"),
        ('[{"type": "real", "name": "a", "low": -1e16, "high": 1}]', "greater than or equal"),
        ('[{"type": "category", "name": "a", "categories": ["x"]}]', "at least 2"),
        ('[{"type": "category", "name": "a", "categories": ["x", "x"]}]', "categories must differ"),
        ('[{"type": "category", "name": "a", "categories": ["x", "y\\u001b"]}]', "pattern"),
        ('[{"type": "date", "name": "a", "low": "yesterday", "high": "2030-01-01"}]', "pattern"),
        ('[{"type": "text", "name": "a", "max_bytes": 2000000}]', "less than or equal"),
        ('[{"type": "tensor", "name": "a", "shape": [], "dtype": "uint8", "low": 0, "high": 1}]', "at least 1"),
        ('[{"type": "tensor", "name": "a", "shape": [2], "dtype": "object", "low": 0, "high": 1}]', "Input should be"),
        ('[{"type": "object", "name": "a"}]', "does not match any of the expected tags"),
        ('[{"type": "boolean", "name": "a"}, {"type": "boolean", "name": "a"}]', "same name"),
        ('[{"type": "boolean", "name": "a", "sql": "DROP"}]', "Extra inputs"),
    ],
)
def test_what_a_schema_refuses(columns: str, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Schema.from_json(f'{{"columns": {columns}}}')


def test_the_privacy_unit_is_a_column() -> None:
    columns = (BooleanColumn(name="a"),)
    assert Schema(columns=columns, privacy_unit="a").privacy_unit == "a"
    with pytest.raises(ValidationError, match="names no column"):
        Schema(columns=columns, privacy_unit="b")


@settings(deadline=None)
@given(low=st.floats(allow_nan=True, allow_infinity=True), high=st.floats(allow_nan=True, allow_infinity=True))
def test_bounds_are_finite_and_in_order(low: float, high: float) -> None:
    try:
        column = RealColumn(name="a", low=low, high=high)
    except ValidationError:
        return
    assert -1e15 <= column.low < column.high <= 1e15


@pytest.mark.parametrize("test", [0.0, 1.0, -0.1, 1.5])
def test_a_split_leaves_something_on_both_sides(test: float) -> None:
    assert SplitRef(dataset="a/b", part="test", test=0.2).test == 0.2
    with pytest.raises(ValidationError):
        SplitRef(dataset="a/b", part="test", test=test)


def test_a_partition_divides_people_for_good() -> None:
    unit, site = IntegerColumn(name="who", low=0, high=9), CategoryColumn(name="site", categories=("n", "s"))
    abroad = BooleanColumn(name="abroad")
    assert Schema(columns=(unit, site), privacy_unit="who").parts == ()
    assert Schema(columns=(unit, site), privacy_unit="who", partition="site").parts == ("n", "s")
    assert Schema(columns=(unit, abroad), privacy_unit="who", partition="abroad").parts == ("false", "true")


@pytest.mark.parametrize(
    ("column", "unit", "partition", "reason"),
    [
        (CategoryColumn(name="site", categories=("n", "s")), None, "site", "needs a privacy_unit"),
        (CategoryColumn(name="site", categories=("n", "s")), "who", "place", "names no column"),
        (CategoryColumn(name="site", categories=("n", "s"), nullable=True), "who", "site", "not be nullable"),
        (BooleanColumn(name="site", nullable=True), "who", "site", "not be nullable"),
        (IntegerColumn(name="site", low=0, high=3), "who", "site", "category or boolean"),
        (CategoryColumn(name="site", categories=("n", "s")), "site", "site", "category or boolean"),
        (CategoryColumn(name="site", categories=tuple("abcdefghijklmnopq")), "who", "site", "at most 16"),
    ],
)
def test_what_no_partition_is(column: CategoryColumn, unit: str | None, partition: str, reason: str) -> None:
    columns = (IntegerColumn(name="who", low=0, high=9), column)
    with pytest.raises(ValidationError, match=reason):
        Schema(columns=columns, privacy_unit=unit, partition=partition)


def test_titles_name_the_rows_and_stay_short() -> None:
    given = {"dataset": "a/b", "test": 0.5}
    titles = [
        SplitRef.model_validate(given | rows).title
        for rows in ({}, {"part": "test"}, {"division": "north"}, {"division": "north", "part": "train"})
    ]
    assert titles == ["a/b", "a/b (test part)", "a/b (north)", "a/b (north, train part)"]
    long = [SplitRef(dataset=f"{'a' * 63}/{'b' * 63}", division="\N{SNOWMAN}" * 128)] * 16
    assert joint_title(long[:1]) == long[0].title
    assert len(joint_title(long)) == 3000
