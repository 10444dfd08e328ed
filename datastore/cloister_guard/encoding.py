"""Rows become numbers: features scaled by their DECLARED bounds, targets in the form that the loss takes.

Everything here follows from the schema. Values outside the bounds are clamped and unknown categories become nulls, so
that no row can make an encoding fail.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cloister_data.errors import InternalError, InvalidRequestError
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
from cloister_data.training import Loss, Metric

MAX_CLASSES = 4096
MAX_WIDTH = 1 << 20
NARROWEST = 1e-100
Floats = npt.NDArray[np.float32]
Aim = Literal["classes", "binary", "number"]
"""What a loss or a metric predicts: one of K classes, one of two by a logit, a number scaled to [-1, 1]."""

_AIMS: dict[str, Aim] = {
    "cross_entropy": "classes",
    "accuracy": "classes",
    "binary_cross_entropy": "binary",
    "mse": "number",
    "l1": "number",
    "huber": "number",
}


@dataclass(frozen=True)
class Targets:
    """`values` [N]: int64 class numbers (losses over classes), float32 in {0, 1} (binary) or float32 in [-1, 1].

    `present` [N] is False where the target is null; the value there is 0 and the unit counts for nothing.
    """

    values: npt.NDArray[np.int64] | Floats
    present: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TargetKind:
    """What the schema says of a target: how a loss takes it, its classes (0 for numbers), its half range (numbers)."""

    aim: Aim
    classes: int
    half_range: float


def feature_width(schema: Schema, features: Sequence[str]) -> int:
    """The number F of float32 values that one row becomes. Raises InvalidRequestError."""
    width = sum(_width(column) for column in _features(schema, features))
    if width > MAX_WIDTH:
        raise InvalidRequestError(
            f"The features encode to {width} numbers a row.", why=f"At most {MAX_WIDTH} are possible."
        )
    return width


def encode_features(table: pa.Table, schema: Schema, features: Sequence[str]) -> Floats:
    """float32 [N, F] in the order asked.

    Reals, integers and dates go to [-1, 1] by their declared bounds, booleans to -1/1, categories to one-hot in the
    declared order; a null is all zeros. Raises InvalidRequestError where a column has no declared encoding.
    """
    columns = _features(schema, features)
    encoded = np.zeros((table.num_rows, feature_width(schema, features)), dtype=np.float32)
    at = 0
    for column in columns:
        values = _combined(table, column.name)
        width = _width(column)
        block = encoded[:, at : at + width]
        if isinstance(column, CategoryColumn):
            codes = _codes(values, column.categories)
            rows = np.flatnonzero(codes >= 0)
            block[rows, codes[rows]] = 1.0
        elif isinstance(column, BooleanColumn):
            block[:, 0] = _booleans(values)
        else:
            scaled, present = _scaled(values, column)
            block[:, 0] = np.where(present, scaled, 0.0)
        at += width
    return encoded


def target_kind(schema: Schema, target: str, loss: Loss | Metric) -> TargetKind:
    """How `target` meets `loss` (or the metric). Raises InvalidRequestError where they don't fit."""
    column = schema.column(target)
    if column is None:
        raise InvalidRequestError(
            f"There is no column {target!r} to predict.",
            why="The columns are " + _names(schema) + ".",
            next_step="Name one of them as the target.",
        )
    if target == schema.privacy_unit:
        raise InvalidRequestError(
            f"{target!r} can't be the target.", why="It names the privacy unit.", next_step="Name another column."
        )
    aim = _AIMS[loss]
    if aim == "number":
        if isinstance(column, IntegerColumn | RealColumn | DateColumn):
            low, high = _bounds(column)
            if high - low < NARROWEST:
                raise InvalidRequestError(f"The declared range of {target!r} is too narrow to be predicted.")
            return TargetKind("number", 0, (high - low) / 2)
        raise InvalidRequestError(
            f"{loss} can't predict the column {target!r}.",
            why=f"It predicts numbers, and {target!r} is of type {column.type}.",
            next_step="Use cross_entropy or binary_cross_entropy (accuracy), or name a numeric target.",
        )
    classes = _classes(column)
    if classes is None:
        raise InvalidRequestError(
            f"{loss} can't predict the column {target!r}.",
            why=f"It predicts classes, and {target!r} is of type {column.type}.",
            next_step="Use mse, l1 or huber, or name a category, boolean or small integer target.",
        )
    if aim == "binary" and classes != 2:
        raise InvalidRequestError(
            f"binary_cross_entropy can't predict the column {target!r}.",
            why=f"It has {classes} classes, not two.",
            next_step="Use cross_entropy.",
        )
    return TargetKind(aim, classes, 1.0)


