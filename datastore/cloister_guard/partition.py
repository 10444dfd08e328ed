"""A population's partition: the same parts in every dataset about its people, and nobody ever changes theirs.

A unit in two parts would be charged to each of them alone, and lose the sum of both where its limit promises one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy import select
from sqlalchemy.orm import Session

from cloister_budget.tables import Dataset, DatasetVersion, Population
from cloister_data.errors import ConflictError, StorageError
from cloister_data.schema import Schema
from cloister_guard.datasets.split import PART_COLUMN
from cloister_guard.datasets.store import DatasetStore


def check_same_parts(session: Session, population: str, schema: Schema) -> None:
    """Raises ConflictError where the population is there already and `schema` doesn't divide it as it is divided."""
    row = session.get(Population, population)
    if row is None or set(row.parts) == set(schema.parts):
        return
    has = f"into {', '.join(row.parts)}" if row.parts else "into no parts"
    declares = f"{', '.join(schema.parts)}, by {schema.partition!r}" if schema.parts else "no partition"
    raise ConflictError(
        f"The people of {population} are divided {has}, and the schema declares {declares}.",
        why="Every part has accounts of its own, so what divides the people is fixed by the first dataset.",
        next_step="Declare a partition with the same parts. Nothing was stored."
        if row.parts
        else "Leave the partition out, or publish other people's data as another population. Nothing was stored.",
    )


def versions_about(session: Session, population: str) -> tuple[DatasetVersion, ...]:
    """Every version of every dataset about these people, in a fixed order. Raises StorageError where one is missing."""
    found: list[DatasetVersion] = []
    for row in session.scalars(select(Dataset).where(Dataset.population == population).order_by(Dataset.name)):
        wanted = select(DatasetVersion).where(DatasetVersion.dataset == row.name).order_by(DatasetVersion.version)
        versions = session.scalars(wanted).all()
        if [each.version for each in versions] != list(range(1, row.version + 1)):
            raise StorageError("The database doesn't know all versions of a dataset.", next_step="Ask the admin.")
        found += versions
    return tuple(found)


def check_nobody_moved(store: DatasetStore, earlier: Sequence[DatasetVersion], table: pa.Table, schema: Schema) -> None:
    """Raises ConflictError where a unit of `table` is in another part in one of the `earlier` versions.

    `table` is a validated upload with its part column, and `schema` its declaration, which has a partition.
    """
    for version in earlier:
        declared = Schema.from_json(version.schema_json)
        known = store.read_columns(version, (str(declared.privacy_unit), PART_COLUMN))
        if anybody_moved(table, schema, known, declared):
            # No row number and no count: an error must not tell whoever holds a password about rows of earlier files.
            raise ConflictError(
                f"Somebody is in another part here than in {version.dataset}, version {version.version}.",
                why=f"{schema.partition!r} divides the people for good: each part has accounts of its own, and whoever "
                "was in two of them could lose twice what the limit says.",
                next_step="Nothing was stored. Leave everybody in the part of their first upload.",
            )


def part_units(table: pa.Table, parts: tuple[str, ...]) -> tuple[int, ...]:
    """The number of units in each part, in their order; none where there are no parts."""
    if not parts:
        return ()
    return tuple(np.bincount(table.column(PART_COLUMN).to_numpy(), minlength=len(parts)).tolist())


def anybody_moved(table: pa.Table, schema: Schema, earlier: pa.Table, declared: Schema) -> bool:
    """Whether a unit that both tables hold is in parts of different names. Both have a unit and a part column."""
    place = pc.index_in(_unit_texts(table, schema), value_set=_unit_texts(earlier, declared))
    rows = np.flatnonzero(place.is_valid().to_numpy())
    before = earlier.column(PART_COLUMN).to_numpy()[place.drop_null().to_numpy()]
    renumbered = np.array([schema.parts.index(part) for part in declared.parts], dtype=np.uint8)
    return bool(np.any(renumbered[before] != table.column(PART_COLUMN).to_numpy()[rows]))


def _unit_texts(table: pa.Table, schema: Schema) -> pa.ChunkedArray:
    """Each row's unit as `split.unit_text` writes it: by that text people are told apart in all datasets."""
    return table.column(str(schema.privacy_unit)).cast(pa.string())
