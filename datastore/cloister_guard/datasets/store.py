"""The guard's files: datasets and results, each under a data key of its own that the key provider wraps."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from cloister_data.base import Text, Wire
from cloister_data.crypt import read_file, write_durably, write_file
from cloister_data.datasets import SplitRef
from cloister_data.errors import StorageError
from cloister_data.schema import Schema
from cloister_guard.datasets.keys import KEY_BYTES, KeyRing
from cloister_guard.datasets.split import PART_COLUMN, SPLIT_COLUMN, division_place, in_part, population_key

SPLIT_SUFFIX, PART_SUFFIX = ".split", ".part"
_SPLIT_KEY_FILE = "split.key"
_CACHED_SPLITS = 64


class SourceFile(Wire):
    """What a worker needs to read one source: an absolute path, its data key (32 bytes), its schema, and the part."""

    path: Text
    key: bytes = Field(min_length=32, max_length=32, repr=False)
    data_schema: Schema
    ref: SplitRef


@dataclass(frozen=True)
class StoredFile:
    """A file of the store and its wrapped data key: what the database keeps."""

    file: str
    wrapped_key: bytes


class StoredVersion(Protocol):
    """A dataset's version as the database keeps it (`cloister_budget.tables.DatasetVersion`)."""

    @property
    def dataset(self) -> str: ...
    @property
    def schema_json(self) -> str: ...
    @property
    def file(self) -> str: ...
    @property
    def wrapped_key(self) -> bytes: ...


def _dataset_context(dataset: str, file: str) -> bytes:
    return f"dataset\n{dataset}\n{file}".encode()


def _result_context(charge: str, file: str) -> bytes:
    return f"result\n{charge}\n{file}".encode()


def _owner(name: str) -> str:
    """Whose a dataset or a population is: their names are OWNER/NAME."""
    return name.split("/")[0]


