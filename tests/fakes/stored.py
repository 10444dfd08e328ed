"""A small hospital's dataset at rest, for tests of the store, the worker and the statistics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cloister_data.datasets import SplitRef
from cloister_data.schema import (
    BooleanColumn,
    CategoryColumn,
    DateColumn,
    IntegerColumn,
    RealColumn,
    Schema,
    TextColumn,
)
from cloister_guard.datasets.ingest import read_upload
from cloister_guard.datasets.keys import FileKeyProvider, KeyRing
from cloister_guard.datasets.store import DatasetStore, SourceFile

SCHEMA = Schema(
    privacy_unit="patient",
    columns=(
        IntegerColumn(name="patient", low=0, high=10**9),
        RealColumn(name="radius", low=0.0, high=40.0),
        IntegerColumn(name="age", low=0, high=120, nullable=True),
        CategoryColumn(name="ward", categories=("a", "b", "c")),
        BooleanColumn(name="benign"),
        DateColumn(name="seen", low="2020-01-01", high="2024-12-31"),
        TextColumn(name="note", max_bytes=40, nullable=True),
    ),
)


@dataclass(frozen=True)
class Version:
    """What `DatasetStore` reads of a database row."""

    dataset: str
    schema_json: str
    file: str
    wrapped_key: bytes


def csv_rows(rows: int, seed: int = 0) -> bytes:
    """Patients whose ward is never "c" and whose benign tumours are the smaller ones."""
    random = np.random.default_rng(seed)
    lines = ["patient,radius,age,ward,benign,seen,note"]
    for patient in range(rows):
        benign = bool(random.random() < 0.6)
        radius = float(np.clip(random.normal(12 if benign else 22, 2), 0, 40))
        age = "" if patient % 7 == 0 else str(int(random.integers(20, 90)))
        lines.append(
            f"{patient},{radius:.4f},{age},{'ab'[patient % 2]},{str(benign).lower()},2022-03-{patient % 28 + 1:02},"
        )
    return "\n".join(lines).encode() + b"\n"


def file_keys(path: Path) -> KeyRing:
    """The keys of a cloister none of whose owners has a witness."""
    return KeyRing(FileKeyProvider(path, platform="simulated"), lambda owner: None)


class Shelf:
    """A store in a directory, with one dataset of `rows` patients."""

    def __init__(self, directory: Path, rows: int = 400, *, name: str = "hospital/patients", seed: int = 0) -> None:
        self.directory = directory
        self.store = DatasetStore(directory / "data", file_keys(directory / "key"))
        self.table = read_upload(csv_rows(rows, seed), "csv", SCHEMA, split_key=self.store.split_key("hospital/people"))
        stored = self.store.write(self.table, dataset=name)
        self.name = name
        self.version = Version(name, SCHEMA.model_dump_json(), stored.file, stored.wrapped_key)

    def ref(self, part: str = "all", test: float = 0.2) -> SplitRef:
        return SplitRef.model_validate({"dataset": self.name, "part": part, "test": test})

    def units(self, part: str = "all") -> int:
        return self.store.public_units(self.version, self.ref(part))

    def source(self, part: str = "all") -> SourceFile:
        return self.store.source_file(self.version, self.ref(part))
