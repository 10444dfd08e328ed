"""The disk fills up, or the database server fails, at every single write of a guard's start, a charge and its answer.

Whatever failed: nothing is released without its entry, the log and the books hold, nothing is cheaper than it was, a
request that is sent again is paid once, and the cloister goes on as soon as there is room.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import resource
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from cloister_budget.entries import LeafBody
from cloister_budget.journal import Journal
from cloister_budget.log import AuditLog
from cloister_budget.tables import Account, ChargeRow, Leaf, Name, ReleaseRow
from cloister_data.errors import StorageError
from tests.cloister_budget.test_crash import check_log
from tests.fakes.audited import believe
from tests.fakes.ledgers import request_id
from tests.fakes.small_guard import ORIGIN, Hands, SmallGuard

FRAME = 24 + 4096
"""A page in SQLite's write-ahead log, with its header."""

Fault = Callable[[int], contextlib.AbstractContextManager[None]]
"""Makes the n-th write from here on fail, and all after it on a full disk, until the block ends."""


@contextlib.contextmanager
def full_disk(write: int) -> Iterator[None]:
    """No file of this process grows further than `write` pages of the log, and half of one: a torn write, then none."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 + write * FRAME + FRAME // 2, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


SERVER = """
CREATE SEQUENCE fault_writes;
CREATE TABLE faults (at bigint, how text);
INSERT INTO faults VALUES (0, '');
CREATE FUNCTION fault() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE given faults;
BEGIN
    SELECT * INTO given FROM faults;
    IF given.at = 0 OR (given.how = 'commit') <> (TG_ARGV[0] = 'commit') THEN RETURN NULL; END IF;
    IF nextval('fault_writes') <> given.at THEN RETURN NULL; END IF;
    IF given.how = 'killed' THEN
        PERFORM pg_terminate_backend(pg_backend_pid());
        PERFORM pg_sleep(5);
    END IF;
    RAISE EXCEPTION 'could not extend file' USING ERRCODE = 'disk_full';
END $$;
CREATE CONSTRAINT TRIGGER fault_commit AFTER INSERT ON leaves DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION fault('commit');
"""
WRITTEN = ("leaves", "log_heads", "charges", "charge_accounts", "accounts", "releases", "names")


def server_fault(hands: Hands, how: str) -> Fault:
    """The server's n-th row written ('full', 'killed': the connection dies), or the n-th commit, fails there."""

    def run(statement: str) -> None:
        with hands.engine.begin() as connection:
            connection.execute(text(statement))

    run(SERVER)
    for table in WRITTEN:
        run(f"CREATE TRIGGER fault AFTER INSERT OR UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION fault('row')")

    @contextlib.contextmanager
    def fault(write: int) -> Iterator[None]:
        run(f"UPDATE faults SET at = {write + 1}, how = '{how}'; ALTER SEQUENCE fault_writes RESTART")
        try:
            yield
        finally:
            run("UPDATE faults SET at = 0")

    return fault


