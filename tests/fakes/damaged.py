"""`python -m tests.fakes.damaged FIRST END`: reads damaged uploads, a line for each; it may die of any of them."""

from __future__ import annotations

import datetime
import random
import sys

import pyarrow as pa
import pyarrow.parquet

from cloister_data.errors import CloisterError
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
from cloister_guard.datasets.ingest import Format, read_rows

PLAIN = (
    RealColumn(name="x", low=0, high=10, nullable=True),
    IntegerColumn(name="n", low=0, high=10),
    CategoryColumn(name="c", categories=("a", "b")),
    TextColumn(name="t", max_bytes=20),
    BooleanColumn(name="b"),
    DateColumn(name="d", low="2000-01-01", high="2030-01-01"),
)
TENSOR = TensorColumn(name="v", shape=(2,), dtype="float32", low=0, high=9)
CSV = b'x,n,c,t,b,d\n1.5,2,a,q,true,2020-01-02\n,3,b,"w""w",false,2021-02-03\n'


def parquet(table: pa.Table, **options: object) -> bytes:
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(table, sink, **options)
    return bytes(sink.getvalue())


def originals() -> list[tuple[bytes, Format, Schema]]:
    noon = datetime.datetime(2020, 1, 2, 12)
    table = pa.table(
        {
            "x": [1.0, None, 2.0],
            "n": [1, 2, 3],
            "c": ["a", "b", "a"],
            "t": ["q", "ww", "é"],
            "b": [True, False, True],
            "d": pa.array([noon] * 3, pa.timestamp("us", tz="Europe/Berlin")),
        }
    )
    tensors = table.append_column("v", pa.array([[1, 2]] * 3, pa.list_(pa.float32())))
    return [
        (parquet(table.select(["x", "n"])), "parquet", Schema(columns=PLAIN[:2])),
        (parquet(table, use_dictionary=False), "parquet", Schema(columns=PLAIN)),
        (parquet(tensors, compression="none"), "parquet", Schema(columns=(*PLAIN, TENSOR))),
        (CSV, "csv", Schema(columns=PLAIN)),
    ]


def main(first: int, end: int) -> None:
    files = originals()
    for case in range(first, end):
        draw = random.Random(case)
        whole, data_format, schema = files[case % len(files)]
        blob = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            blob[draw.randrange(len(blob))] = draw.randrange(256)
        try:
            read_rows(bytes(blob), data_format, schema)
            outcome = "read"
        except CloisterError:
            outcome = "refused"
        except Exception as error:
            outcome = f"{type(error).__name__} in case {case}"
        print(outcome, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
