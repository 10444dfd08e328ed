"""A schema as a table for people."""

from __future__ import annotations

from cloister_data.datasets import DatasetView
from cloister_data.schema import (
    CategoryColumn,
    Column,
    DateColumn,
    IntegerColumn,
    RealColumn,
    Schema,
    TensorColumn,
    TextColumn,
)

COLUMN_HEADERS = ("column", "type", "values", "about")


def column_rows(schema: Schema) -> list[list[str]]:
    """Name, type, declared values and description of each column."""
    return [
        [
            column.name,
            column.type + (" (may be missing)" if column.nullable else ""),
            "the privacy unit" if column.name == schema.privacy_unit else _values(column),
            column.description,
        ]
        for column in schema.columns
    ]


def part_list(view: DatasetView) -> str:
    """The parts of a dataset's people, and how many are in each."""
    shown = ", ".join(f"{part} {units}" for part, units in view.part_units.items())
    return f"by {view.data_schema.partition}: {shown}"


def _values(column: Column) -> str:
    match column:
        case IntegerColumn(low=low, high=high):
            return f"{low} to {high}"
        case RealColumn(low=low, high=high):
            return f"{low:g} to {high:g}"
        case DateColumn(low=low, high=high):
            return f"{low} to {high}"
        case CategoryColumn(categories=categories):
            shown = ", ".join(categories[:8])
            return shown + (f" and {len(categories) - 8} more" if len(categories) > 8 else "")
        case TextColumn(max_bytes=most):
            return f"at most {most} bytes"
        case TensorColumn(shape=shape, dtype=dtype, low=low, high=high):
            return f"{'x'.join(str(side) for side in shape)} {dtype}, {low:g} to {high:g}"
    return "true, false"
