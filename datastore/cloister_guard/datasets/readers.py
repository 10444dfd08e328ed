"""CSV and Parquet bytes to a table of raw columns, bounded before and while they are decoded."""

from __future__ import annotations

import codecs
import csv
import io

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from cloister_data.errors import InvalidRequestError, TooLargeError
from cloister_data.schema import MAX_COLUMNS, Schema, TensorColumn, TextColumn
from cloister_guard.datasets.faults import row_list

MAX_ROWS = 20_000_000
MAX_DECODED_BYTES = 4 << 30
_BATCH_BYTES = 64 << 20
_LARGEST_BATCH = (1 << 31) - 1
_TEXT_CHUNK = 1 << 20
_LONGEST_HEADER = 8 << 20


def read_csv(blob: bytes | memoryview, schema: Schema) -> pa.Table:
    """Every declared column as strings; an empty field is a null (in a text column, a quoted one is an empty text)."""
    tensors = [column.name for column in schema.columns if isinstance(column, TensorColumn)]
    if tensors:
        raise InvalidRequestError(
            f"A CSV file can't hold the tensor column {tensors[0]!r}.", next_step="Upload the table as Parquet."
        )
    _check_utf8(blob)
    _check_width(_header(blob))
    ragged: list[int] = []

    def note(row: pyarrow.csv.InvalidRow) -> str:
        # The reader counts the header as row 1.
        ragged.append((row.number or 2) - 2)
        return "skip"

    try:
        table = pyarrow.csv.read_csv(
            pa.BufferReader(blob),
            # One thread: only then does the reader know row numbers.
            read_options=pyarrow.csv.ReadOptions(use_threads=False),
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=note),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types={column.name: pa.string() for column in schema.columns},
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid as error:
        raise _unreadable("CSV", str(error)) from error
    if ragged:
        raise InvalidRequestError(
            f"The CSV file has another number of fields than its header in {row_list(ragged)}.",
            next_step="Nothing was stored. Quote fields that hold a comma, and upload again.",
        )
    _check_names(table.column_names, schema)
    _check_rows(table.num_rows)
    return table


def read_parquet(blob: bytes | memoryview, schema: Schema) -> pa.Table:
    """The declared columns as the file types them. Decoded in batches: a file may unpack to more than it claims."""
    try:
        file = pyarrow.parquet.ParquetFile(pa.BufferReader(blob))
        metadata = file.metadata
        _check_names(file.schema_arrow.names, schema)
        _check_types(file.schema_arrow, schema)
        _check_rows(metadata.num_rows)
        _check_values(metadata, schema)
        # Texts are read as dictionaries: one that a file holds once and repeats takes room once, until it is counted.
        texts = [field.name for field in file.schema_arrow if not _is_flat(field.type)]
        file = pyarrow.parquet.ParquetFile(pa.BufferReader(blob), read_dictionary=texts)
        claimed = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
        if claimed > MAX_DECODED_BYTES:
            raise _too_wide(claimed)
        batches, decoded, rows = [], 0, 0
        for batch in file.iter_batches(batch_size=_batch_rows(schema), use_threads=False):
            rows += batch.num_rows
            _check_rows(rows)
            plain = _plain(batch, MAX_DECODED_BYTES - decoded)
            decoded += plain.nbytes
            if decoded > MAX_DECODED_BYTES:
                raise _too_wide(decoded)
            batches.append(plain)
        return pa.Table.from_batches(batches, schema=_plain_schema(file.schema_arrow))
    except MemoryError:
        # Arrow's own is an ArrowException too, and says nothing about the file.
        raise
    except (pa.ArrowException, OSError) as error:
        raise _unreadable("Parquet", str(error)) from error
    except UnicodeDecodeError as error:
        raise _unreadable("Parquet", "A name in it isn't UTF-8") from error


