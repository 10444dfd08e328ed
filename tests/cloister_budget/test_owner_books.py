"""What owners said, in the books: terms, witnesses, restores, from the leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import delete, select, update

from cloister_budget.books import Books, BooksError
from cloister_budget.database import Database
from cloister_budget.entries import (
    Entry,
    GapAccepted,
    GuardStarted,
    Locked,
    Login,
    OwnerTermsSet,
    Restored,
    Unlocked,
)
from cloister_budget.journal import Journal
from cloister_budget.log import AuditLog
from cloister_budget.tables import Leaf, LogHead
from cloister_data.errors import StorageError
from tests.cloister_budget.test_books import (
    OWNER_KEY,
    apply,
    limits,
    opened,
    policy,
    published,
    ref,
    reserved,
    uploaded,
)
from tests.fakes.audited import believe
from tests.fakes.ledgers import HandClock

WITNESS, UNLOCK = "a" * 64, "b" * 64


def terms(**changes: Any) -> OwnerTermsSet:
    given = OwnerTermsSet(
        owner=ref("owner"), owner_key=OWNER_KEY, version=1, witness=WITNESS, unlock=UNLOCK, terms=ref("terms")
    )
    return given.model_copy(update=changes)


def accepted(**changes: Any) -> GapAccepted:
    given = GapAccepted(owner=ref("owner"), owner_key=OWNER_KEY, restored=4, statement=ref("statement"))
    return given.model_copy(update=changes)


def witnessed() -> Books:
    return apply(Books(), terms(), opened(), uploaded(keys="owner"), policy(), limits())


def test_a_witness_guards_what_is_uploaded_after_it() -> None:
    books = witnessed()
    apply(books, Unlocked(owner=ref("owner"), witness=WITNESS, size=3), reserved(1))
    apply(books, Locked(owner=ref("owner"), reason="silent"), terms(version=2, witness="c" * 64))
    apply(books, Unlocked(owner=ref("owner"), witness="c" * 64, size=3))
    assert books.terms[ref("owner")].witness == "c" * 64


@pytest.mark.parametrize(
    ("before", "wrong"),
    [
        # Keys that the machine holds, though a witness must; and the other way round.
        ([terms(), opened()], uploaded(keys="file")),
        ([opened()], uploaded(keys="owner")),
        # Terms: of another key, of a later version, after data, with another key to them, of another owner's key.
        ([opened()], terms()),
        ([terms()], terms(version=3)),
        ([terms()], terms(version=2, unlock="d" * 64)),
        ([terms()], terms(version=2, owner_key="e" * 64)),
        ([terms()], terms(owner=ref("thief"))),
        # Unlocked by nobody's witness, or one that has seen more than there is.
        ([terms()], Unlocked(owner=ref("owner"), witness="c" * 64, size=0)),
        ([opened()], Unlocked(owner=ref("owner"), witness=WITNESS, size=0)),
        ([terms()], Unlocked(owner=ref("owner"), witness=WITNESS, size=2)),
        # A restore of more than there was; accepted where nothing waits.
        ([terms()], Restored(first=2)),
        ([terms()], accepted()),
    ],
)
def test_what_does_not_follow_is_refused(before: list[Entry], wrong: Entry) -> None:
    books = apply(Books(), *before)
    with pytest.raises(BooksError):
        apply(books, wrong)


def test_after_a_restore_nothing_is_charged_before_the_owner_signed_for_that_one() -> None:
    books = published()
    apply(books, reserved(1), Restored(first=2))
    at = books.size - 1
    for wrong in (reserved(2), accepted(restored=at - 1), accepted(restored=at, owner_key="e" * 64)):
        with pytest.raises(BooksError):
            apply(books.draft(), wrong)
    held = books.held[ref("all")]
    apply(books, accepted(restored=at))
    assert books.held[ref("all")] == held
    apply(books, reserved(2))
    # Each restore waits anew, and a draft that is undone changes nothing.
    apply(books.draft(), Restored(first=2))
    apply(books, reserved(3))
    draft = books.draft()
    apply(draft, Restored(first=2))
    books.take(draft)
    with pytest.raises(BooksError, match="accepted"):
        apply(books, reserved(4))


def test_a_database_that_shows_something_else_makes_nobody_forget_a_witness(database: Database) -> None:
    clock = HandClock()
    journal, nobody = (
        Journal(AuditLog(Ed25519PrivateKey.generate(), "books.example/log", clock), believe) for _ in range(2)
    )
    start = GuardStarted(
        evidence=ref("e"), platform="simulated", log_key=journal.log.public_key.hex(), previous_key=None,
        certificate=ref("c"),
    )  # fmt: skip
    with database.write() as s:
        journal.append(s, start)
        journal.append(s, terms())
    with database.write() as s:
        nobody.log.append(s, "login", Login(user=ref("ann")))
    for _ in range(2):
        with pytest.raises(StorageError), database.write() as s:
            journal.append(s, Login(user=ref("ann")))
        found = journal.terms(ref("owner"))
        assert found is not None
        assert found.witness == WITNESS


def _journals() -> tuple[Journal, Journal]:
    clock = HandClock()
    one, other = (
        Journal(AuditLog(Ed25519PrivateKey.generate(), "books.example/log", clock), believe) for _ in range(2)
    )
    return one, other


def _start(journal: Journal) -> GuardStarted:
    return GuardStarted(
        evidence=ref("e"), platform="simulated", log_key=journal.log.public_key.hex(), previous_key=None,
        certificate=ref("c"),
    )  # fmt: skip


def test_terms_that_no_guard_signed_for_are_never_in_force(database: Database) -> None:
    journal, nobody = _journals()
    with database.write() as s:
        journal.append(s, _start(journal))
        journal.append(s, terms())
    with database.write() as s:
        nobody.log.append(s, "owner-terms", terms(version=2, witness="c" * 64))
    with pytest.raises(StorageError), database.read() as s:
        journal.checkpoint(s)
    found = journal.terms(ref("owner"))
    assert found is not None
    assert found.witness == WITNESS


def test_a_log_that_is_read_anew_begins_with_what_was_read_before(database: Database) -> None:
    """What makes a guard read anew is in the hands of whoever has the database; an older log is no log of its."""
    journal, nobody = _journals()
    with database.write() as s:
        journal.append(s, _start(journal))
    with database.read() as s:
        (head,) = [(each.size, each.signature) for each in s.scalars(select(LogHead))]
    with database.write() as s:
        journal.append(s, terms())
    with database.write() as s:
        nobody.log.append(s, "login", Login(user=ref("ann")))
    for _ in range(2):
        with pytest.raises(StorageError), database.read() as s:
            journal.checkpoint(s)
        # The log as it was before the terms, signature and all.
        with database.write() as s:
            s.execute(delete(Leaf).where(Leaf.index >= 1))
            s.execute(update(LogHead).values(size=head[0], signature=head[1]))
    found = journal.terms(ref("owner"))
    assert found is not None
    assert found.witness == WITNESS


def test_a_small_restore_hides_no_large_one_that_waits() -> None:
    books = published()
    size = books.size
    apply(books, Restored(first=1), Restored(first=size + 1))
    gap = books.gaps[ref("owner")]
    assert (gap.restored, gap.first, gap.end) == (size + 1, 1, size + 1)
    apply(books, accepted(restored=size + 1), Restored(first=size + 2))
    assert books.gaps[ref("owner")].first == size + 2
