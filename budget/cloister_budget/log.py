"""The audit log: an append-only Merkle tree in the database, and signed checkpoints over it.

Each row holds one leaf and the hashes of the complete subtrees that it finishes. Beside them stands one signature, over
the tree that ends with the last of them: whoever cuts entries off, or adds some, has none for what is left.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import bindparam, func, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from cloister_budget import log_rows, merkle
from cloister_budget.database import after_commit
from cloister_budget.entries import COARSE_SECONDS, MAX_PAYLOAD_BYTES
from cloister_budget.log_rows import End
from cloister_budget.merkle import HASH_BYTES, Growing
from cloister_budget.statements import Statement
from cloister_budget.tables import Leaf
from cloister_data.base import Wire
from cloister_data.checkpoint import Checkpoint, check_origin, sign_checkpoint
from cloister_data.errors import StorageError

_HEAD = "cloister_log_head"
"""Under this name a session knows the log's end as its transaction has left it."""

_LAST = Statement(lambda _: select(func.max(Leaf.index)))


@lru_cache(maxsize=256)
def _rows(count: int) -> Statement:
    wanted = [Leaf.index == bindparam(f"index{number}") for number in range(count)]
    return Statement(lambda _: select(Leaf.index, Leaf.hashes).where(or_(*wanted)))


Facts = Wire | Mapping[str, str | int | bool | None]


@dataclass(frozen=True)
class Added:
    """A leaf as it was written: its place, its coarse time in Unix seconds, its bytes and their hash (32 bytes)."""

    index: int
    at: int
    payload: bytes
    hash: bytes


@dataclass(frozen=True)
class Proof:
    """An inclusion proof (RFC 6962 section 2.1.1, 32 bytes each) to the root in the signed checkpoint."""

    inclusion: tuple[bytes, ...]
    checkpoint: str


