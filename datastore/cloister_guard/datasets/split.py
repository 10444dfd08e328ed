"""Which rows a request is about: one part of the schema's partition, and one side of the fixed split.

The split into train and test parts is a keyed hash of the privacy unit, made at upload. A unit's value is uniform in
[0, 1) and depends on nothing but the unit's identity and a secret key, and the partition is declared public. So the
number of units that are selected is public under zero-out adjacency: a null unit keeps both.
"""

from __future__ import annotations

import datetime
import hmac
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cloister_data.datasets import SplitRef
from cloister_data.errors import InvalidRequestError

SPLIT_COLUMN = "__split__"
PART_COLUMN = "__part__"
"""Of a schema with a partition: uint8[N], each row's place among `Schema.parts`."""

_LABEL = b"cloister/split/v1\n"


def population_key(secret: bytes, population: str) -> bytes:
    """The split key (32 bytes) of one population: the same person falls into the same part of every dataset."""
    return hmac.digest(secret, _LABEL + population.encode(), "sha256")


def unit_text(unit: int | str | datetime.date) -> str:
    """One text for one unit, whatever column type names it."""
    return unit.isoformat() if isinstance(unit, datetime.date) else str(unit)


def split_values(key: bytes, units: Iterable[int | str | datetime.date]) -> npt.NDArray[np.float64]:
    """float64[N] in [0, 1): the first 53 bits of HMAC-SHA256(key, unit), over 2^53."""
    heads = b"".join(hmac.digest(key, unit_text(unit).encode(), "sha256")[:8] for unit in units)
    return (np.frombuffer(heads, dtype=">u8") >> np.uint64(11)).astype(np.float64) * 2.0**-53


def in_part(values: npt.NDArray[np.float64], ref: SplitRef) -> npt.NDArray[np.bool_]:
    """bool[N]: which units the reference is about. A unit is in the test part iff its value is below `ref.test`."""
    if ref.part == "all":
        return np.ones(len(values), dtype=np.bool_)
    below = values < ref.test
    return below if ref.part == "test" else ~below


def division_place(ref: SplitRef, parts: tuple[str, ...]) -> int | None:
    """The place of the reference's part among the `parts` of its schema; None for all. Raises InvalidRequestError."""
    if ref.division is None:
        return None
    if ref.division not in parts:
        raise InvalidRequestError(f"{ref.dataset} has no part {ref.division!r}.")
    return parts.index(ref.division)


def select_part(table: pa.Table, ref: SplitRef, parts: tuple[str, ...] = ()) -> pa.Table:
    """The rows that the reference is about, in their order, without the columns that the upload added.

    `parts` are those of the schema.
    """
    chosen = in_part(table.column(SPLIT_COLUMN).to_numpy(), ref)
    place = division_place(ref, parts)
    if place is not None:
        chosen &= table.column(PART_COLUMN).to_numpy() == place
    kept = table.drop_columns([SPLIT_COLUMN, *([PART_COLUMN] if parts else [])])
    return kept if chosen.all() else kept.filter(pa.array(chosen))