class DatasetStore:
    """A directory of encrypted files. Usable from several threads.

    Beside each dataset lies a small file with its units' split values alone, and one with their parts where the schema
    has a partition, so that the guard can count the units of a part without opening the rows.
    """

    def __init__(self, directory: Path, keys: KeyRing) -> None:
        """Raises StorageError where the directory can't be used."""
        self._directory = directory
        self._keys = keys
        self._splits: OrderedDict[str, npt.NDArray[Any]] = OrderedDict()
        self._lock = threading.Lock()
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"The directory {directory} can't be made.", why=f"{error.strerror}.") from error
        self._secret: bytes | None = None

    def split_key(self, population: str) -> bytes:
        """The key (32 bytes) that `ingest.read_upload` hashes the units of `population` with.

        Raises ConflictError where the owner lends no key and the machine has none, UnavailableError, or StorageError.
        """
        return population_key(self._keys.split_secret(_owner(population)) or self.machine_secret(), population)

    def write(self, table: pa.Table, *, dataset: str) -> StoredFile:
        """Store a validated table, with the columns that `ingest.read_upload` adds, as a version of `dataset`.

        The wrapped key opens for this dataset and this file alone. Raises StorageError.
        """
        splits = table.column(SPLIT_COLUMN).to_numpy()
        name, key = secrets.token_hex(16), secrets.token_bytes(KEY_BYTES)
        stored = StoredFile(name, self._keys.wrap(key, _dataset_context(dataset, name), (_owner(dataset),)))
        try:
            write_file(self._path(name), _serialize(table), key)
            write_file(self._path(name + SPLIT_SUFFIX), np.ascontiguousarray(splits, dtype="<f8").tobytes(), key)
            if PART_COLUMN in table.column_names:
                write_file(self._path(name + PART_SUFFIX), table.column(PART_COLUMN).to_numpy().tobytes(), key)
        except StorageError:
            self.discard(stored)
            raise
        return stored

    def source_file(self, stored: StoredVersion, ref: SplitRef) -> SourceFile:
        """What a worker gets to read this version. Raises StorageError where its key can't be unwrapped."""
        return SourceFile(
            path=str(self._path(stored.file).absolute()),
            key=self._data_key(stored),
            data_schema=Schema.from_json(stored.schema_json),
            ref=ref,
        )

    def read_columns(self, stored: StoredVersion, names: Sequence[str]) -> pa.Table:
        """Some columns of a version, for the guard's own checks. Raises StorageError."""
        return read_table(self._path(stored.file), self._data_key(stored)).select(list(names))

    def public_units(self, stored: StoredVersion, ref: SplitRef) -> int:
        """The number of privacy units that a reference is about: neither side of the split depends on anybody's data,
        and the parts of a partition are declared public. Raises InvalidRequestError where there is no such part.
        """
        chosen = in_part(self._small_values(stored, SPLIT_SUFFIX, "<f8"), ref)
        place = division_place(ref, Schema.from_json(stored.schema_json).parts)
        if place is not None:
            chosen &= self._small_values(stored, PART_SUFFIX, "u1") == place
        return int(np.count_nonzero(chosen))

    def write_result(self, data: bytes, *, charge: str, owners: Collection[str]) -> StoredFile:
        """Keep bytes that were paid for, such as trained weights. `charge` is the id of what paid for them.

        `owners` are those of the data that they were made from. Raises UnavailableError, or StorageError.
        """
        name, key = secrets.token_hex(16), secrets.token_bytes(KEY_BYTES)
        stored = StoredFile(name, self._keys.wrap(key, _result_context(charge, name), owners))
        write_file(self._path(name), data, key)
        return stored

    def read_result(self, stored: StoredFile, *, charge: str, owners: Collection[str]) -> bytes:
        """The bytes again. Raises UnavailableError, or StorageError."""
        key = self._keys.unwrap(stored.wrapped_key, _result_context(charge, stored.file), owners)
        return read_file(self._path(stored.file), key)

    def forget(self) -> None:
        """Forget what was read of the files: an owner has locked theirs."""
        with self._lock:
            self._splits.clear()

    def discard(self, stored: StoredFile) -> None:
        """Remove a file that no row of the database names, for example after a transaction that failed."""
        for suffix in ("", SPLIT_SUFFIX, PART_SUFFIX):
            self._path(stored.file + suffix).unlink(missing_ok=True)

    def discard_all_but(self, known: Collection[str]) -> None:
        """Remove every file that the database doesn't name: what a guard that died in an upload left behind.

        `known` are the files of dataset versions and of results alike.
        """
        for path in self._directory.iterdir():
            name = path.name.removesuffix(SPLIT_SUFFIX).removesuffix(PART_SUFFIX)
            if path.name != _SPLIT_KEY_FILE and name not in known:
                path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        # Names are made here, and come back from the database: none may leave the directory.
        if not name or name.startswith(".") or Path(name).name != name:
            raise StorageError("The database names a file that this store never made.")
        return self._directory / name

    def _data_key(self, stored: StoredVersion) -> bytes:
        context = _dataset_context(stored.dataset, stored.file)
        return self._keys.unwrap(stored.wrapped_key, context, (_owner(stored.dataset),))

    def _small_values(self, stored: StoredVersion, suffix: str, dtype: str) -> npt.NDArray[Any]:
        name = stored.file + suffix
        with self._lock:
            found = self._splits.get(name)
            if found is not None:
                self._splits.move_to_end(name)
                return found
        data = read_file(self._path(name), self._data_key(stored))
        values = np.frombuffer(data, dtype=dtype)
        with self._lock:
            self._splits[name] = values
            while len(self._splits) > _CACHED_SPLITS:
                self._splits.popitem(last=False)
        return values

    def machine_secret(self) -> bytes:
        """The secret (32 bytes) behind the splits of owners without a witness, made where it is missing.

        Raises ConflictError where the machine has no key of its own, or StorageError.
        """
        with self._lock:
            if self._secret is None:
                self._secret = self._load_or_make_secret()
            return self._secret

    def _load_or_make_secret(self) -> bytes:
        path, context = self._directory / _SPLIT_KEY_FILE, b"split secret"
        if path.exists():
            try:
                return self._keys.unwrap(path.read_bytes(), context, ())
            except OSError as error:
                raise StorageError("The split's key can't be read.", why=f"{error.strerror}.") from error
        secret = secrets.token_bytes(KEY_BYTES)
        wrapped = self._keys.wrap(secret, context, ())
        write_durably(path, lambda file: file.write(wrapped))
        return secret


def _serialize(table: pa.Table) -> memoryview:
    """Arrow IPC without compression: a compressed length would tell about the rows to whoever sees the disk."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return memoryview(sink.getvalue())


def read_table(path: Path, key: bytes) -> pa.Table:
    """The stored table with the columns that the upload added.

    Raises StorageError where the file isn't what was written.
    """
    try:
        with pa.ipc.open_stream(pa.BufferReader(read_file(path, key))) as reader:
            return reader.read_all()
    except pa.ArrowInvalid as error:
        raise StorageError("A stored file isn't a table.") from error
