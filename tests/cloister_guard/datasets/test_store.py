"""The store: what was written comes back, and nothing that was swapped or altered does."""

from dataclasses import replace
from pathlib import Path

import pytest

from cloister_data.errors import StorageError
from cloister_guard.datasets.store import DatasetStore, StoredFile, read_table
from tests.fakes.stored import Shelf, file_keys


def test_a_table_comes_back_and_is_nowhere_in_the_clear(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, rows=50)
    source = shelf.source()
    assert read_table(Path(source.path), source.key).equals(shelf.table)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"patient" not in path.read_bytes()
            assert path.stat().st_mode & 0o077 == 0


def test_units_of_the_parts_are_counted_without_the_rows(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, rows=300)
    data = tmp_path / "data" / shelf.version.file
    data.unlink()
    assert shelf.units("all") == 300
    assert shelf.units("train") + shelf.units("test") == 300
    assert 30 < shelf.units("test") < 90


def test_the_split_outlives_the_guard(tmp_path: Path) -> None:
    first = Shelf(tmp_path, rows=50)
    second = Shelf(tmp_path, rows=50)
    assert first.table.equals(second.table)


def test_a_swapped_row_of_the_database_opens_nothing(tmp_path: Path) -> None:
    one = Shelf(tmp_path, rows=50)
    two = Shelf(tmp_path, rows=60, name="hospital/others", seed=1)
    assert two.units() == 60
    swapped = replace(one.version, file=two.version.file, wrapped_key=two.version.wrapped_key)
    with pytest.raises(StorageError):
        one.store.source_file(swapped, one.ref())
    with pytest.raises(StorageError):
        one.store.source_file(replace(one.version, file=two.version.file), one.ref())


@pytest.mark.parametrize("name", ["../key", "/etc/passwd", "", ".", "..", ".hidden", "a/b"])
def test_no_name_leaves_the_directory(tmp_path: Path, name: str) -> None:
    shelf = Shelf(tmp_path, rows=20)
    with pytest.raises(StorageError):
        shelf.store.source_file(replace(shelf.version, file=name), shelf.ref())
    with pytest.raises(StorageError):
        shelf.store.discard(StoredFile(name, b""))


def test_results_belong_to_their_release(tmp_path: Path) -> None:
    store = Shelf(tmp_path, rows=20).store
    stored = store.write_result(b"weights", charge="one", owners=["a"])
    assert store.read_result(stored, charge="one", owners=["a"]) == b"weights"
    with pytest.raises(StorageError):
        store.read_result(stored, charge="two", owners=["a"])
    store.discard(stored)
    with pytest.raises(StorageError):
        store.read_result(stored, charge="one", owners=["a"])


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, rows=20)
    orphan = shelf.store.write_result(b"weights", charge="one", owners=["a"])
    kept = shelf.store.write_result(b"weights", charge="two", owners=["a"])
    shelf.store.discard_all_but({shelf.version.file, kept.file})
    assert not (tmp_path / "data" / orphan.file).exists()
    assert shelf.store.read_result(kept, charge="two", owners=["a"]) == b"weights"
    again = DatasetStore(tmp_path / "data", file_keys(tmp_path / "key"))
    assert again.public_units(shelf.version, shelf.ref()) == 20
    assert again.split_key("p") == shelf.store.split_key("p")


def test_an_altered_file_is_refused(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, rows=20)
    source = shelf.source()
    path = Path(source.path)
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match="isn't what was written"):
        read_table(path, source.key)
