"""A table of declared columns as plain memory: what a worker that read an upload hands to the guard.

Nothing in it says how it is to be read: where each piece lies follows from the schema and the number of rows, so the
guard parses nothing that a hostile file may have written. For each column in its order: one validity bit a row, then
its values (int64, float64, int32 days, one bit for a boolean, a tensor's numbers), or for texts rows + 1 int32 offsets
and the UTF-8 bytes. Each piece begins at a multiple of 64 bytes; numbers are as the machine has them, bits least
significant first (Arrow's columnar format).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cloister_data.errors import InvalidRequestError
from cloister_data.schema import Schema
from cloister_guard.datasets.ingest import stored_schema

_ALIGNED = 64

Piece = npt.NDArray[np.generic]


def put_table(table: pa.Table, room: Callable[[int], memoryview]) -> None:
    """Write a table of `stored_schema` into `room(size)`: the memory for so many bytes."""
    pieces = [piece for column in table.columns for piece in _pieces(_one_array(column))]
    memory = room(sum(_rounded(piece.nbytes) for piece in pieces))
    at = 0
    for piece in pieces:
        np.frombuffer(memory, np.uint8, piece.nbytes, at)[:] = np.ascontiguousarray(piece).view(np.uint8)
        at += _rounded(piece.nbytes)


def take_table(memory: memoryview, schema: Schema, rows: int) -> pa.Table:
    """The table again, over `memory` without a copy; well-formed whatever the memory holds.

    Raises InvalidRequestError. That the values are as declared is for `ingest.check_values` to see.
    """
    reader = _Reader(memory)
    try:
        arrays = [_array(reader, field.type, rows) for field in stored_schema(schema)]
        table = pa.table(arrays, schema=stored_schema(schema))
        table.validate(full=True)
    except pa.ArrowException as error:
        raise _broken() from error
    return table


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _pieces(array: pa.Array) -> Iterator[Piece]:
    yield _bits(array.is_valid())
    if pa.types.is_boolean(array.type):
        yield _bits(array.fill_null(False))
    elif pa.types.is_string(array.type):
        _, offsets, text = array.buffers()
        starts = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1]
        yield starts - starts[0]
        yield np.frombuffer(text or b"", np.uint8)[starts[0] : starts[-1]]
    elif pa.types.is_fixed_size_list(array.type):
        size = array.type.list_size
        yield _numbers(array.values.slice(array.offset * size, len(array) * size))
    else:
        yield _numbers(array)


def _numbers(array: pa.Array) -> Piece:
    kind = np.int32 if pa.types.is_date32(array.type) else array.type.to_pandas_dtype()
    return np.frombuffer(array.buffers()[1], kind)[array.offset : array.offset + len(array)]


def _bits(flags: pa.BooleanArray) -> Piece:
    return np.packbits(flags.to_numpy(zero_copy_only=False).astype(np.bool_), bitorder="little")


def _array(reader: _Reader, kind: pa.DataType, rows: int) -> pa.Array:
    validity = reader.take((rows + 7) // 8)
    if pa.types.is_string(kind):
        offsets = reader.take((rows + 1) * 4)
        text = reader.take(int(np.frombuffer(offsets, np.int32)[-1]))
        return pa.Array.from_buffers(kind, rows, [validity, offsets, text])
    if pa.types.is_fixed_size_list(kind):
        inner, count = kind.value_type, rows * kind.list_size
        numbers = pa.Array.from_buffers(inner, count, [None, reader.take(count * inner.bit_width // 8)])
        return pa.Array.from_buffers(kind, rows, [validity], children=[numbers])
    return pa.Array.from_buffers(kind, rows, [validity, reader.take((rows * kind.bit_width + 7) // 8)])


class _Reader:
    """Pieces one after the other, none past the memory's end."""

    def __init__(self, memory: memoryview) -> None:
        self._memory, self._at = memory, 0

    def take(self, size: int) -> pa.Buffer:
        start, self._at = self._at, self._at + _rounded(size)
        if size < 0 or start + size > len(self._memory):
            raise _broken()
        return pa.py_buffer(self._memory[start : start + size])


def _rounded(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _broken() -> InvalidRequestError:
    return InvalidRequestError("The upload's reader answered with something else than the declared columns.")
