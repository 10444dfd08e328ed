"""Mock rows as the table that a dataset of this schema would be stored as."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from cloister_data.mock import mock_rows
from cloister_data.schema import Schema, TensorColumn
from cloister_guard.datasets.columns import storage_type


def mock_table(schema: Schema, rows: int, seed: int = 0) -> pa.Table:
    """`cloister_data.mock.mock_rows` in the types that private rows are stored in, without the split column."""
    columns = mock_rows(schema, rows, seed)
    arrays = []
    for column in schema.columns:
        values = columns[column.name]
        if isinstance(column, TensorColumn):
            values = [None if value is None else np.asarray(value).reshape(-1) for value in values]
        arrays.append(pa.array(values, storage_type(column)))
    return pa.table(arrays, names=[column.name for column in schema.columns])
