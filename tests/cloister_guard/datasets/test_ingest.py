"""Uploads: every value inside its declaration, one row a unit, and errors that name column and row."""

import contextlib
import datetime
import io
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_data.errors import CloisterError, InvalidRequestError, TooLargeError
from cloister_data.schema import (
    BooleanColumn,
    CategoryColumn,
    Column,
    DateColumn,
    IntegerColumn,
    RealColumn,
    Schema,
    TensorColumn,
    TextColumn,
)
from cloister_guard.datasets import readers
from cloister_guard.datasets.ingest import read_upload
from cloister_guard.datasets.split import SPLIT_COLUMN
from tests.fakes.stored import SCHEMA, csv_rows

KEY = bytes(32)


def one(column: Column, *values: str) -> pa.Table:
    text = column.name + ",other\n" + "".join(f"{value},1\n" for value in values)
    schema = Schema(columns=(column, IntegerColumn(name="other", low=0, high=1)))
    return read_upload(text.encode(), "csv", schema, split_key=KEY)


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def from_parquet(column: Column, array: pa.Array) -> pa.Table:
    return read_upload(parquet(pa.table({column.name: array})), "parquet", Schema(columns=(column,)), split_key=KEY)


X = RealColumn(name="x", low=-10, high=10)
N = IntegerColumn(name="n", low=0, high=9)
C = CategoryColumn(name="c", categories=("a", "b c", "ü"))
B = BooleanColumn(name="b")
D = DateColumn(name="d", low="2020-01-01", high="2020-12-31")
T = TextColumn(name="t", max_bytes=4)


def nullable(column: Any) -> Any:
    return column.model_copy(update={"nullable": True})


@pytest.mark.parametrize(
    ("column", "texts", "expected"),
    [
        (X, ["1", "-1.5", "+2e0", " .5 ", "-10", "1e-9"], [1.0, -1.5, 2.0, 0.5, -10.0, 1e-9]),
        (N, ["0", "+9", " 7 "], [0, 9, 7]),
        (C, ["a", "b c", "ü"], ["a", "b c", "ü"]),
        (B, ["true", "False", "1", "0"], [True, False, True, False]),
        (D, ["2020-02-29", "2020-12-31"], [datetime.date(2020, 2, 29), datetime.date(2020, 12, 31)]),
        (T, ["abcd", '"a,\nb"', '""'], ["abcd", "a,\nb", ""]),
        (nullable(X), ["", "1"], [None, 1.0]),
        (nullable(N), ["", "1"], [None, 1]),
        (nullable(C), ["", "a"], [None, "a"]),
        (nullable(B), ["", "1"], [None, True]),
        (nullable(D), ["", "2020-01-01"], [None, datetime.date(2020, 1, 1)]),
        (nullable(T), ["", '""'], [None, ""]),
    ],
)
def test_what_fits_is_read(column: Column, texts: list[str], expected: list[object]) -> None:
    table = one(column, *texts)
    assert table.column(column.name).to_pylist() == expected
    assert table.column_names == [column.name, "other", SPLIT_COLUMN]
    assert table.schema.field(SPLIT_COLUMN).type == pa.float64()


