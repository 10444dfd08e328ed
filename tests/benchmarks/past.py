"""A ledger with a long past: the first charge's rows, copied inside the database."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Table, text
from sqlalchemy.orm import Session

from cloister_budget import merkle
from cloister_budget.database import Database
from cloister_budget.log import size
from cloister_budget.tables import Base, ChargeAccount, ChargeRow, Leaf


def _copied(table: Table, changed: dict[str, str]) -> tuple[str, str]:
    """The columns of a table, and the expressions that copy a row `t` except for what is changed."""
    names = [column.name for column in table.columns]
    return ", ".join(f'"{name}"' for name in names), ", ".join(changed.get(name, f't."{name}"') for name in names)


def fill(database: Database, charges: int) -> None:
    """Add so many past charges to a ledger that has one committed charge, and two leaves of the audit log for each.

    Every leaf repeats the first one's payload, so all subtrees of one level have one hash: the tree is a true one.
    """
    sqlite = database.is_sqlite
    count = (
        "(WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {0}) SELECT i FROM n) AS n"
        if sqlite
        else "generate_series(1, {0}) AS n(i)"
    )
    random = "lower(hex(randomblob(16)))" if sqlite else "md5(random()::text || n.i)"
    with database.write() as s:
        columns, values = _copied(ChargeRow.__table__, {"id": random, "request_id": random})  # type: ignore[arg-type]
        _run(s, f"INSERT INTO charges ({columns}) SELECT {values} FROM {count.format(charges)}, "
                f"(SELECT * FROM charges LIMIT 1) AS t")  # fmt: skip
        first = s.execute(text("SELECT charge FROM charge_accounts LIMIT 1")).scalar_one()
        columns, values = _copied(ChargeAccount.__table__, {"charge": "c.id"})  # type: ignore[arg-type]
        _run(s, f"INSERT INTO charge_accounts ({columns}) SELECT {values} FROM charges AS c, charge_accounts AS t "
                f"WHERE t.charge = '{first}' AND c.id <> '{first}'")  # fmt: skip
        _grow_log(s, count, 2 * charges)
    _analyze(database)


def _grow_log(s: Session, count: str, leaves: int) -> None:
    payload = s.execute(text('SELECT payload FROM leaves WHERE "index" = 0')).scalar_one()
    _run(s, "DELETE FROM leaves")
    s.execute(
        text(f'INSERT INTO leaves ("index", kind, at, payload, hashes) '
             f"SELECT n.i - 1, 'charge', 1800000000, :payload, :none FROM {count.format(leaves)}"),
        {"payload": bytes(payload), "none": b""},
    )  # fmt: skip
    hashes, level = merkle.leaf_hash(bytes(payload)), 0
    while leaves >> level:
        # The leaves that finish a subtree of this level and none above it.
        s.execute(
            text(f'UPDATE leaves SET hashes = :hashes WHERE "index" % {2 << level} = {(1 << level) - 1}'),
            {"hashes": hashes},
        )
        newest = hashes[-merkle.HASH_BYTES :]
        hashes, level = hashes + merkle.node_hash(newest, newest), level + 1
    s.execute(text("UPDATE log_heads SET size = :size"), {"size": leaves})
    if size(s) != s.query(Leaf).count():
        raise RuntimeError("the log wasn't filled")


def _analyze(database: Database) -> None:
    """What PostgreSQL's autovacuum would do in time, and a checkpoint: neither belongs to the first charge's cost."""
    statements: Iterable[str] = ("PRAGMA wal_checkpoint(TRUNCATE)",)
    if not database.is_sqlite:
        statements = [f"VACUUM ANALYZE {table.name}" for table in Base.metadata.sorted_tables] + ["CHECKPOINT"]
    raw = database.engine.raw_connection()
    try:
        connection = raw.driver_connection
        if not database.is_sqlite:
            connection.autocommit = True  # type: ignore[union-attr]
        for statement in statements:
            connection.execute(statement)  # type: ignore[union-attr]
    finally:
        raw.invalidate()
        raw.close()


def _run(s: Session, statement: str) -> None:
    s.execute(text(statement))
