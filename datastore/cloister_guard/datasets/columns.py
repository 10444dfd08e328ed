"""One column at a time: from raw values to the type it is stored in, with the rows that don't fit its declaration."""

from __future__ import annotations

import datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cloister_data.errors import InvalidRequestError
from cloister_data.schema import (
    BooleanColumn,
    CategoryColumn,
    Column,
    DateColumn,
    IntegerColumn,
    RealColumn,
    TensorColumn,
    TextColumn,
)
from cloister_guard.datasets.faults import Fault

Mask = npt.NDArray[np.bool_]

_INTEGER = r"^[+-]?[0-9]{1,18}$"
_REAL = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?$"
_DATE = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$"
_TRUE, _FALSE = ("true", "1"), ("false", "0")


def storage_type(column: Column) -> pa.DataType:
    """The Arrow type of a stored column. Categories are stored as their text, tensors as flat fixed-size lists."""
    match column:
        case IntegerColumn():
            return pa.int64()
        case RealColumn():
            return pa.float64()
        case BooleanColumn():
            return pa.bool_()
        case DateColumn():
            return pa.date32()
        case CategoryColumn() | TextColumn():
            return pa.string()
        case TensorColumn():
            return pa.list_(pa.from_numpy_dtype(np.dtype(column.dtype)), int(np.prod(column.shape)))


def convert(raw: pa.ChunkedArray, column: Column) -> tuple[pa.Array, list[Fault]]:
    """(array of `storage_type`, faults). The array is only usable where there are no faults."""
    values = raw.combine_chunks()
    if isinstance(values, pa.ChunkedArray):
        values = pa.concat_arrays(values.chunks) if values.num_chunks else pa.nulls(0, raw.type)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_large_string(values.type) or pa.types.is_string_view(values.type):
        values = values.cast(pa.string())
    if pa.types.is_string(values.type) and not isinstance(column, TextColumn | CategoryColumn):
        trimmed = pc.utf8_trim_whitespace(values)
        values = pc.if_else(pc.equal(trimmed, ""), pa.scalar(None, pa.string()), trimmed)
    if pa.types.is_null(values.type):
        values = pa.nulls(len(values), storage_type(column))
    converted, faults = _typed(values, column)
    nulls = _mask(values.is_null())
    if nulls.any() and not column.nullable:
        faults.append(_fault(column, "isn't declared nullable, and is missing", nulls))
    return converted, faults


def _typed(values: pa.Array, column: Column) -> tuple[pa.Array, list[Fault]]:
    match column:
        case IntegerColumn():
            return _integer(values, column)
        case RealColumn():
            return _real(values, column)
        case BooleanColumn():
            return _boolean(values, column)
        case DateColumn():
            return _date(values, column)
        case CategoryColumn():
            return _category(values, column)
        case TextColumn():
            return _text(values, column)
        case TensorColumn():
            return _tensor(values, column)


def _integer(values: pa.Array, column: IntegerColumn) -> tuple[pa.Array, list[Fault]]:
    if pa.types.is_string(values.type):
        bad = ~_matches(values, _INTEGER)
        parsed = pc.replace_substring_regex(_blank(values, bad), r"^\+", "").cast(pa.int64())
    elif pa.types.is_floating(values.type):
        plain = values.cast(pa.float64())
        bad = _mask(pc.invert(pc.is_finite(plain))) | _mask(pc.not_equal(pc.round(plain), plain))
        bad |= _mask(pc.greater(pc.abs(plain), float(2**53)))
        parsed = _blank(plain, bad).cast(pa.int64())
    elif pa.types.is_integer(values.type):
        too_large = pa.scalar(2**62, pa.uint64())
        parsed = values if values.type != pa.uint64() else _blank(values, _mask(pc.greater(values, too_large)))
        bad = _mask(values.is_valid()) & _mask(parsed.is_null())
        parsed = parsed.cast(pa.int64())
    else:
        raise _wrong_type(values, column)
    return parsed, [*_faults(column, "isn't a whole number", bad), *_outside(parsed, column)]


def _real(values: pa.Array, column: RealColumn) -> tuple[pa.Array, list[Fault]]:
    if pa.types.is_string(values.type):
        bad = ~_matches(values, _REAL)
        parsed = _parse_reals(pc.replace_substring_regex(_blank(values, bad), r"^\+", ""))
    elif pa.types.is_floating(values.type) or pa.types.is_integer(values.type) or pa.types.is_decimal(values.type):
        parsed = values.cast(pa.float64(), safe=False)
        bad = np.zeros(len(values), dtype=np.bool_)
    else:
        raise _wrong_type(values, column)
    bad |= _mask(pc.invert(pc.is_finite(parsed)))
    return parsed, [*_faults(column, "isn't a finite number", bad), *_outside(_blank(parsed, bad), column)]


def _boolean(values: pa.Array, column: BooleanColumn) -> tuple[pa.Array, list[Fault]]:
    if pa.types.is_boolean(values.type):
        return values, []
    if pa.types.is_integer(values.type):
        values = values.cast(pa.string())
    if not pa.types.is_string(values.type):
        raise _wrong_type(values, column)
    lower = pc.utf8_lower(values)
    true = pc.is_in(lower, value_set=pa.array(_TRUE))
    bad = _mask(values.is_valid()) & ~_mask(true) & ~_mask(pc.is_in(lower, value_set=pa.array(_FALSE)))
    parsed = pc.if_else(values.is_valid(), true, pa.scalar(None, pa.bool_()))
    return parsed, _faults(column, "is none of true, false, 1 and 0", bad)


