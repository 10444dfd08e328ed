"""The file of a running guard's SQLite database is replaced whole: nothing is answered over it, or into nowhere."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cloister_budget import database as databases
from cloister_data.errors import StorageError
from tests.fakes.small_guard import SmallGuard

Replace = Callable[[Path, Path], None]


def whole_copy(path: Path, copy: Path) -> None:
    """A consistent copy of the database in one file, while its guard runs."""
    copy.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(path)) as source, contextlib.closing(sqlite3.connect(copy)) as target:
        source.backup(target)


def beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def renamed(copy: Path, path: Path) -> None:
    shutil.copy(copy, beside(path, ".new"))
    os.replace(beside(path, ".new"), path)


def renamed_without_its_log(copy: Path, path: Path) -> None:
    for ending in ("-wal", "-shm"):
        beside(path, ending).unlink(missing_ok=True)
    renamed(copy, path)


def removed_and_copied(copy: Path, path: Path) -> None:
    for ending in ("-wal", "-shm", ""):
        beside(path, ending).unlink(missing_ok=True)
    shutil.copy(copy, path)


def written_over(copy: Path, path: Path) -> None:
    """In place: it is the same file, and what is in SQLite's log beside it is still newer."""
    with path.open("r+b") as file:
        file.write(copy.read_bytes())
        file.truncate()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def guard(path: Path) -> Iterator[SmallGuard]:
    found = SmallGuard(f"sqlite:///{path}")
    found.found()
    found.answer()
    yield found
    found.stop()


def releases(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as database:
        return int(database.execute("SELECT count(*) FROM releases").fetchone()[0])


@pytest.mark.parametrize("replace", [renamed, renamed_without_its_log, removed_and_copied])
def test_another_file_under_a_running_guard_is_refused(
    guard: SmallGuard, path: Path, tmp_path: Path, replace: Replace
) -> None:
    """Whatever is in it: the guard's connections are to the file that was there."""
    whole_copy(path, tmp_path / "old")
    guard.answer()
    replace(tmp_path / "old", path)
    # More often than there are connections: a refusal keeps none.
    for _ in range(20):
        with pytest.raises(StorageError, match="replaced"):
            guard.answer()
        with pytest.raises(StorageError, match="replaced"):
            guard.checkpoint()
    guard.stop()
    # Started again, it goes on from what is there, and who saw more refuses it: see test_tampered_log.
    again = SmallGuard(f"sqlite:///{path}")
    if replace is not renamed:
        again.start()
        again.answer()
        assert releases(path) == 2
    again.stop()


def test_the_control_a_file_that_was_only_copied_is_gone_on_with(guard: SmallGuard, path: Path, tmp_path: Path) -> None:
    whole_copy(path, tmp_path / "copy")
    guard.answer()
    assert releases(path) == 2


def test_the_control_without_the_look_at_the_file_answers_are_written_into_nowhere(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(databases, "_sqlite_same_file", lambda *_: None)
    guard = SmallGuard(f"sqlite:///{path}")
    guard.found()
    whole_copy(path, tmp_path / "old")
    guard.answer()
    renamed_without_its_log(tmp_path / "old", path)
    guard.answer()
    assert releases(path) == 0
    guard.stop()


def test_an_older_file_written_over_the_running_guards_is_refused_or_undone(
    guard: SmallGuard, path: Path, tmp_path: Path
) -> None:
    whole_copy(path, tmp_path / "old")
    guard.answer()
    written_over(tmp_path / "old", path)
    answered = 2
    for _ in range(3):
        with contextlib.suppress(StorageError):
            guard.answer()
            answered += 1
    guard.stop()
    again = SmallGuard(f"sqlite:///{path}")
    try:
        again.start()
    except StorageError:
        pass
    else:
        assert releases(path) == answered
    finally:
        again.stop()


def test_a_file_that_is_gone_is_refused_and_not_made_anew(guard: SmallGuard, path: Path) -> None:
    path.rename(beside(path, ".away"))
    for _ in range(20):
        with pytest.raises(StorageError, match="replaced"):
            guard.answer()
    # As many at a time as need connections of their own.
    with ThreadPoolExecutor(10) as threads:
        refused = [threads.submit(guard.checkpoint).exception() for _ in range(10)]
    assert all(isinstance(error, StorageError) for error in refused)
    assert not path.exists()
    # Put back, it is the one that was opened.
    beside(path, ".away").rename(path)
    guard.answer()
    assert releases(path) == 2
