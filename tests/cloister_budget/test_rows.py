"""The rows that charges move: what they write is what everybody else reads, on both databases."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import bindparam, select

from cloister_budget import rows
from cloister_budget.database import Database
from cloister_budget.log import AuditLog, size
from cloister_budget.statements import Statement
from cloister_budget.tables import Account, ChargeRow
from cloister_data.errors import StorageError
from tests.fakes.ledgers import POPULATION, HandClock, laplace, ready, reservation

ALICE = f"{POPULATION}:alice"


def test_a_session_sees_what_a_charge_moved_also_where_it_had_read_the_row_before(database: Database) -> None:
    ledger = ready(database, 1.0, alice=1.0)
    with database.write() as s:
        account = s.get_one(Account, POPULATION)
        assert set(account.reserved) == {0}
        charge = ledger.reserve(s, reservation([POPULATION, ALICE], laplace("0.1"))).charge_id
        assert s.get_one(Account, POPULATION) is account
        assert min(account.reserved) > 0
        row = s.get_one(ChargeRow, charge)
        ledger.commit(s, charge)
        assert (row.state, set(account.reserved)) == ("committed", {0})


def test_locked_rows_are_those_of_the_tables(database: Database) -> None:
    ready(database, 1.0, alice=0.5)
    with database.write() as s:
        found = rows.lock(s, [ALICE, POPULATION, "nobody/none"])
        stored = {row.id: row for row in s.scalars(select(Account))}
    assert [row.id for row in found] == [POPULATION, ALICE]
    for row in found:
        account = stored[row.id]
        assert (row.budgets, row.spent, row.epsilon) == (account.budgets, account.spent, account.epsilon)
        assert row.suspended is False
    with database.read() as s:
        assert rows.look(s, []) == []


def test_a_statement_wants_every_parameter_and_an_error_of_the_database_is_a_storage_error(database: Database) -> None:
    statement = Statement(lambda _: select(Account.id).where(Account.id == bindparam("name")))
    with database.read() as s:
        assert statement.run(s, {"name": "nobody"}) == []
        with pytest.raises(KeyError):
            statement.run(s, {})
    with pytest.raises(StorageError), database.read() as s:
        # Writing in a transaction that only reads.
        rows.save_charge(s, rows.LockedCharge("0" * 32, "committed", None, 0, 0), 1)


def test_no_leaf_is_appended_under_a_savepoint(database: Database) -> None:
    log = AuditLog(Ed25519PrivateKey.generate(), "rows.example/log", HandClock())
    with database.write() as s:
        with pytest.raises(RuntimeError, match="savepoint"), s.begin_nested():
            log.append(s, "note", {})
        log.append(s, "note", {})
        assert size(s) == 1
