"""Opening, upgrading, failing and locking: SQLite and PostgreSQL."""

from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError

from cloister_budget.database import Database, open_database
from cloister_budget.tables import Base, Population, User
from cloister_data.errors import ConfigurationError, ConflictError, StorageError


def user(name: str, size: int = 1) -> User:
    return User(name=name, role="scientist", password_hash="x" * size, created=1)


def names(database: Database) -> set[str]:
    with database.read() as s:
        return set(s.scalars(text("SELECT name FROM users")))


def test_the_migrations_make_the_tables_of_the_models(database: Database) -> None:
    with database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_opening_twice_keeps_what_is_there(url: str) -> None:
    first = open_database(url)
    with first.write() as s:
        s.add(user("alice"))
    first.close()
    second = open_database(url)
    assert names(second) == {"alice"}
    second.close()


def test_a_database_of_a_newer_version_is_refused(url: str) -> None:
    database = open_database(url)
    with database.write() as s:
        s.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    database.close()
    with pytest.raises(ConfigurationError, match="newer version"):
        open_database(url)


def test_tables_of_something_else_are_refused(url: str) -> None:
    database = open_database(url)
    with database.write() as s:
        s.execute(text("DROP TABLE alembic_version"))
    database.close()
    with pytest.raises(ConfigurationError, match="aren't Cloister's"):
        open_database(url)


@pytest.mark.parametrize("url", ["", "nonsense", "sqlite://", "sqlite:///:memory:", "mysql://x/y", "sqlite:///file:x"])
def test_a_url_that_names_no_database_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError):
        open_database(url)


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        open_database(f"sqlite:///{tmp_path}/absent/ledger.db")
    (tmp_path / "text.db").write_text("this is not a database, it is a text that is longer than a header " * 100)
    with pytest.raises(StorageError):
        open_database(f"sqlite:///{tmp_path}/text.db")
    with pytest.raises(StorageError):
        open_database("postgresql://nobody@127.0.0.1:9/none?connect_timeout=2")


def test_only_the_guard_may_read_the_file(sqlite: Database, tmp_path: Path) -> None:
    with sqlite.write() as s:
        s.add(user("alice"))
        for path in tmp_path.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_sqlite_is_opened_for_durability(sqlite: Database) -> None:
    with sqlite.write() as s:
        found = {
            name: s.scalar(text(f"PRAGMA {name}"))
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}


def test_nothing_of_a_failed_transaction_stays(database: Database) -> None:
    def fail() -> None:
        with database.write() as s:
            s.add(user("alice"))
            s.flush()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names(database) == set()


def test_a_clash_is_a_conflict(database: Database) -> None:
    with database.write() as s:
        s.add(user("alice"))
    with pytest.raises(ConflictError), database.write() as s:
        s.add(user("alice"))


def test_a_row_that_points_nowhere_is_not_committed(database: Database) -> None:
    with pytest.raises(ConflictError), database.write() as s:
        s.execute(text("INSERT INTO tokens (hash, \"user\", created, expires) VALUES ('h', 'nobody', 1, 2)"))
    with database.write() as s:
        s.execute(text("INSERT INTO tokens (hash, \"user\", created, expires) VALUES ('h', 'alice', 1, 2)"))
        s.add(user("alice"))


def test_reading_cannot_write(database: Database) -> None:
    def write_while_reading() -> None:
        with database.read() as s:
            s.add(user("alice"))
            s.flush()

    with pytest.raises(StorageError):
        write_while_reading()
    assert names(database) == set()
    with database.write() as s:
        s.add(user("alice"))


def test_a_full_disk_is_a_storage_error_and_nothing_is_half_written(tmp_path: Path) -> None:
    database = open_database(f"sqlite:///{tmp_path / 'ledger.db'}")
    with database.write() as s:
        s.add(user("alice"))
    limits: list[int] = [0]

    @event.listens_for(database.engine, "begin")
    def _limit(connection: object) -> None:
        # SQLite's own way to say that a database may grow no further: the same SQLITE_FULL as a full disk.
        connection.exec_driver_sql(f"PRAGMA max_page_count = {limits[0] or 10**6}")  # type: ignore[attr-defined]

    limits[0] = 1

    def grow() -> None:
        with database.write() as s:
            s.add(user("bob"))
            s.flush()
            s.add(user("carol", 1 << 20))

    with pytest.raises(StorageError, match="Nothing was half-written") as failed:
        grow()
    assert "carol" not in str(failed.value)
    limits[0] = 0
    assert names(database) == {"alice"}
    with database.write() as s:
        s.add(user("bob"))
    assert names(database) == {"alice", "bob"}
    database.close()


def test_a_lost_connection_is_a_storage_error(database: Database) -> None:
    with pytest.raises(StorageError), database.write():
        raise OperationalError("statement with secret parameters", {}, Exception("down"))


def test_a_write_inside_a_write_is_a_mistake_of_ours(database: Database) -> None:
    with database.write(), pytest.raises(RuntimeError), database.write():
        pass
    with database.write() as s:
        s.add(user("alice"))


def test_a_snapshot_does_not_move_and_does_not_wait(database: Database) -> None:
    with database.read() as s:
        assert s.scalar(text("SELECT count(*) FROM users")) == 0
        with database.write() as other:
            other.add(user("alice"))
        assert s.scalar(text("SELECT count(*) FROM users")) == 0
    assert names(database) == {"alice"}


def test_writers_of_many_threads_all_get_their_turn(database: Database) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(5):
                with database.write() as s:
                    s.add(user(f"u{number}-{turn}"))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(names(database)) == 40


def test_vectors_hold_whole_numbers_only(database: Database) -> None:
    with database.write() as s:
        s.add(Population(name="a/b", orders=("2",), deltas=(10**30,)))
    with database.read() as s:
        row = s.get(Population, "a/b")
        assert row is not None
        assert row.deltas == (10**30,)
    with pytest.raises(StorageError), database.write() as s:
        s.add(Population(name="a/c", orders=("2",), deltas=(1.5,)))  # type: ignore[arg-type]
    with database.write() as s:
        s.execute(text("UPDATE populations SET deltas = '[1.5]'"))
    with database.read() as s, pytest.raises(ValueError, match="whole numbers"):
        s.get(Population, "a/b")
