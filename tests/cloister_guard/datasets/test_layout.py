"""A table that crosses as plain memory is the same on the other side, and nothing else can be made of that memory."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_data.errors import InvalidRequestError
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
from cloister_guard.datasets.ingest import check_values, stored_schema
from cloister_guard.datasets.layout import put_table, take_table

DAY = datetime.date(2020, 5, 1)
SCHEMA = Schema(
    columns=(
        RealColumn(name="x", low=-10, high=10, nullable=True),
        IntegerColumn(name="n", low=0, high=9),
        CategoryColumn(name="c", categories=("a", "ü")),
        BooleanColumn(name="b", nullable=True),
        DateColumn(name="d", low="2020-01-01", high="2020-12-31", nullable=True),
        TextColumn(name="t", max_bytes=4, nullable=True),
        TensorColumn(name="v", shape=(2, 2), dtype="int16", low=-5, high=5, nullable=True),
    )
)
ROWS: list[dict[str, Any]] = [
    {"x": 1.5, "n": 0, "c": "a", "b": True, "d": DAY, "t": "", "v": [1, 2, 3, 4]},
    {"x": None, "n": 9, "c": "ü", "b": None, "d": None, "t": None, "v": None},
    {"x": -10.0, "n": 3, "c": "a", "b": False, "d": DAY, "t": "üü", "v": [-5, 5, 0, 1]},
]


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=stored_schema(SCHEMA))


def packed(rows: pa.Table) -> memoryview:
    rooms: list[memoryview] = []

    def room(size: int) -> memoryview:
        rooms.append(memoryview(bytearray(size)))
        return rooms[-1]

    put_table(rows, room)
    return rooms[0]


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[1:2], ROWS, ROWS * 40])
def test_a_table_comes_back_as_it_was(rows: list[dict[str, Any]]) -> None:
    given = table(rows)
    found = take_table(packed(given), SCHEMA, given.num_rows)
    assert found.equals(given)
    assert found.schema.equals(given.schema, check_metadata=True)
    check_values(found, SCHEMA)


def test_a_part_of_a_table_and_one_in_chunks_come_back_too() -> None:
    whole = table(ROWS * 7)
    assert take_table(packed(whole.slice(1, 17)), SCHEMA, 17).equals(whole.slice(1, 17))
    chunks = pa.concat_tables([table(ROWS), table(ROWS)])
    assert take_table(packed(chunks), SCHEMA, 6).equals(chunks)


def test_more_rows_than_there_is_memory_for_are_refused() -> None:
    memory = packed(table(ROWS))
    for rows, room in ((10_000, memory), (20_000_000, memory), (3, memory[:64]), (3, memory[:0])):
        with pytest.raises(InvalidRequestError):
            take_table(room, SCHEMA, rows)


# The memory's pieces of 64 bytes: x, n take two each, c three, b and d two each, t three, v two.
@pytest.mark.parametrize(
    ("at", "values"),
    [
        (5 * 64, [0, 1, 0, 4]),
        (5 * 64, [-1, 1, 3, 4]),
        (5 * 64, [0, 1, 3, 1 << 30]),
        (5 * 64, [0, 1, 3, -4]),
        (5 * 64, [0, 2, 3, 4]),
    ],
    ids=["not in order", "before the text", "past the memory", "negative", "inside a character"],
)
def test_offsets_and_texts_that_are_none_are_refused(at: int, values: list[int]) -> None:
    memory = packed(table(ROWS))
    assert np.frombuffer(memory, np.int32, 4, at).tolist() == [0, 1, 3, 4]
    memory[at : at + 16] = np.array(values, np.int32).tobytes()
    with pytest.raises(InvalidRequestError):
        take_table(memory, SCHEMA, 3)


def change(name: str, value: Any) -> Callable[[], pa.Table]:
    return lambda: table([ROWS[0], {**ROWS[2], name: value}])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (change("x", 10.5), "'x' is outside"),
        (change("x", float("nan")), "'x' isn't a finite number"),
        (change("n", -1), "'n' is outside"),
        (change("n", None), "'n' isn't declared nullable"),
        (change("c", "b"), "'c' is none of the declared categories"),
        (change("d", datetime.date(2021, 1, 1)), "'d' is outside"),
        (change("t", "abcde"), "'t' is longer"),
        (change("v", [0, 0, 0, 6]), "'v' holds numbers"),
    ],
)
def test_values_that_are_not_declared_are_seen_again(rows: Callable[[], pa.Table], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        check_values(take_table(packed(rows()), SCHEMA, 2), SCHEMA)


def test_the_last_row_of_a_large_table_is_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloister_guard.datasets.ingest._CHECKED_BYTES", 1)
    check_values(table(ROWS * 5), SCHEMA)
    with pytest.raises(InvalidRequestError, match="'n' is outside"):
        check_values(table([*ROWS * 5, {**ROWS[0], "n": 10}]), SCHEMA)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=600), st.integers(0, 1100), st.integers(1, 40))
def test_any_memory_is_a_table_of_declared_values_or_refused(noise: bytes, at: int, rows: int) -> None:
    memory = packed(table(ROWS * 5))
    memory[at : at + len(noise)] = noise[: len(memory) - at]
    try:
        found = take_table(memory, SCHEMA, rows)
        check_values(found, SCHEMA)
    except InvalidRequestError:
        return
    assert all(0 <= row["n"] <= 9 and row["c"] in ("a", "ü") for row in found.to_pylist())
