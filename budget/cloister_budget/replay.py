"""A whole log, read again from its first entry: its tree, and every balance and limit that follow from it. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from pydantic import ValidationError

from cloister_budget.books import Books, BooksError
from cloister_budget.entries import MAX_PAYLOAD_BYTES, Entry, GuardStarted, LeafBody
from cloister_budget.merkle import Growing, leaf_hash

_MEMORY = 50_000
"""So many forms of a charge's entries are remembered; then they are forgotten, and learned anew."""

_CHARGE = re.compile(
    rb'\{"at":(0|[1-9][0-9]{0,11}),"facts":\{"charge":"([0-9a-f]{32})",(.*)\},"index":(0|[1-9][0-9]{0,11}),"v":1\}'
)
_ONCE = ((b'"request":"', 64), (b'"receipt":"', 64), (b'"release":"', 32))
_HEX = re.compile(rb'[0-9a-f]+"')


@dataclass(frozen=True)
class Start:
    """A guard's start: its entry's index and coarse time (Unix seconds), and what it says."""

    index: int
    at: int
    facts: GuardStarted


class Replay:
    """The state after the entries so far.

    `roots` gets the tree heads (32 bytes) of the sizes in `wanted` as the log passes them.

    Most entries of a log are charges that differ in nothing but their ids, their digests and their times: one of each
    form is parsed and validated, and the others, whose bytes are the same beside these, are read by that.
    """

    def __init__(self, wanted: Collection[int] = ()) -> None:
        self.books = Books()
        self.tree = Growing()
        self.starts: list[Start] = []
        self.roots: dict[int, bytes] = {}
        self._wanted = frozenset(wanted)
        self._forms: dict[bytes, Entry] = {}
        self._note_root()

    def add(self, payload: bytes) -> None:
        """Go on by one entry: the bytes that its hash covers. Raises BooksError, which names the entry."""
        charge = _CHARGE.fullmatch(payload)
        if charge is None or len(payload) > MAX_PAYLOAD_BYTES:
            leaf = self._parse(payload)
            self.books.apply(leaf)
            if isinstance(leaf.facts, GuardStarted):
                self.starts.append(Start(leaf.index, leaf.at, leaf.facts))
        else:
            at, name, index = charge.group(1, 2, 4)
            form = _form_of(payload, *charge.span(3))
            facts = self._forms.get(form)
            if facts is None:
                if len(self._forms) >= _MEMORY:
                    self._forms.clear()
                facts = self._forms[form] = self._parse(payload).facts
            self.books.go_on(int(index), int(at), facts, name.decode())
        self.tree.add(leaf_hash(payload))
        if self.tree.size in self._wanted:
            self._note_root()

    def _parse(self, payload: bytes) -> LeafBody:
        try:
            leaf = LeafBody.from_json(payload)
        except ValidationError as error:
            raise BooksError(self.tree.size, "unreadable", "It can't be read.") from error
        if leaf.canonical() != payload:
            raise BooksError(self.tree.size, leaf.facts.kind, "It isn't in its canonical form.")
        return leaf

    def _note_root(self) -> None:
        if self.tree.size in self._wanted:
            self.roots[self.tree.size] = self.tree.root()


def _form_of(payload: bytes, start: int, end: int) -> bytes:
    """The bytes from `start` to `end`, with a line break for each digest that is an entry's own.

    No entry that was matched holds a line break.
    """
    parts = []
    for label, digits in _ONCE:
        at = payload.find(label, start, end)
        if at < 0:
            continue
        at += len(label)
        if _HEX.fullmatch(payload, at, at + digits + 1):
            parts.append(payload[start:at])
            start = at + digits
    parts.append(payload[start:end])
    return b"\n".join(parts)