@pytest.mark.parametrize(
    ("column", "texts", "message"),
    [
        (X, ["1", "x"], "'x' isn't a finite number in row 2"),
        (X, ["1", "NaN", "inf"], "'x' isn't a finite number in rows 2, 3"),
        (X, ["1e400", "0x1p3", "1_0"], "in rows 1, 2, 3"),
        (X, ["10.001"], "'x' is outside -10 to 10 in row 1"),
        (X, [""], "'x' isn't declared nullable, and is missing in row 1"),
        (N, ["1.5"], "'n' isn't a whole number in row 1"),
        (N, ["10", "99999999999999999999"], "'n' isn't a whole number in row 2; 'n' is outside 0 to 9 in row 1"),
        (C, ["d"], "'c' is none of the declared categories in row 1"),
        (C, ["A", " a", '""'], "in rows 1, 2, 3"),
        (B, ["yes", "2"], "'b' is none of true, false, 1 and 0 in rows 1, 2"),
        (D, ["2020-02-30", "01/02/2020"], "'d' isn't a day like 2024-01-31 in rows 1, 2"),
        (D, ["2021-01-01"], "'d' is outside 2020-01-01 to 2020-12-31 in row 1"),
        (T, ["abcde", "üüü"], "'t' is longer than 4 bytes in rows 1, 2"),
        (N, ["10"] * 7, "rows 1, 2, 3, 4, 5 and 2 more"),
    ],
)
def test_what_does_not_fit_is_named_by_column_and_row(column: Column, texts: list[str], message: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        one(column, *texts)
    assert message in refused.value.what
    assert refused.value.next_step.startswith("Nothing was stored")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"x,n\n1,2\n", "undeclared columns: 'n'"),
        (b"n\n2\n", "lacks 'x'"),
        (b"x,x\n1,2\n", "names 'x' twice"),
        (b"x\n", "no rows"),
        (b"", "can't be read as CSV"),
        (b"x\n\xff\xfe\n", "can't be read as CSV"),
        (b"x,other\n1,2\n", "undeclared"),
    ],
)
def test_files_that_are_not_the_schema(text: bytes, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        read_upload(text, "csv", Schema(columns=(X,)), split_key=KEY)


def test_ragged_rows_are_named() -> None:
    schema = Schema(columns=(X, N))
    with pytest.raises(InvalidRequestError, match="in rows 2, 4"):
        read_upload(b"x,n\n1,2\n1\n1,2\n1,2,3\n", "csv", schema, split_key=KEY)


def test_a_unit_has_one_row() -> None:
    text = csv_rows(30)
    assert read_upload(text, "csv", SCHEMA, split_key=KEY).num_rows == 30
    lines = text.splitlines()
    with pytest.raises(InvalidRequestError, match="more than once: again in rows 31, 32") as refused:
        read_upload(b"\n".join([*lines, lines[3], lines[4]]) + b"\n", "csv", SCHEMA, split_key=KEY)
    assert "Merge" in refused.value.next_step


def test_a_unit_is_never_null() -> None:
    schema = Schema(privacy_unit="n", columns=(nullable(N), X))
    with pytest.raises(InvalidRequestError, match="missing in row 2"):
        read_upload(b"n,x\n1,1\n,1\n", "csv", schema, split_key=KEY)


@pytest.mark.parametrize("column", [X, B, TensorColumn(name="i", shape=(2,), dtype="uint8", low=0, high=9)])
def test_what_cannot_name_a_unit(column: Column) -> None:
    with pytest.raises(InvalidRequestError, match="privacy unit"):
        read_upload(b"", "csv", Schema(privacy_unit=column.name, columns=(column,)), split_key=KEY)


def test_rows_are_units_where_none_is_named() -> None:
    schema = Schema(columns=(X,))
    table = read_upload(b"x\n1\n1\n1\n", "csv", schema, split_key=KEY)
    assert len(set(table.column(SPLIT_COLUMN).to_pylist())) == 3


@pytest.mark.parametrize(
    ("column", "array", "expected"),
    [
        (X, pa.array([1, 2], pa.int32()), [1.0, 2.0]),
        (X, pa.array([1.5, 2], pa.float32()), [1.5, 2.0]),
        (X, pa.array(["1.5", " 2"]), [1.5, 2.0]),
        (N, pa.array([1, 2], pa.uint64()), [1, 2]),
        (N, pa.array([1.0, 2.0]), [1, 2]),
        (C, pa.array(["a", "b c"]).dictionary_encode(), ["a", "b c"]),
        (C, pa.array(["a", "ü"], pa.large_string()), ["a", "ü"]),
        (B, pa.array([True, False]), [True, False]),
        (B, pa.array([1, 0]), [True, False]),
        (D, pa.array([datetime.datetime(2020, 5, 1, 12)]), [datetime.date(2020, 5, 1)]),
        (D, pa.array([datetime.date(2020, 5, 1)]), [datetime.date(2020, 5, 1)]),
        (nullable(X), pa.nulls(2), [None, None]),
        (nullable(C), pa.nulls(2), [None, None]),
    ],
)
def test_parquet_types(column: Column, array: pa.Array, expected: list[object]) -> None:
    assert from_parquet(column, array).column(column.name).to_pylist() == expected


@pytest.mark.parametrize(
    ("column", "array", "message"),
    [
        (X, pa.array([1.0, float("nan")]), "finite number in row 2"),
        (X, pa.array([True]), "declared real, and the file's type is bool"),
        (N, pa.array([2**63], pa.uint64()), "whole number in row 1"),
        (N, pa.array([1.0, 0.5, float("inf"), 1e300]), "whole number in rows 2, 3, 4"),
        (T, pa.array([b"\xff"]), "declared text, and the file's type is binary"),
        (C, pa.array([1.5]), "declared category"),
        (X, pa.array([None, 1.0]), "missing in row 1"),
    ],
)
def test_parquet_values_that_do_not_fit(column: Column, array: pa.Array, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        from_parquet(column, array)


def test_tensors() -> None:
    column = TensorColumn(name="i", shape=(2, 2), dtype="uint8", low=0, high=200, nullable=True)
    good = pa.array([[1, 2, 3, 4], None, [0, 0, 0, 200]], pa.list_(pa.int64()))
    table = from_parquet(column, good)
    assert table.column("i").type == pa.list_(pa.uint8(), 4)
    assert table.column("i").to_pylist() == [[1, 2, 3, 4], None, [0, 0, 0, 200]]
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(8, dtype=np.uint8)), 4)
    assert from_parquet(column, fixed).column("i").to_pylist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for bad, message in [
        (pa.array([[1, 2, 3, 4], [1, 2]]), "doesn't hold 4 numbers in row 2"),
        (pa.array([[1, 2, 3, 201]]), "aren't uint8 in 0 to 200 in row 1"),
        (pa.array([[1, 2, 3, 0.5]]), "aren't uint8"),
        (pa.array([[1, 2, 3, float("nan")]]), "aren't uint8"),
        (pa.array([["a", "b", "c", "d"]]), "declared tensor"),
    ]:
        with pytest.raises(InvalidRequestError, match=message):
            from_parquet(column, bad)
    with pytest.raises(InvalidRequestError, match="Parquet"):
        one(column, "1")