class LogMovedOn(Exception):
    """Others have appended. Nothing was written, and the log, of `size` leaves, is now this transaction's alone."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


class AuditLog:
    """Appends leaves in the caller's transaction, and signs checkpoints. `origin` names the cloister's log."""

    def __init__(self, key: Ed25519PrivateKey, origin: str, clock: Callable[[], float] = time.time) -> None:
        self._key, self.origin, self._clock = key, check_origin(origin), clock
        self._head: _Head | None = None
        self._head_lock = threading.Lock()

    @property
    def public_key(self) -> bytes:
        """32 bytes."""
        return self._key.public_key().public_bytes_raw()

    def append(self, s: Session, kind: str, facts: Facts) -> int:
        """Add a leaf; answers its index. See `add`."""
        return self.add(s, kind, facts).index

    def add(self, s: Session, kind: str, facts: Facts, after: Growing | None = None) -> Added:
        """Add a leaf. It is there when, and only if, the caller's transaction commits.

        `facts` holds ids, whole numbers and digests: a leaf can never be erased, so nothing personal belongs in it.
        Appending comes last in a transaction: every writer waits for the log's head.

        With `after` it follows the leaves of that tree, which the caller has hashed. Raises LogMovedOn where there are
        others; StorageError where the stored log doesn't extend the one that this guard saw last, or isn't that tree's.
        The database is trusted to be there, not to be right: a backup put back under a running guard is noticed here.
        """
        if s.in_nested_transaction():
            raise RuntimeError("a leaf is appended outside savepoints: what it follows must not be undone under it")
        head: _Head | None = s.info.get(_HEAD) or self._head
        if head is not None and (after is None or after.size == head.end.size):
            added = self._extend(s, head, kind, facts, after)
            if added is not None:
                return added
        # Another transaction or another guard has written, or somebody has.
        head = self._lock(s)
        if after is not None and after.size != head.end.size:
            raise LogMovedOn(head.end.size)
        added = self._extend(s, head, kind, facts, after)
        if added is None:
            raise _another_log()
        return added

    def _extend(self, s: Session, head: _Head, kind: str, facts: Facts, after: Growing | None) -> Added | None:
        """None where the stored log doesn't end at `head`."""
        if after is not None and after.edge != head.tree.edge:
            raise _another_log()
        index, at = head.end.size, coarse(self._clock())
        payload = _payload(index, kind, at, facts)
        hashed = self._write(s, head, payload, kind, at, self._sign)
        return None if hashed is None else Added(index, at, payload, hashed)

    def _sign(self, tree: Growing) -> bytes:
        return self._key.sign(Checkpoint(self.origin, tree.size, tree.root()).body().encode())

    def _write(
        self, s: Session, head: _Head, payload: bytes, kind: str, at: int, sign: Callable[[Growing], bytes]
    ) -> bytes | None:
        """The hash of the leaf that was written after `head`. None where the stored log doesn't end there."""
        hashed, tree = merkle.leaf_hash(payload), head.tree.copy()
        hashes = b"".join(tree.add(hashed))
        end = End(tree.size, sign(tree), hashes)
        leaf = {"index": head.end.size, "kind": kind, "at": at, "payload": payload, "hashes": hashes}
        try:
            if not log_rows.extend(s, head.end, end, leaf):
                return None
        except IntegrityError as error:
            # A leaf is there already, beyond the one that the head says is the last.
            raise _another_log() from error
        self._note(s, _Head(tree, end))
        return hashed

    def put_back(self, s: Session, payloads: Sequence[bytes], signature: bytes) -> None:
        """Write entries that a backup lacks, as they were, with the signature (64 bytes) over the last of them.

        The caller has verified both, and nothing was appended by this guard before.
        """
        head = self._lock(s)
        for payload in payloads:
            leaf = json.loads(payload)
            if not self._write(s, head, payload, leaf["facts"]["kind"], leaf["at"], lambda tree: signature):
                raise _another_log()
            head = self._lock(s)

    def end(self, s: Session) -> Growing:
        """The tree of the log as this transaction leaves it, not to be changed. It is its alone from here on."""
        return self._lock(s).tree

    def _lock(self, s: Session) -> _Head:
        """Where the stored log ends, which is this transaction's alone from here on: it extends what was seen last."""
        known: _Head | None = s.info.get(_HEAD)
        if known is not None:
            return known
        end, seen = log_rows.lock(s), self._head
        if end is None or (seen is not None and not _extends(s, end, seen)):
            raise _another_log()
        return self._note(s, _Head(_tree(s, end.size), end))

    def _note(self, s: Session, head: _Head) -> _Head:
        if _HEAD not in s.info:
            after_commit(s, lambda: self._committed(s.info.pop(_HEAD)))
        s.info[_HEAD] = head
        return head

    def _committed(self, new: _Head) -> None:
        with self._head_lock:
            if self._head is None or new.end.size > self._head.end.size:
                self._head = new

    def prove(self, s: Session, index: int, leaves: int | None = None) -> Proof:
        """That the leaf is in the log as this transaction leaves it, its own leaves among it, or in its first `leaves`.

        The checkpoint is signed over the tree that this guard knows. Raises StorageError where the stored hashes
        lead to another one.
        """
        stated = self.prefix(s, leaves)
        places = [(0, index)]

        def note(level: int, place: int) -> bytes:
            places.append((level, place))
            return merkle.EMPTY_ROOT

        # Once to learn which hashes it takes, which are then read together, and once with them.
        merkle.inclusion_proof(index, stated.size, note)
        known = _stored_hashes(s, sorted(set(places)))

        def read(level: int, place: int) -> bytes:
            return _present(known.get((level, place)), level, place)

        try:
            inclusion = merkle.inclusion_proof(index, stated.size, read)
            merkle.verify_inclusion(read(0, index), index, stated.size, inclusion, stated.root)
        except merkle.LogVerificationError as error:
            raise _another_log() from error
        return Proof(tuple(inclusion), self.sign(stated.size, stated.root))

    def prefix(self, s: Session, leaves: int | None = None) -> Checkpoint:
        """What is said of the log as this transaction leaves it, or of its first `leaves` entries.

        The stored hashes of a part are shown to lead to the whole tree that this guard knows (RFC 6962 section 2.1.2).
        Raises StorageError where they don't. The log is this transaction's alone from here on.
        """
        tree = self.end(s)
        whole = Checkpoint(self.origin, tree.size, tree.root())
        if leaves is None or leaves == tree.size:
            return whole
        try:
            read = reader(s)
            first = merkle.root(leaves, read)
            proof = merkle.consistency_proof(leaves, whole.size, read)
            merkle.verify_consistency(leaves, whole.size, first, whole.root, proof)
        except merkle.LogVerificationError as error:
            raise _another_log() from error
        return Checkpoint(self.origin, leaves, first)

    def sign(self, leaves: int, root: bytes) -> str:
        """A signed note over a tree of so many leaves, which the caller has hashed: never what the database says.

        Whoever has this signature can make the leaves under that root pass for the guard's own.
        """
        return sign_checkpoint(Checkpoint(self.origin, leaves, root), self._key)