class Book:
    """What a database came to, checked against its own log; it never gets less."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._held: dict[str, tuple[int, ...]] = {}

    def check(self) -> None:
        hands = Hands(self._url)
        try:
            with Session(hands.engine) as s:
                self._check(s)
        finally:
            hands.close()

    def _check(self, s: Session) -> None:
        journal = Journal(AuditLog(Ed25519PrivateKey.generate(), ORIGIN), believe)
        # Every entry, every balance that follows from them, and the signature over them all.
        journal.open(s)
        leaves = list(s.scalars(select(Leaf).order_by(Leaf.index)))
        assert check_log(leaves) == journal._read.tree.root()
        names = {row.name: row.ref for row in s.scalars(select(Name).where(Name.kind == "account"))}
        for account in s.scalars(select(Account)):
            held = tuple(a + b for a, b in zip(account.spent, account.reserved, strict=True))
            assert held == journal._read.books.held[names[account.id]].loss
            before = self._held.get(account.id, (0,) * len(held))
            assert all(now >= then for now, then in zip(held, before, strict=True)), "it got cheaper"
            self._held[account.id] = held
        facts: list[Any] = [LeafBody.from_json(leaf.payload).facts for leaf in leaves]
        charges = {row.id: row.state for row in s.scalars(select(ChargeRow))}
        assert {each.charge for each in facts if each.kind == "charge-reserved"} == set(charges)
        closed = {each.charge for each in facts if each.kind in ("charge-settled", "release")}
        assert closed == {charge for charge, state in charges.items() if state != "reserved"}
        released = {row.id: row.charge for row in s.scalars(select(ReleaseRow))}
        assert released == {each.release: each.charge for each in facts if each.kind == "release"}


def fails_at(url: str, fault: Fault, write: int, book: Book) -> bool:
    """Whether something failed. Then everything is checked, and the same is done again, with room."""
    request = request_id()
    guard = SmallGuard(url)
    started, charge = False, ""
    try:
        with fault(write):
            guard.start()
            started = True
            charge = guard.pay(request)
            guard.release(charge)
    except StorageError:
        failed = True
    else:
        failed = False
    book.check()
    if failed:
        # Where it started, the same guard goes on; nobody has to restart it.
        if not started:
            guard.stop()
            guard = SmallGuard(url).start()
        again = guard.pay(request)
        assert charge in ("", again), "the request was paid twice"
        guard.release(again)
    # As if it were killed between a charge and its answer: the next start settles that.
    guard.pay()
    guard.stop()
    book.check()
    return failed


def prepared(url: str) -> None:
    guard = SmallGuard(url)
    guard.found()
    guard.pay()
    guard.stop()


def at_every_write(url: str, fault: Fault) -> int:
    """How many writes there are."""
    prepared(url)
    book = Book(url)
    write = 0
    while fails_at(url, fault, write, book):
        write += 1
    return write


def test_a_disk_that_is_full_at_any_write_costs_and_forgets_nothing(tmp_path: Any) -> None:
    assert at_every_write(f"sqlite:///{tmp_path / 'ledger.db'}", full_disk) >= 20


@pytest.mark.postgres
@pytest.mark.parametrize(("how", "writes"), [("full", 20), ("killed", 20), ("commit", 4)])
def test_a_server_that_fails_at_any_write_costs_and_forgets_nothing(
    how: str, writes: int, postgres: Callable[[], str]
) -> None:
    url = postgres()
    SmallGuard(url).stop()
    hands = Hands(url)
    fault = server_fault(hands, how)
    assert at_every_write(url, fault) >= writes
    hands.close()


def test_a_commit_whose_answer_is_lost_is_found_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the database, and the guard was told that it failed."""
    prepared(url)
    book = Book(url)
    for lost in range(6):
        guard, request = SmallGuard(url), request_id()
        dialect = guard.database.engine.dialect
        commits = itertools.count()

        def commit(connection: Any, lost: int = lost, commits: Any = commits, dialect: Any = dialect) -> None:
            connection.commit()
            if next(commits) == lost:
                raise dialect.dbapi.OperationalError("the connection was lost")

        monkeypatch.setattr(dialect, "do_commit", commit)
        steps: tuple[Callable[[], Any], ...] = (
            guard.start,
            functools.partial(guard.pay, request),
            functools.partial(guard.pay, request),
            guard.answer,
        )
        failed = 0
        for step in steps:
            try:
                step()
            except StorageError:
                failed += 1
        book.check()
        guard.stop()
        assert failed == 1


def test_the_check_sees_an_answer_without_its_entry_and_a_balance_that_fell(url: str) -> None:
    """The control."""
    guard = SmallGuard(url)
    guard.found()
    guard.answer()
    book = Book(url)
    book.check()
    with guard.database.write() as s:
        charge = s.scalars(select(ChargeRow.id)).one()
        s.add(ReleaseRow(id="f" * 32, charge=charge, user="alice", kind="statistic", owners=(), body=b"{}", created=1))
    with pytest.raises(AssertionError):
        book.check()
    with guard.database.write() as s:
        s.delete(s.get_one(ReleaseRow, "f" * 32))
    book.check()
    with guard.database.write() as s:
        for account in s.scalars(select(Account)):
            account.spent = (0,) * len(account.spent)
    with pytest.raises(AssertionError):
        book.check()
    guard.stop()