def encode_target(table: pa.Table, schema: Schema, target: str, loss: Loss | Metric) -> Targets:
    """The target in the loss's form (see `Targets`). Raises InvalidRequestError where target and loss don't fit."""
    kind = target_kind(schema, target, loss)
    column = schema.column(target)
    if column is None:
        raise InternalError("A checked column is gone.")
    values = _combined(table, target)
    if kind.aim == "number":
        scaled, present = _scaled(values, column)
        return Targets(np.where(present, scaled, 0.0).astype(np.float32), present)
    if isinstance(column, CategoryColumn):
        codes = _codes(values, column.categories)
    elif isinstance(column, BooleanColumn):
        signs = _booleans(values)
        codes = np.where(signs == 0, -1, (signs > 0).astype(np.int64)).astype(np.int64)
    else:
        numbers, present = _numbers(values)
        low, high = _bounds(column)
        codes = np.where(present, np.clip(numbers, low, high) - low, -1).astype(np.int64)
    present = codes >= 0
    codes = np.where(present, codes, 0)
    return Targets(codes.astype(np.float32) if kind.aim == "binary" else codes, present)


def _features(schema: Schema, features: Sequence[str]) -> list[Column]:
    columns: list[Column] = []
    declared = {column.name: column for column in schema.columns}
    for name in features:
        column = declared.get(name)
        if column is None:
            raise InvalidRequestError(
                f"There is no column {name!r}.",
                why="The columns are " + _names(schema) + ".",
                next_step="Name features among them.",
            )
        if name == schema.privacy_unit:
            raise InvalidRequestError(
                f"{name!r} can't be a feature.",
                why="It names the privacy unit.",
                next_step="Leave it out of the features.",
            )
        if isinstance(column, TextColumn | TensorColumn):
            raise InvalidRequestError(
                f"{name!r} is a feature without a declared encoding.",
                why=f"Columns of type {column.type} don't become numbers by their schema alone.",
                next_step="Use real, integer, date, boolean or category columns.",
            )
        if isinstance(column, DateColumn):
            _bounds(column)
        columns.append(column)
    if not columns:
        raise InvalidRequestError("No features were named.", next_step="Name at least one column.")
    return columns


def _names(schema: Schema) -> str:
    names = [column.name for column in schema.columns if column.name != schema.privacy_unit]
    return ", ".join(names[:40]) + (f" and {len(names) - 40} more" if len(names) > 40 else "")


def _width(column: Column) -> int:
    return len(column.categories) if isinstance(column, CategoryColumn) else 1


def _classes(column: Column) -> int | None:
    match column:
        case CategoryColumn(categories=categories):
            return len(categories)
        case BooleanColumn():
            return 2
        case IntegerColumn(low=low, high=high) if high - low < MAX_CLASSES:
            return high - low + 1
    return None


def _combined(table: pa.Table, name: str) -> pa.Array:
    if name not in table.column_names:
        raise InternalError("A declared column is missing from the stored rows.")
    column = table.column(name)
    combined = column.combine_chunks()
    if isinstance(combined, pa.ChunkedArray):
        combined = pa.concat_arrays(combined.chunks) if combined.num_chunks else pa.array([], type=column.type)
    return combined.dictionary_decode() if pa.types.is_dictionary(combined.type) else combined


def _bounds(column: Column) -> tuple[float, float]:
    match column:
        case IntegerColumn(low=low, high=high) | RealColumn(low=low, high=high):
            return float(low), float(high)
        case DateColumn(low=low, high=high):
            first, last = float(_day(low)), float(_day(high))
            if first >= last:
                raise InvalidRequestError(f"The declared days of {column.name!r} aren't in order.")
            return first, last
    raise InternalError("This column has no bounds.")


def _day(text: str) -> int:
    """Days since 1970-01-01 of an ISO 8601 day."""
    try:
        return (datetime.date.fromisoformat(text) - datetime.date(1970, 1, 1)).days
    except ValueError as error:
        raise InvalidRequestError(f"The schema holds {text!r}, which is no calendar day.") from error


def _numbers(values: pa.Array) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """(float64 [N], present [N]); NaN and infinities count as nulls, dates are days since 1970-01-01."""
    kind = values.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        values = pc.cast(values, pa.date32())
    elif pa.types.is_timestamp(kind):
        values = pc.cast(values, pa.date32(), safe=False)
    if pa.types.is_date(values.type):
        values = pc.cast(pc.cast(values, pa.date32()), pa.int32())
    numbers = pc.fill_null(pc.cast(values, pa.float64(), safe=False), float("nan")).to_numpy(zero_copy_only=False)
    present = np.isfinite(numbers)
    return np.where(present, numbers, 0.0), present


def _scaled(values: pa.Array, column: Column) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    numbers, present = _numbers(values)
    low, high = _bounds(column)
    return np.clip(2.0 * (np.clip(numbers, low, high) - low) / (high - low) - 1.0, -1.0, 1.0), present


def _booleans(values: pa.Array) -> npt.NDArray[np.float32]:
    """-1, 1, or 0 for null."""
    numbers = pc.fill_null(pc.cast(pc.cast(values, pa.bool_()), pa.int8()), -1).to_numpy(zero_copy_only=False)
    return np.select([numbers == 1, numbers == 0], [1.0, -1.0], 0.0).astype(np.float32)


def _codes(values: pa.Array, categories: Sequence[str]) -> npt.NDArray[np.int64]:
    """The category's number, -1 for null and for what isn't declared."""
    found = pc.index_in(pc.cast(values, pa.string()), value_set=pa.array(list(categories), pa.string()))
    codes: npt.NDArray[np.int64] = pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    return codes