@dataclass(frozen=True)
class _Head:
    """The end of a log that this guard has written or read. Its tree is not to be changed."""

    tree: Growing
    end: End


def coarse(seconds: float) -> int:
    """A time as leaves hold it: whole minutes, in Unix seconds."""
    return int(seconds) // COARSE_SECONDS * COARSE_SECONDS


def size(s: Session) -> int:
    """The number of leaves that the transaction sees."""
    last = _LAST.run(s)[0][0]
    return 0 if last is None else int(last) + 1


def _extends(s: Session, end: End, seen: _Head) -> bool:
    """Whether the stored log, which ends at `end`, begins with the one that was seen."""
    size = seen.end.size
    if end.size <= size:
        return end == seen.end
    try:
        return _tree(s, size).edge == seen.tree.edge
    except merkle.LogVerificationError:
        return False


def _another_log() -> StorageError:
    return StorageError(
        "The audit log isn't the one that this cloister wrote.",
        why="Entries that were committed are gone or changed, as when an old copy of the database is put back.",
        next_step="Stop the cloister, and let the admin compare the log with its last checkpoint.",
    )


def _tree(s: Session, leaves: int) -> Growing:
    """The tree of the first leaves, as it is stored. Raises LogVerificationError."""
    places = merkle.edge(leaves)[::-1]
    known = _stored_hashes(s, places)
    return Growing(leaves, [_present(known.get(place), *place) for place in places])


def _stored_hashes(s: Session, places: Sequence[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
    """Those of the subtree hashes at `places` that are stored."""
    indexes = sorted({_finished_by(level, index) for level, index in places})
    if not indexes:
        return {}
    stored = dict(_rows(len(indexes)).run(s, {f"index{number}": index for number, index in enumerate(indexes)}))
    found = {(level, index): _of_level(stored.get(_finished_by(level, index), b""), level) for level, index in places}
    return {place: hashed for place, hashed in found.items() if hashed}


def _finished_by(level: int, index: int) -> int:
    """The leaf that finishes the index-th complete subtree of 2^level leaves, whose row holds its hash."""
    return ((index + 1) << level) - 1


def _of_level(hashes: bytes, level: int) -> bytes:
    return hashes[HASH_BYTES * level : HASH_BYTES * (level + 1)]


def _present(found: bytes | None, level: int, index: int) -> bytes:
    if found is None:
        raise merkle.LogVerificationError("The audit log lacks a part of itself.", why=f"Hash {level}/{index}.")
    return found


def reader(s: Session) -> merkle.Read:
    """The stored subtree hashes."""

    def read(level: int, index: int) -> bytes:
        row = s.get(Leaf, _finished_by(level, index))
        return _present(_of_level(row.hashes, level) or None if row else None, level, index)

    return read


def _payload(index: int, kind: str, at: int, facts: Facts) -> bytes:
    """Canonical JSON {"at", "facts", "index", "v": 1}, the kind among the facts: what the leaf's hash covers."""
    body = facts.model_dump(mode="json") if isinstance(facts, Wire) else dict(facts)
    leaf = {"v": 1, "index": index, "at": at, "facts": {**body, "kind": kind}}
    payload = json.dumps(leaf, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise ValueError("a leaf of the audit log is too large")
    return payload
