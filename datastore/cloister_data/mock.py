"""Mock rows from the public schema alone: the right names, types and bounds, and nothing of the data.

numpy is imported when rows are made, not before.
"""

from __future__ import annotations

import datetime
import hashlib
from typing import TYPE_CHECKING, Any

from cloister_data.errors import InvalidRequestError
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

if TYPE_CHECKING:
    import numpy as np

MAX_MOCK_ROWS = 1_000_000
NULL_SHARE = 0.05
_LETTERS = "abcdefghijklmnopqrstuvwxyz     "


def mock_rows(schema: Schema, rows: int, seed: int = 0) -> dict[str, list[Any]]:
    """One list of `rows` values for each column, in the schema's order; the same for the same schema, rows and seed.

    Values are int, float, str, bool, datetime.date or (for tensors) a numpy array; each is uniform over what its column
    declares, independent of every other, and None with probability NULL_SHARE where the column is nullable. The
    privacy unit's values differ as far as its declaration has room. Raises InvalidRequestError.
    """
    if not 1 <= rows <= MAX_MOCK_ROWS:
        raise InvalidRequestError(f"Mock rows: 1 to {MAX_MOCK_ROWS}, not {rows}.")
    return {
        column.name: _units(column, rows) if column.name == schema.privacy_unit else _values(column, rows, seed)
        for column in schema.columns
    }


def _generator(column: Column, seed: int) -> np.random.Generator:
    """Each column has a stream of its own, so that adding one leaves the others as they were."""
    import numpy as np

    return np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}\n{column.name}".encode()).digest()[:8], "big"))


def _values(column: Column, rows: int, seed: int) -> list[Any]:
    random = _generator(column, seed)
    drawn = _drawn(column, rows, random)
    if column.nullable:
        return [None if null else value for value, null in zip(drawn, random.random(rows) < NULL_SHARE, strict=True)]
    return drawn


def _drawn(column: Column, rows: int, random: np.random.Generator) -> list[Any]:
    match column:
        case IntegerColumn(low=low, high=high):
            return [int(value) for value in random.integers(low, high, size=rows, endpoint=True)]
        case RealColumn(low=low, high=high):
            return [min(max(value, low), high) for value in (low + (high - low) * random.random(rows)).tolist()]
        case BooleanColumn():
            return [bool(value) for value in random.random(rows) < 0.5]
        case CategoryColumn(categories=categories):
            return [categories[index] for index in random.integers(0, len(categories), size=rows).tolist()]
        case DateColumn():
            first, last = _day(column.low), _day(column.high)
            days = random.integers(0, (last - first).days, size=rows, endpoint=True).tolist()
            return [first + datetime.timedelta(days=day) for day in days]
        case TextColumn(max_bytes=size):
            lengths = random.integers(1, min(size, 40), size=rows, endpoint=True).tolist()
            return ["".join(_LETTERS[letter] for letter in random.integers(0, 31, size=length)) for length in lengths]
        case TensorColumn(shape=shape, dtype=dtype, low=low, high=high):
            return [_tensor(shape, dtype, low, high, random) for _ in range(rows)]


def _tensor(shape: tuple[int, ...], dtype: str, low: float, high: float, random: np.random.Generator) -> Any:
    import numpy as np

    if dtype == "float32":
        return np.clip(low + (high - low) * random.random(shape), low, high).astype(np.float32)
    return random.integers(int(np.ceil(low)), int(np.floor(high)), size=shape, endpoint=True).astype(dtype)


def _units(column: Column, rows: int) -> list[Any]:
    match column:
        case IntegerColumn(low=low, high=high):
            return [low + index % (high - low + 1) for index in range(rows)]
        case CategoryColumn(categories=categories):
            return [categories[index % len(categories)] for index in range(rows)]
        case DateColumn():
            first, last = _day(column.low), _day(column.high)
            room = (last - first).days + 1
            return [first + datetime.timedelta(days=index % room) for index in range(rows)]
        case TextColumn(max_bytes=size):
            return [str(index + 1).zfill(min(size, 8))[-size:] for index in range(rows)]
        case _:
            raise InvalidRequestError(f"{column.name!r} can't name the privacy unit: it is of type {column.type}.")


def _day(text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError as error:
        raise InvalidRequestError(f"The schema holds {text!r}, which is no calendar day.") from error
