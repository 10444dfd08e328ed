"""The guard's pen: no leaf is written that the guard's own books, kept from the log alone, don't admit.

The database is trusted to be there, not to be right. Whoever edits its rows (less spent, a higher limit, an older
policy, another owner's key) can't edit the books in this process, which follow from the leaves; what the ledger then
admits and the books don't is never written, and nothing is computed or released for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloister_budget import merkle
from cloister_budget.book_types import TermsBook
from cloister_budget.books import Books, BooksError
from cloister_budget.database import after_commit
from cloister_budget.entries import Entry
from cloister_budget.log import Added, AuditLog, LogMovedOn, reader, size
from cloister_budget.merkle import Growing
from cloister_budget.names import Names
from cloister_budget.replay import Replay, Start
from cloister_budget.tables import Leaf, LogHead
from cloister_data.audit import NameKind
from cloister_data.checkpoint import Checkpoint
from cloister_data.errors import StorageError
from cloister_data.terms import Gap

_DRAFT = "cloister_books"
"""Under this name a session knows the books as its transaction's leaves leave them."""

READ_AT_ONCE = 1000
TOLD_EVERY = 50_000


Vouch = Callable[[Session, Start], None]
"""Returns where the start was by a guard whose word counts. Raises StorageError."""


class Journal:
    """Appends entries to the audit log, in the caller's transaction. Usable from several threads."""

    def __init__(self, log: AuditLog, vouch: Vouch) -> None:
        """`vouch` is asked about each start that is read, before anything that its key signed for is believed."""
        self.log = log
        self._vouch = vouch
        self._names = Names()
        # The books, and a tree over the same leaves, hashed here: the stored hashes are the database's word.
        self._read = Replay()
        # The books that held last: where the database shows something else, an owner's witness isn't forgotten.
        self._known = Books()
        # The size and the root of what was read and held: whatever is read anew begins with it.
        self._read_last = (0, self._read.tree.root())
        self._lock = threading.Lock()
        self._told: list[Callable[[], None]] = []

    def ref(self, s: Session, kind: NameKind, name: str) -> str:
        """How leaves call this user, dataset, population or account."""
        return self._names.ref(s, kind, name)

    def open(self, s: Session, told: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Read the whole log, once, before anything is appended. `told` hears now and then (leaves done, of so many).

        Raises StorageError where a leaf was changed, or doesn't follow from those before it, or no guard signed for it.
        """
        with self._lock:
            self._catch_up(s, size(s), told)

    def last_key(self, s: Session) -> str | None:
        """The log key (hex) of the last start in the log, for the next one to go on from. Raises as `open` does."""
        with self._lock:
            self._catch_up(s, size(s))
            return self._read.books.log_keys[-1] if self._read.books.log_keys else None

    def known_ref(self, s: Session, kind: NameKind, name: str) -> str | None:
        """As `ref`, of a name that has one."""
        return self._names.known(s, kind, name)

    def terms(self, owner: str) -> TermsBook | None:
        """The terms in force of an owner, by ref, as far as the log was read; None without a witness."""
        with self._lock:
            return self._known.terms.get(owner)

    def gap(self, owner: str) -> Gap | None:
        """The restore that an owner, by ref, hasn't accepted yet, as far as the log was read."""
        with self._lock:
            return self._known.gaps.get(owner)

    def checkpoint(self, s: Session) -> str:
        """A signed note over every leaf that the transaction sees, and those that this guard has added since.

        Each of them was read and holds: an edited database gets no signature of this guard's. Raises as `open` does.
        """
        # Before the lock: whoever holds it waits for no connection.
        end = size(s)
        with self._lock:
            self._catch_up(s, end)
            return self.log.sign(self._read.tree.size, self._read.tree.root())

    def end(self) -> Checkpoint:
        """What is said of the log as far as it was read."""
        with self._lock:
            return Checkpoint(self.log.origin, self._read.tree.size, self._read.tree.root())

    def prefix(self, s: Session, leaves: int) -> Checkpoint:
        """What is said of the first `leaves` entries of a log that was read and holds, whatever the database says.

        For a transaction that may write: the log is its alone from here on. Raises StorageError.
        """
        self._held(s)
        return self.log.prefix(s, leaves)

    def append(self, s: Session, entry: Entry) -> Added:
        """Add a leaf. As `AuditLog.add`: last in the transaction, and gone with it.

        Raises StorageError where the books don't admit it: the database isn't what this cloister wrote.
        """
        draft = s.info.get(_DRAFT) or self._draft(s)
        try:
            added = self.log.add(s, entry.kind, entry, draft.tree)
        except LogMovedOn as moved:
            # Another guard's leaves, or another transaction's of this one that has just committed.
            draft = self._draft(s, moved.size)
            added = self.log.add(s, entry.kind, entry, draft.tree)
        try:
            draft.books.go_on(added.index, added.at, entry)
        except BooksError as error:
            raise _edited(error.why) from error
        draft.hashes.append(added.hash)
        draft.tree.add(added.hash)
        self._keep(s, draft)
        return added

    def on_growth(self, told: Callable[[], None]) -> None:
        """Have `told` called, in whatever thread, after each transaction that has added entries."""
        self._told.append(told)

    def books(self, s: Session) -> Books:
        """The books as the transaction leaves them. The log is this transaction's alone from here on."""
        return self._held(s).books

    def _held(self, s: Session) -> _Draft:
        """The transaction's draft, once the log is its alone, and is the one that was read."""
        tree = self.log.end(s)
        draft: _Draft = s.info.get(_DRAFT) or self._keep(s, self._draft(s, tree.size))
        if (draft.tree.size, draft.tree.edge) != (tree.size, tree.edge):
            raise _edited("Its entries aren't those that this guard has seen.")
        return draft

    def _draft(self, s: Session, size: int = 0) -> _Draft:
        """A draft over the books, which have read the first `size` leaves at least: the log is then locked."""
        with self._lock:
            self._catch_up(s, size)
            return _Draft(self._read.books.size, self._read.books.draft(), self._read.tree.copy(), [])

    def _keep(self, s: Session, draft: _Draft) -> _Draft:
        if _DRAFT not in s.info:
            after_commit(s, lambda: self._committed(s.info.pop(_DRAFT)))
        s.info[_DRAFT] = draft
        return draft

    def _committed(self, draft: _Draft) -> None:
        with self._lock:
            # Another transaction may have read this one's leaves already.
            if self._read.books.size == draft.start:
                self._read.books.take(draft.books)
                for leaf in draft.hashes:
                    self._read.tree.add(leaf)
                self._known = self._read.books
        if draft.hashes:
            for told in self._told:
                told()

    def _catch_up(self, s: Session, end: int, told: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Read the stored leaves from where the books end up to `end`, and see that a guard signed for all of them."""
        books = self._read.books
        if books.size >= end:
            return
        try:
            if books.size:
                self._read_last = (books.size, self._read.tree.root())
            # Entries that nobody has signed for must not show in `_known`, not for a moment.
            self._read.books = books.draft() if books is self._known else books
            self._read_up_to(s, end, told)
            self._check_head(s)
            size, root = self._read_last
            if self._read.tree.size < size or self._read.roots.get(size, root) != root:
                raise _edited("Its first entries aren't those that this guard has read before.")
        except BaseException:
            # What was read is not to be believed, or not all of it: the next one to ask reads everything anew.
            self._read = Replay({self._read_last[0]})
            raise
        if books is self._known:
            books.take(self._read.books)
            self._read.books = books
        self._known = books

    def _read_up_to(self, s: Session, end: int, told: Callable[[int, int], None]) -> None:
        while (start := self._read.books.size) < end:
            wanted = select(Leaf.payload).where(Leaf.index >= start, Leaf.index < end).order_by(Leaf.index)
            try:
                for payload in s.scalars(wanted.limit(READ_AT_ONCE)).all():
                    known = len(self._read.starts)
                    self._read.add(payload)
                    for begun in self._read.starts[known:]:
                        self._vouch(s, begun)
            except BooksError as error:
                raise _edited(f"{error.what} {error.why}") from error
            if self._read.books.size == start:
                raise _edited("Entries are missing.")
            if self._read.books.size // TOLD_EVERY > start // TOLD_EVERY:
                told(self._read.books.size, end)

    def _check_head(self, s: Session) -> None:
        """That a guard of this log signed for exactly the leaves that were read, and that the stored tree is theirs."""
        books, tree = self._read.books, self._read.tree
        try:
            stored = merkle.root(tree.size, reader(s))
        except merkle.LogVerificationError:
            stored = b""
        if stored != tree.root():
            raise _edited("Its entries don't make up its tree.")
        head = s.get(LogHead, 1, populate_existing=True)
        read = Checkpoint(self.log.origin, tree.size, tree.root())
        if head is None or not any(
            read.is_signed(head.signature, bytes.fromhex(key)) for key in reversed(books.log_keys)
        ):
            raise _edited("Its last entries are not signed for by a guard of this log.")


@dataclass(frozen=True)
class _Draft:
    """What a transaction has appended to a log of `start` leaves: books and tree after it, its leaves' hashes."""

    start: int
    books: Books
    tree: Growing
    hashes: list[bytes]


def _edited(why: str) -> StorageError:
    return StorageError(
        "The database isn't what this cloister's audit log says.",
        why=why,
        next_step="Nothing was done. Stop the cloister, and let the admin compare the log with its last checkpoint.",
    )
