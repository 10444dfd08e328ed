"""A whole log, read again from its first entry: its tree, and every balance and limit that follow from it. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from pydantic import ValidationError

from cloister_budget.books import Books, BooksError
from cloister_budget.entries import GuardStarted, LeafBody
from cloister_budget.merkle import Growing, leaf_hash


@dataclass(frozen=True)
class Start:
    """A guard's start: its entry's index and coarse time (Unix seconds), and what it says."""

    index: int
    at: int
    facts: GuardStarted


class Replay:
    """The state after the entries so far.

    `roots` gets the tree heads (32 bytes) of the sizes in `wanted` as the log passes them.
    """

    def __init__(self, wanted: Collection[int] = ()) -> None:
        self.books = Books()
        self.tree = Growing()
        self.starts: list[Start] = []
        self.roots: dict[int, bytes] = {}
        self._wanted = frozenset(wanted)
        self._note_root()

    def add(self, payload: bytes) -> LeafBody:
        """Go on by one entry: the bytes that its hash covers. Raises BooksError, which names the entry."""
        try:
            leaf = LeafBody.from_json(payload)
        except ValidationError as error:
            raise BooksError(self.tree.size, "unreadable", "It can't be read.") from error
        self.books.apply(leaf)
        self.tree.add(leaf_hash(payload))
        if isinstance(leaf.facts, GuardStarted):
            self.starts.append(Start(leaf.index, leaf.at, leaf.facts))
        self._note_root()
        return leaf

    def add_all(self, payloads: Iterable[bytes]) -> None:
        """As `add`, for each."""
        for payload in payloads:
            self.add(payload)

    def _note_root(self) -> None:
        if self.tree.size in self._wanted:
            self.roots[self.tree.size] = self.tree.root()