def test_sizes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    table = parquet(pa.table({"x": np.zeros(1000)}))
    schema = Schema(columns=(X,))
    assert read_upload(table, "parquet", schema, split_key=KEY).num_rows == 1000
    monkeypatch.setattr(readers, "MAX_ROWS", 999)
    for blob, kind in ((table, "parquet"), (b"x\n" + b"1\n" * 1000, "csv")):
        with pytest.raises(TooLargeError, match="rows"):
            read_upload(blob, kind, schema, split_key=KEY)  # type: ignore[arg-type]


def test_a_parquet_bomb_is_stopped_while_it_unpacks(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = parquet(pa.table({"t": ["aaaa" * 1000] * 10_000}))
    assert len(bomb) < 200_000
    monkeypatch.setattr(readers, "MAX_DECODED_BYTES", 10_000_000)
    with pytest.raises(TooLargeError, match="unpacks"):
        read_upload(bomb, "parquet", Schema(columns=(T,)), split_key=KEY)


def test_a_file_that_names_a_million_columns_is_refused_by_its_header() -> None:
    commas = b"," * 1_000_000 + b"\n"
    wide = parquet(pa.table({f"c{number}": [0] for number in range(8200)}))
    for blob, kind in ((commas * 2, "csv"), (b'"' + commas, "csv"), (wide, "parquet")):
        started = time.monotonic()
        with pytest.raises(InvalidRequestError):
            read_upload(blob, kind, Schema(columns=(X,)), split_key=KEY)  # type: ignore[arg-type]
        assert time.monotonic() - started < 5


def test_a_text_that_a_parquet_file_repeats_is_counted_before_it_unpacks() -> None:
    """501 bytes that would take 60 GB in their first batch."""
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 60_000, pa.int32()), ["x" * 1_000_000])
    sink = io.BytesIO()
    pq.write_table(pa.table({"t": repeated}), sink, compression="zstd", write_statistics=False)
    assert len(sink.getvalue()) < 1000
    with pytest.raises(TooLargeError, match="60000000000"):
        read_upload(sink.getvalue(), "parquet", Schema(columns=(T,)), split_key=KEY)
    few = pa.DictionaryArray.from_arrays(pa.array([1, 0, None, 1], pa.int32()), ["a", "b"])
    assert from_parquet(T.model_copy(update={"nullable": True}), few).column(T.name).to_pylist() == [
        "b",
        "a",
        None,
        "b",
    ]


def test_parquet_types_of_any_size_are_refused_before_they_are_read() -> None:
    tensor = TensorColumn(name="i", shape=(4,), dtype="float32", low=0, high=1)
    with pytest.raises(InvalidRequestError, match="more numbers"):
        from_parquet(tensor, pa.array([[0.0] * 100_000]))
    for column, array in (
        (T, pa.array([b"x" * 100], pa.binary(100))),
        (T, pa.array([["x"]])),
        (tensor, pa.array([["x"] * 4])),
        (tensor, pa.array([[[0.0]] * 4])),
    ):
        with pytest.raises(InvalidRequestError, match="the file's type is"):
            from_parquet(column, array)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["csv", "parquet"]))
def test_hostile_bytes_give_an_error_of_ours(blob: bytes, kind: Any) -> None:
    with contextlib.suppress(CloisterError):
        read_upload(b"x,n\n" + blob if kind == "csv" else blob, kind, Schema(columns=(X, N)), split_key=KEY)


def test_a_parquet_file_with_a_name_that_is_not_utf8_is_refused() -> None:
    whole = parquet(pa.table({"qq": [1.0, 2.0]})).replace(b"qq", b"\x80q")
    with pytest.raises(InvalidRequestError, match="can't be read as Parquet"):
        read_upload(whole, "parquet", Schema(columns=(X,)), split_key=KEY)