def _date(values: pa.Array, column: DateColumn) -> tuple[pa.Array, list[Fault]]:
    low, high = _day(column, column.low), _day(column, column.high)
    if pa.types.is_string(values.type):
        bad = ~_matches(values, _DATE)
        days = [_parse_day(text) for text in _blank(values, bad).to_pylist()]
        parsed = pa.array(days, pa.date32())
        bad |= _mask(values.is_valid()) & _mask(parsed.is_null())
    elif pa.types.is_date(values.type) or pa.types.is_timestamp(values.type):
        parsed = values.cast(pa.date32(), safe=False)
        bad = np.zeros(len(values), dtype=np.bool_)
    else:
        raise _wrong_type(values, column)
    outside = _mask(pc.or_(pc.less(parsed, pa.scalar(low)), pc.greater(parsed, pa.scalar(high))))
    return parsed, [
        *_faults(column, "isn't a day like 2024-01-31", bad),
        *_faults(column, f"is outside {column.low} to {column.high}", outside),
    ]


def _category(values: pa.Array, column: CategoryColumn) -> tuple[pa.Array, list[Fault]]:
    if pa.types.is_integer(values.type) or pa.types.is_boolean(values.type):
        values = values.cast(pa.string())
    if not pa.types.is_string(values.type):
        raise _wrong_type(values, column)
    known = _mask(pc.is_in(values, value_set=pa.array(column.categories, pa.string()), skip_nulls=True))
    return values, _faults(column, "is none of the declared categories", _mask(values.is_valid()) & ~known)


def _text(values: pa.Array, column: TextColumn) -> tuple[pa.Array, list[Fault]]:
    if not pa.types.is_string(values.type):
        raise _wrong_type(values, column)
    long = _mask(pc.greater(pc.binary_length(values), column.max_bytes))
    return values, _faults(column, f"is longer than {column.max_bytes} bytes", long)


def _tensor(values: pa.Array, column: TensorColumn) -> tuple[pa.Array, list[Fault]]:
    kind = storage_type(column)
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        lengths = pc.list_value_length(values)
        bad = _mask(pc.not_equal(lengths, kind.list_size))
        if bad.any():
            return pa.nulls(len(values), kind), _faults(column, f"doesn't hold {kind.list_size} numbers", bad)
    elif not pa.types.is_fixed_size_list(values.type) or values.type.list_size != kind.list_size:
        raise _wrong_type(values, column)
    inner = values.type.value_type
    if not (pa.types.is_integer(inner) or pa.types.is_floating(inner)):
        raise _wrong_type(values, column)
    present = values.drop_null()
    flat = np.asarray(present.flatten().to_numpy(zero_copy_only=False)).reshape(len(present), kind.list_size)
    # NaN fails every comparison, and a value that the cast changed isn't the declared type.
    with np.errstate(invalid="ignore", over="ignore"):
        cast = flat.astype(column.dtype)
        fits = ((flat >= column.low) & (flat <= column.high)).all(axis=1)
        if column.dtype != "float32":
            fits &= (cast == flat).all(axis=1)
    bad = np.zeros(len(values), dtype=np.bool_)
    rows = np.flatnonzero(~_mask(values.is_null()))
    bad[rows[~fits]] = True
    stored = pa.FixedSizeListArray.from_arrays(pa.array(cast.reshape(-1)), kind.list_size)
    where = np.full(len(values), -1, dtype=np.int64)
    where[rows] = np.arange(len(rows))
    taken = stored.take(pa.array(where, mask=where < 0))
    return taken, _faults(column, f"holds numbers that aren't {column.dtype} in {column.low:g} to {column.high:g}", bad)


def _outside(values: pa.Array, column: IntegerColumn | RealColumn) -> list[Fault]:
    outside = _mask(pc.or_(pc.less(values, column.low), pc.greater(values, column.high)))
    return _faults(column, f"is outside {column.low:g} to {column.high:g}", outside)


def _parse_reals(texts: pa.Array) -> pa.Array:
    try:
        return texts.cast(pa.float64())
    except pa.ArrowInvalid:
        # Beyond the range of float64 somewhere: Python gives an infinity or a zero, and the caller judges that.
        return pa.array([None if text is None else float(text) for text in texts.to_pylist()], pa.float64())


def _parse_day(text: str | None) -> datetime.date | None:
    try:
        return None if text is None else datetime.date.fromisoformat(text)
    except ValueError:
        return None


def _day(column: DateColumn, text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError as error:
        raise InvalidRequestError(f"A bound of {column.name!r} isn't a day: {text}.") from error


def _matches(values: pa.Array, pattern: str) -> Mask:
    """True where the text matches, and where it is null."""
    return _mask(pc.fill_null(pc.match_substring_regex(values, pattern), True))


def _blank(values: pa.Array, bad: Mask) -> pa.Array:
    """`values` with nulls where `bad`."""
    return pc.if_else(pa.array(bad), pa.scalar(None, values.type), values)


def _mask(flags: pa.BooleanArray) -> Mask:
    """A null comparison says False."""
    return np.asarray(pc.fill_null(flags, False).to_numpy(zero_copy_only=False), dtype=np.bool_)


def _fault(column: Column, message: str, bad: Mask) -> Fault:
    return Fault(column.name, message, np.flatnonzero(bad))


def _faults(column: Column, message: str, bad: Mask) -> list[Fault]:
    return [_fault(column, message, bad)] if bad.any() else []


def _wrong_type(values: pa.Array, column: Column) -> InvalidRequestError:
    return InvalidRequestError(
        f"{column.name!r} is declared {column.type}, and the file's type is {values.type}.",
        next_step="Nothing was stored. Convert the column, or declare what it is.",
    )
