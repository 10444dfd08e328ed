"""An upload becomes a table: every column declared, every value inside its declaration, one row per privacy unit.

Errors name columns and row numbers (the first row after the header is row 1). They go to the owner, who has the rows.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cloister_data.datasets import MAX_UPLOAD_BYTES
from cloister_data.errors import InvalidRequestError, TooLargeError
from cloister_data.schema import BOOLEAN_VALUES, BooleanColumn, Column, RealColumn, Schema, TensorColumn
from cloister_guard.datasets.columns import convert, storage_type
from cloister_guard.datasets.faults import Fault, refuse, row_list
from cloister_guard.datasets.readers import read_csv, read_parquet
from cloister_guard.datasets.split import PART_COLUMN, SPLIT_COLUMN, split_values

Format = Literal["csv", "parquet"]

_CHECKED_BYTES = 64 << 20


def read_upload(blob: bytes | memoryview, data_format: Format, schema: Schema, *, split_key: bytes) -> pa.Table:
    """`read_rows`, then `add_places`."""
    return add_places(read_rows(blob, data_format, schema), schema, split_key)


def read_rows(blob: bytes | memoryview, data_format: Format, schema: Schema) -> pa.Table:
    """The validated table: the schema's columns in its order, as `stored_schema` types them.

    Runs in a worker (`cloister_guard.uploads`): what parses foreign bytes may crash on them.
    Raises InvalidRequestError with columns and row numbers, TooLargeError, or MemoryError.
    """
    if len(blob) > MAX_UPLOAD_BYTES:
        raise TooLargeError(f"The upload has {len(blob)} bytes.", why=f"The limit is {MAX_UPLOAD_BYTES}.")
    _check_schema(schema)
    raw = (read_csv if data_format == "csv" else read_parquet)(blob, schema)
    faults: list[Fault] = []
    columns = []
    for column in schema.columns:
        try:
            converted, found = convert(raw.column(column.name), column)
        except MemoryError:
            raise
        except pa.ArrowException as error:
            # Such as a time zone that doesn't exist.
            raise _inconvertible(column, str(error)) from error
        faults += found
        columns.append(converted)
    if faults:
        raise refuse(faults)
    table = pa.table(columns, schema=stored_schema(schema))
    if table.num_rows == 0:
        raise InvalidRequestError("The upload has no rows.", next_step="Nothing was stored. Check the file.")
    return table


def check_values(table: pa.Table, schema: Schema) -> None:
    """That a table of `stored_schema` holds nothing but declared values. It takes little memory on top of the table.

    Raises InvalidRequestError.
    """
    at_once = max(1, table.num_rows * _CHECKED_BYTES // max(1, table.nbytes))
    for start in range(0, table.num_rows, at_once):
        some = table.slice(start, at_once)
        for column in schema.columns:
            # What is stored is its own conversion: what `convert` finds in an upload, it finds here too.
            faults = convert(some.column(column.name), column)[1]
            if faults:
                raise refuse(faults)


def stored_schema(schema: Schema) -> pa.Schema:
    """How the declared columns are stored."""
    return pa.schema([(column.name, storage_type(column)) for column in schema.columns])


def add_places(table: pa.Table, schema: Schema, split_key: bytes) -> pa.Table:
    """The table with `__split__` (float64 in [0, 1)) and, where the schema has a partition, `__part__` (uint8, each
    row's place among the parts). `table` holds declared values alone. Raises InvalidRequestError where the units aren't
    one row each.
    """
    table = table.append_column(SPLIT_COLUMN, pa.array(_split(table, schema, split_key)))
    return table if schema.partition is None else table.append_column(PART_COLUMN, _parts(table, schema))


def _parts(table: pa.Table, schema: Schema) -> pa.ChunkedArray:
    labels = table.column(str(schema.partition))
    if pa.types.is_boolean(labels.type):
        labels = pc.if_else(labels, BOOLEAN_VALUES[1], BOOLEAN_VALUES[0])
    return pc.index_in(labels, value_set=pa.array(schema.parts, pa.string())).cast(pa.uint8())


def _inconvertible(column: Column, detail: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{column.name!r} can't be converted to {column.type}.",
        why=detail.splitlines()[0][:500] if detail else "",
        next_step="Nothing was stored. Convert the column, and upload again.",
    )


def _check_schema(schema: Schema) -> None:
    for name in (SPLIT_COLUMN, PART_COLUMN):
        if schema.column(name) is not None:
            raise InvalidRequestError(f"A column can't be named {name!r}.", next_step="Rename it.")
    unit = schema.column(schema.privacy_unit) if schema.privacy_unit is not None else None
    if isinstance(unit, RealColumn | BooleanColumn | TensorColumn):
        raise InvalidRequestError(
            f"The privacy unit {unit.name!r} is of type {unit.type}.",
            next_step="Name the unit by an integer, a text, a category or a date. Nothing was stored.",
        )


def _split(table: pa.Table, schema: Schema, key: bytes) -> npt.NDArray[np.float64]:
    if schema.privacy_unit is None:
        return split_values(key, range(table.num_rows))
    units = table.column(schema.privacy_unit)
    missing = np.flatnonzero(units.is_null().to_numpy())
    if len(missing):
        raise InvalidRequestError(
            f"The privacy unit {schema.privacy_unit!r} is missing in {row_list(missing)}.",
            why="Every row must say whose it is.",
            next_step="Name the unit in every row, or leave these rows out. Nothing was stored.",
        )
    _one_row_each(units, schema.privacy_unit)
    return split_values(key, units.to_pylist())


def _one_row_each(units: pa.ChunkedArray, name: str) -> None:
    codes = units.combine_chunks().dictionary_encode().indices.to_numpy()
    _, first, counts = np.unique(codes, return_index=True, return_counts=True)
    if not np.any(counts > 1):
        return
    repeated = np.ones(len(codes), dtype=np.bool_)
    repeated[first] = False
    raise InvalidRequestError(
        f"The privacy unit {name!r} appears more than once: again in {row_list(np.flatnonzero(repeated))}.",
        why="One person's rows must count as one, and this version holds one row for each unit.",
        next_step="Nothing was stored. Merge each unit's rows into one, such as the latest, and upload again.",
    )
