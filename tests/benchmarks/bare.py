"""The rows of a charge, written through the database's own driver: what a charge can't be cheaper than."""

from __future__ import annotations

import itertools
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from sqlalchemy import make_url

from cloister_budget.tables import ChargeAccount, ChargeRow, Leaf

TABLES = {"charge": ChargeRow, "part": ChargeAccount, "leaf": Leaf}
LOCK = "SELECT spent, reserved FROM accounts WHERE id IN (?, ?) ORDER BY id"
UPDATE = "UPDATE accounts SET spent = ?, reserved = ? WHERE id = ?"
HEAD = "UPDATE log_heads SET size = ?, signature = ? WHERE id = 2"
SETTLE = "UPDATE charges SET state = 'committed', settled = ? WHERE id = ?"


class BareDatabase:
    """One connection for each client. The rows are those of the ledger's first charge under fresh ids."""

    def __init__(self, connections: list[Any], population: str, *, sqlite: bool) -> None:
        self._connections, self._population, self._sqlite = connections, population, sqlite
        self._one_writer = threading.Lock()
        self._columns, self._rows, self._insert = {}, {}, {}
        first = connections[0]
        for name, table in TABLES.items():
            columns = [column.name for column in table.__table__.columns]
            quoted = ", ".join(f'"{column}"' for column in columns)
            into = table.__tablename__
            self._columns[name] = columns
            self._rows[name] = dict(
                zip(columns, first.execute(f"SELECT {quoted} FROM {into} LIMIT 1").fetchone(), strict=True)
            )
            self._insert[name] = f"INSERT INTO {into} ({quoted}) VALUES ({', '.join('?' * len(columns))})"
        self._head = first.execute("SELECT size, signature FROM log_heads WHERE id = 1").fetchone()
        # Leaves that ascend like the ledger's own and a head like its own, both out of their way.
        first.execute("INSERT INTO log_heads SELECT 2, size, signature FROM log_heads WHERE id = 1")
        self._leaves = itertools.count(-(10**12))
        if not sqlite:
            first.commit()

    def charge(self, client: int = 0) -> None:
        """Two transactions: the rows of a reservation and its leaf, the rows of a settlement and its leaf."""
        run = self._connections[client]
        charge = secrets.token_hex(16)
        accounts = (self._population, f"{self._population}:user{client}")
        for first in (True, False):
            with self._transaction(run):
                rows = self._do(run, LOCK if self._sqlite else f"{LOCK} FOR UPDATE", accounts).fetchall()
                for account, (spent, reserved) in zip(accounts, rows, strict=True):
                    self._do(run, UPDATE, (spent, reserved, account))
                if first:
                    self._add(run, "charge", id=charge, request_id=secrets.token_hex(16), state="reserved")
                    for account in accounts:
                        self._add(run, "part", charge=charge, account=account)
                else:
                    self._do(run, SETTLE, (1_800_000_000, charge))
                self._add(run, "leaf", index=next(self._leaves))
                self._do(run, HEAD, tuple(self._head))

    @contextmanager
    def _transaction(self, run: Any) -> Iterator[None]:
        if not self._sqlite:
            yield
            run.commit()
            return
        with self._one_writer:
            run.execute("BEGIN IMMEDIATE")
            yield
            run.execute("COMMIT")

    def _add(self, run: Any, name: str, **changed: object) -> None:
        row = {**self._rows[name], **changed}
        self._do(run, self._insert[name], tuple(row.values()))

    def _do(self, run: Any, statement: str, values: tuple[object, ...]) -> Any:
        return run.execute(statement if self._sqlite else statement.replace("?", "%s"), values)


@contextmanager
def bare_database(url: str, population: str, clients: int) -> Iterator[BareDatabase]:
    """Connections to the database of a ledger that has one charge, as durable as the ledger's own."""
    parsed = make_url(url)
    sqlite = parsed.get_backend_name() == "sqlite"
    connections: list[Any] = []
    try:
        for _ in range(clients):
            if sqlite:
                found = sqlite3.connect(str(parsed.database), isolation_level=None, check_same_thread=False, timeout=30)
                found.execute("PRAGMA synchronous = FULL")
                connections.append(found)
            else:
                connections.append(psycopg.connect(parsed.render_as_string(hide_password=False)))
        yield BareDatabase(connections, population, sqlite=sqlite)
    finally:
        for connection in connections:
            connection.close()
