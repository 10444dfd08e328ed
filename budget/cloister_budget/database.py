"""Opening the guard's database, and transactions on it: SQLite embedded, PostgreSQL in production."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError, SQLAlchemyError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from cloister_data.errors import ConfigurationError, ConflictError, StorageError

BUSY_SECONDS = 30
_WRITES = "cloister_writes"
"""Under this name a connection to SQLite knows whether it may write."""
_AFTER = "cloister_after_commit"
"""Under this name a session knows what is to be done when its transaction has committed."""


class _Session(Session):
    """A session of this module's own, so that listeners on it are nobody else's."""


def after_commit(s: Session, work: Callable[[], None]) -> None:
    """Have `work` done when the session's transaction has committed, and never where it was rolled back."""
    s.info.setdefault(_AFTER, []).append(work)


@event.listens_for(_Session, "after_commit")
def _committed(s: Session) -> None:
    for work in s.info.pop(_AFTER, ()):
        work()


class Database:
    """Transactions on one database. Usable from several threads at a time."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._readers = engine.execution_options(cloister_mode="read")
        self._writers = engine.execution_options(cloister_mode="write")
        self._local = threading.local()
        # SQLite admits one writer: waiting here is fair and cheap, waiting for its file lock is a busy loop.
        self._one_writer = threading.Lock()

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that commits at the end of the block, and rolls back when anything was raised in it.

        Nothing of a failed transaction stays. It isn't to be held across a wait for something else, and not nested.

        Raises:
            StorageError: the disk or the database refused to write.
            ConflictError: the rows clash with rows that are there already.
        """
        if getattr(self._local, "writing", False):
            raise RuntimeError("a write transaction was begun inside another one of the same thread")
        self._local.writing = True
        try:
            if self.is_sqlite:
                with self._one_writer:
                    yield from self._transaction()
            else:
                yield from self._transaction()
        finally:
            self._local.writing = False

    def _transaction(self) -> Iterator[Session]:
        try:
            with _Session(self._writers, expire_on_commit=False) as session:
                session.begin()
                session.connection()
                yield session
                session.commit()
        except IntegrityError as error:
            raise ConflictError(
                "It clashes with what is stored already.", next_step="Look at what is there, then try again."
            ) from error
        except (StatementError, PoolTimeoutError) as error:
            raise storage_failure() from error

    @contextmanager
    def read(self) -> Iterator[Session]:
        """One consistent snapshot. Writing through it fails.

        Raises:
            StorageError: the database can't be read.
        """
        try:
            with _Session(self._readers, expire_on_commit=False) as session:
                yield session
        except (StatementError, PoolTimeoutError) as error:
            raise storage_failure() from error

    def close(self) -> None:
        self.engine.dispose()


def storage_failure() -> StorageError:
    """Constant text: a database's own message can quote what was being written."""
    return StorageError(
        "The database refused.",
        why="The disk is full or can't be written, or the database server is down or busy. Nothing was half-written.",
        next_step="Ask the admin to look at the cloister's disk and database, then try again.",
    )


def open_database(url: str) -> Database:
    """Connect to `url` (`sqlite:///FILE` or `postgresql://...`) and bring its tables to this version.

    Raises:
        ConfigurationError: the URL isn't one of these, or the database is of a newer version or something else's.
        StorageError: it can't be reached, read or written.
    """
    parsed = _parse(url)
    try:
        engine = _engine(parsed)
    except (NoSuchModuleError, ImportError) as error:
        raise ConfigurationError(
            "The database's driver isn't installed.", next_step="Install the extra: pip install 'cloister[guard]'."
        ) from error
    try:
        from cloister_budget.migrations import upgrade

        upgrade(engine.execution_options(cloister_mode="write"))
    except DBAPIError as error:
        engine.dispose()
        raise storage_failure() from error
    except (SQLAlchemyError, OSError) as error:
        engine.dispose()
        raise StorageError("The database can't be opened.", why=type(error).__name__) from error
    except BaseException:
        engine.dispose()
        raise
    return Database(engine)


def _parse(url: str) -> URL:
    hint = "Write sqlite:////absolute/path/cloister.db or postgresql://user@host/database."
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigurationError("The database's URL can't be read.", next_step=hint) from error
    kind = parsed.get_backend_name()
    if kind == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if kind != "sqlite" or parsed.database in (None, "", ":memory:") or (parsed.database or "").startswith("file:"):
        raise ConfigurationError("The database must be a file of SQLite, or PostgreSQL.", next_step=hint)
    return parsed.set(drivername="sqlite")


def _engine(url: URL) -> Engine:
    if url.get_backend_name() == "sqlite":
        path = Path(str(url.database))
        opened = _create_private(path)
        engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False}, pool_size=8)
        # Before connecting too, which would make a file where there is none.
        for moment in ("do_connect", "begin"):
            event.listen(engine, moment, lambda *_: _sqlite_same_file(path, opened))
        event.listen(engine, "connect", _sqlite_connected)
        event.listen(engine, "begin", _sqlite_begin)
        event.listen(engine, "checkin", _sqlite_returned)
    else:
        engine = create_engine(url, pool_size=8, pool_pre_ping=True, isolation_level="READ COMMITTED")
        event.listen(engine, "begin", _postgres_begin)
    return engine


def _create_private(path: Path) -> os.stat_result:
    """Only the guard's own account may read the file; SQLite gives its journal the same mode."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            return os.fstat(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageError(
            "The database's file can't be opened.", why=error.strerror or "", next_step="Look at its folder and rights."
        ) from error


def _sqlite_connected(connection: Any, record: Any) -> None:
    # Transactions are begun by `_sqlite_begin` alone, never by the driver.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "trusted_schema = OFF"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _sqlite_same_file(path: Path, opened: os.stat_result) -> None:
    """Open connections would go on writing into a file that has no name any more, and what they wrote were lost."""
    try:
        same = os.path.samestat(os.stat(path), opened)
    except OSError:
        same = False
    if not same:
        raise StorageError(
            "The database's file was replaced under the running cloister.",
            why="Another file lies in its place, or none.",
            next_step="Nothing was done. Stop the cloister, see which file is the right one, and start it again.",
        )


def _sqlite_returned(connection: Any, record: Any) -> None:
    # A COMMIT that SQLite refused (full disk, a row that points nowhere) leaves its transaction open.
    if connection is not None and connection.in_transaction:
        connection.rollback()


def _sqlite_begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get("cloister_mode") == "write"
    if connection.info.get(_WRITES) is not writes:
        connection.exec_driver_sql(f"PRAGMA query_only = {'OFF' if writes else 'ON'}")
        connection.info[_WRITES] = writes
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _postgres_begin(connection: Connection) -> None:
    if connection.get_execution_options().get("cloister_mode") != "write":
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