def _batch_rows(schema: Schema) -> int:
    """So many rows at a time that a batch inside its declaration stays near _BATCH_BYTES."""
    width = 0
    for column in schema.columns:
        if isinstance(column, TextColumn):
            width += column.max_bytes
        elif isinstance(column, TensorColumn):
            width += int(np.prod(column.shape)) * 4
        else:
            width += 64
    return max(16, min(65_536, _BATCH_BYTES // width))


def _header(blob: bytes | memoryview) -> list[str]:
    """The CSV file's column names, read before the table: Arrow makes room for each, and a file may name millions."""
    text = bytes(memoryview(blob)[:_LONGEST_HEADER]).decode("utf-8-sig", errors="ignore")
    try:
        return next((row for row in csv.reader(io.StringIO(text, newline="")) if row), [])
    except csv.Error as error:
        raise _unreadable("CSV", f"Its header line isn't one: {error}.") from error


def _check_types(found: pa.Schema, schema: Schema) -> None:
    """Types that no column is read from may unpack to any size: they are refused before a value is."""
    for column in schema.columns:
        kind = found.field(column.name).type
        tensor = isinstance(column, TensorColumn)
        inner = kind.value_type if tensor and pa.types.is_nested(kind) and hasattr(kind, "value_type") else kind
        fixed = pa.types.is_fixed_size_binary(inner) and not pa.types.is_decimal(inner)
        if pa.types.is_nested(inner) or fixed or (tensor and not pa.types.is_primitive(inner)):
            raise InvalidRequestError(
                f"{column.name!r} is declared {column.type}, and the file's type is {kind}."[:2000],
                next_step="Nothing was stored. Convert the column, or declare what it is.",
            )


def _is_flat(kind: pa.DataType) -> bool:
    """Numbers, dates and lists of them: what a value takes is known from its type."""
    return bool(pa.types.is_primitive(kind) or pa.types.is_decimal(kind) or pa.types.is_nested(kind))


def _check_values(metadata: pyarrow.parquet.FileMetaData, schema: Schema) -> None:
    """A list may repeat one stored number very often; no row has more values than its declaration."""
    width = sum(int(np.prod(column.shape)) if isinstance(column, TensorColumn) else 1 for column in schema.columns)
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        if sum(group.column(at).num_values for at in range(group.num_columns)) > group.num_rows * width:
            raise InvalidRequestError(
                "The file holds more numbers than its tensor columns declare.",
                next_step="Nothing was stored. Correct the file or the declared shapes, and upload again.",
            )


def _plain(batch: pa.RecordBatch, room: int) -> pa.RecordBatch:
    """The batch without dictionaries. Raises TooLargeError, before it unpacks them, where they need over `room`."""
    arrays = []
    for array in batch.columns:
        if pa.types.is_dictionary(array.type):
            kind = array.type.value_type
            if not _is_flat(kind):
                size = pc.sum(pc.binary_length(array.dictionary).take(array.indices)).as_py() or 0
                if size > min(room, _LARGEST_BATCH):
                    raise _too_wide(size)
                room -= size
            array = array.dictionary_decode()
        arrays.append(array)
    return pa.RecordBatch.from_arrays(arrays, schema=_plain_schema(batch.schema))


def _plain_schema(schema: pa.Schema) -> pa.Schema:
    return pa.schema(
        [(field.name, field.type.value_type if pa.types.is_dictionary(field.type) else field.type) for field in schema]
    )


def _check_utf8(blob: bytes | memoryview) -> None:
    # The reader's own check comes too late for rows that it hands to `note`.
    decoder, view, lines = codecs.getincrementaldecoder("utf-8")(), memoryview(blob), 1
    for start in range(0, len(view), _TEXT_CHUNK):
        piece = bytes(view[start : start + _TEXT_CHUNK])
        try:
            decoder.decode(piece, final=start + _TEXT_CHUNK >= len(view))
        except UnicodeDecodeError as error:
            raise _unreadable("CSV", f"It isn't UTF-8 near line {lines + piece[: error.start].count(10)}.") from error
        lines += piece.count(10)


def _check_width(names: list[str]) -> None:
    if len(names) > 2 * MAX_COLUMNS:
        raise InvalidRequestError(
            f"The file has {len(names)} columns or more.",
            why=f"At most {MAX_COLUMNS} can be declared.",
            next_step="Nothing was stored. Leave out the columns that nobody needs.",
        )


def _check_names(names: list[str], schema: Schema) -> None:
    _check_width(names)
    declared = [column.name for column in schema.columns]
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) != len(names) else []
    problems = [
        (f"names {', '.join(map(repr, repeated[:5]))} twice", bool(repeated)),
        (
            f"lacks {', '.join(repr(name) for name in declared if name not in set(names))}",
            not set(declared) <= set(names),
        ),
        (
            f"has undeclared columns: {', '.join(repr(name) for name in names if name not in set(declared))}",
            not set(names) <= set(declared),
        ),
    ]
    found = [text for text, holds in problems if holds]
    if found:
        raise InvalidRequestError(
            f"The file {' and '.join(found)}."[:2000],
            why="The schema and the file must have the same columns.",
            next_step="Nothing was stored. Declare every column, or leave out those that nobody needs.",
        )


def _check_rows(rows: int) -> None:
    if rows > MAX_ROWS:
        raise TooLargeError(f"The upload has {rows} rows or more.", why=f"The limit is {MAX_ROWS}.")


def _too_wide(size: int) -> TooLargeError:
    return TooLargeError(
        f"The upload unpacks to {size} bytes or more.",
        why=f"The limit is {MAX_DECODED_BYTES} bytes in memory, half of it in one piece.",
    )


def _unreadable(kind: str, detail: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"The upload can't be read as {kind}.",
        why=detail.splitlines()[0][:500] if detail else "",
        next_step="Nothing was stored. CSV must be UTF-8 with a header line; Parquet must be one whole file.",
    )
