"""Upgrades of the database: from every version, whatever is in it, and cut off at any statement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from alembic.script import ScriptDirectory
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Engine, create_engine, event, inspect, make_url, text

from cloister_budget.database import open_database
from cloister_budget.ledger import Ledger
from cloister_budget.log import AuditLog
from cloister_budget.migrations import script_config
from cloister_budget.tables import Base
from tests.cloister_budget.test_crash import check
from tests.fakes.ledgers import POPULATION, HandClock, laplace, ready, reservation

VERSIONS = [script.revision for script in ScriptDirectory.from_config(script_config()).walk_revisions()]


@contextmanager
def cut_off_after(statements: int) -> Iterator[list[int]]:
    """Every statement of this process counts; the one after so many fails, as if the machine had stopped there."""
    ran = [0]

    def count(*_: Any) -> None:
        ran[0] += 1
        if ran[0] > statements:
            raise KeyboardInterrupt

    event.listen(Engine, "before_cursor_execute", count)
    try:
        yield ran
    finally:
        event.remove(Engine, "before_cursor_execute", count)


def tables(url: str) -> set[str]:
    parsed = make_url(url)
    engine = create_engine(parsed.set(drivername="postgresql+psycopg") if "postgres" in parsed.drivername else parsed)
    try:
        return set(inspect(engine).get_table_names())
    finally:
        engine.dispose()


def test_an_upgrade_that_is_cut_off_anywhere_leaves_the_database_as_it_was(url: str) -> None:
    with cut_off_after(10**9) as ran:
        open_database(url).close()
    needed = ran[0]
    assert needed > len(Base.metadata.tables)
    database = open_database(url)
    with database.write() as s:
        for table in reversed(Base.metadata.sorted_tables):
            s.execute(text(f"DROP TABLE {table.name}"))
        s.execute(text("DROP TABLE alembic_version"))
    database.close()
    for statements in range(1, needed, 3):
        with pytest.raises(KeyboardInterrupt), cut_off_after(statements):
            open_database(url)
        assert tables(url) == set()
    open_database(url).close()
    assert set(Base.metadata.tables) <= tables(url)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_ledger_of_every_version_is_upgraded_with_what_is_in_it(url: str, version: str) -> None:
    if version != VERSIONS[0]:
        pytest.fail(f"write down here how a ledger of version {version} is made: it was released")
    database = open_database(url)
    ledger = ready(database, 1.0, alice=1.0)
    log = AuditLog(Ed25519PrivateKey.generate(), "upgrade.example/log", HandClock())
    accounts = [POPULATION, f"{POPULATION}:alice"]
    with database.write() as s:
        charge = ledger.reserve(s, reservation(accounts, laplace("0.1"))).charge_id
        log.append(s, "reserved", {"charge": charge})
    with database.write() as s:
        ledger.commit(s, charge)
        log.append(s, "settled", {"charge": charge})
        before = ledger.account_views(s)
    database.close()
    database = open_database(url)
    check(database, [("committed", charge)])
    with database.read() as s:
        assert Ledger(HandClock()).account_views(s) == before
    database.close()
