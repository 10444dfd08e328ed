"""Mock rows: from the schema alone, inside its declarations, the same every time."""

import datetime
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_data.errors import InvalidRequestError
from cloister_data.mock import MAX_MOCK_ROWS, mock_rows
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

SCHEMA = Schema(
    privacy_unit="id",
    columns=(
        TextColumn(name="id", max_bytes=8),
        RealColumn(name="x", low=-3.5, high=7.25, nullable=True),
        IntegerColumn(name="n", low=3, high=5),
        CategoryColumn(name="g", categories=("p", "q", "r")),
        BooleanColumn(name="b"),
        DateColumn(name="d", low="2024-02-28", high="2024-03-01"),
        TextColumn(name="t", max_bytes=3),
        TensorColumn(name="i", shape=(2, 3), dtype="uint8", low=0, high=9),
        TensorColumn(name="f", shape=(4,), dtype="float32", low=-0.5, high=0.5),
    ),
)


def test_values_are_inside_their_declarations() -> None:
    rows = mock_rows(SCHEMA, 400)
    assert list(rows) == [column.name for column in SCHEMA.columns]
    assert all(len(values) == 400 for values in rows.values())
    assert len(set(rows["id"])) == 400
    present = [value for value in rows["x"] if value is not None]
    assert 0 < 400 - len(present) < 60
    assert all(isinstance(value, float) and -3.5 <= value <= 7.25 for value in present)
    assert set(rows["n"]) == {3, 4, 5}
    assert set(rows["g"]) == {"p", "q", "r"}
    assert set(rows["b"]) == {True, False}
    assert set(rows["d"]) == {datetime.date(2024, 2, 28), datetime.date(2024, 2, 29), datetime.date(2024, 3, 1)}
    assert all(1 <= len(value.encode()) <= 3 for value in rows["t"])
    assert all(value.shape == (2, 3) and value.dtype == np.uint8 and value.max() <= 9 for value in rows["i"])
    assert all(value.dtype == np.float32 and abs(value).max() <= 0.5 for value in rows["f"])


def test_the_same_schema_and_seed_give_the_same_rows() -> None:
    assert mock_rows(SCHEMA, 20)["x"] == mock_rows(SCHEMA, 20)["x"]
    assert mock_rows(SCHEMA, 20)["x"] != mock_rows(SCHEMA, 20, seed=1)["x"]
    fewer = SCHEMA.model_copy(update={"columns": SCHEMA.columns[:2]})
    assert mock_rows(fewer, 20)["x"] == mock_rows(SCHEMA, 20)["x"]


@settings(max_examples=50, deadline=None)
@given(st.floats(-1e15, 1e15), st.floats(-1e15, 1e15), st.integers(1, 20))
def test_reals_never_leave_their_bounds(low: float, high: float, rows: int) -> None:
    low, high = min(low, high), max(low, high)
    if low == high:
        return
    values = mock_rows(Schema(columns=(RealColumn(name="x", low=low, high=high),)), rows)["x"]
    assert all(low <= value <= high for value in values)


@pytest.mark.parametrize("rows", [0, -1, MAX_MOCK_ROWS + 1])
def test_how_many_rows(rows: int) -> None:
    with pytest.raises(InvalidRequestError):
        mock_rows(SCHEMA, rows)


def test_units_repeat_only_where_their_declaration_has_no_room() -> None:
    schema = Schema(privacy_unit="n", columns=(IntegerColumn(name="n", low=1, high=3), BooleanColumn(name="b")))
    assert mock_rows(schema, 5)["n"] == [1, 2, 3, 1, 2]


def test_importing_it_loads_no_numpy() -> None:
    code = "import sys, cloister_data.mock; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
