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
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Executable, bindparam, func, insert, or_, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from cloister_budget import merkle
from cloister_budget.database import after_commit
from cloister_budget.entries import COARSE_SECONDS, MAX_PAYLOAD_BYTES
from cloister_budget.merkle import HASH_BYTES
from cloister_budget.statements import Statement
from cloister_budget.tables import Leaf, LogHead
from cloister_data.base import Wire
from cloister_data.checkpoint import Checkpoint, check_origin, sign_checkpoint
from cloister_data.errors import StorageError

LOG_LOCK = 0x436C6F69_02
"""Key of the PostgreSQL advisory lock under which leaves are appended; it is held until the transaction ends."""

_HEAD = "cloister_log_head"
"""Under this name a session knows the log's end as its transaction has left it."""

_LOCK = Statement(lambda _: select(func.pg_advisory_xact_lock(bindparam("key"))))
_LAST = Statement(lambda _: select(func.max(Leaf.index)))
_LAST_ROW = Statement(
    lambda _: select(Leaf.index, Leaf.hashes).where(Leaf.index == select(func.max(Leaf.index)).scalar_subquery())
)
_ADD_LEAF = Statement(lambda _: insert(Leaf.__table__))  # type: ignore[arg-type]


def _put_head(dialect: str) -> Executable:
    upsert: Any = (sqlite if dialect == "sqlite" else postgresql).insert(LogHead)
    new = {"size": upsert.excluded.size, "signature": upsert.excluded.signature}
    return upsert.on_conflict_do_update(index_elements=["id"], set_=new)  # type: ignore[no-any-return]


_PUT_HEAD = Statement(_put_head)


@lru_cache(maxsize=256)
def _rows(count: int) -> Statement:
    wanted = [Leaf.index == bindparam(f"index{number}") for number in range(count)]
    last = select(func.max(Leaf.index)).scalar_subquery()
    return Statement(lambda _: select(Leaf.index, Leaf.hashes, last).where(or_(*wanted)))


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

    def add(self, s: Session, kind: str, facts: Facts) -> Added:
        """Add a leaf. It is there when, and only if, the caller's transaction commits.

        `facts` holds ids, whole numbers and digests: a leaf can never be erased, so nothing personal belongs in it.
        Appending comes last in a transaction: every writer waits for the log's lock.
        """
        if s.in_nested_transaction():
            raise RuntimeError("a leaf is appended outside savepoints: what it follows must not be undone under it")
        edge = self.end(s)
        index = edge.size
        at = coarse(self._clock())
        payload = _payload(index, kind, at, facts)
        hashed = merkle.leaf_hash(payload)
        gained = merkle.append(index, hashed, edge.read)
        edge = edge.grown(gained)
        hashes = b"".join(found for _, _, found in gained)
        _ADD_LEAF.run(s, {"index": index, "kind": kind, "at": at, "payload": payload, "hashes": hashes})
        signature = self._key.sign(self._checkpoint(edge.size, edge.read).body().encode())
        _PUT_HEAD.run(s, {"id": 1, "size": edge.size, "signature": signature})
        s.info[_HEAD] = _Head(edge, hashes)
        return Added(index, at, payload, hashed)

    def put_back(self, s: Session, payloads: Sequence[bytes], signature: bytes) -> None:
        """Write entries that a backup lacks, as they were, with the signature (64 bytes) over the last of them.

        The caller has verified both, and nothing was appended by this guard before.
        """
        edge = self.end(s)
        for payload in payloads:
            leaf = json.loads(payload)
            gained = merkle.append(edge.size, merkle.leaf_hash(payload), edge.read)
            hashes = b"".join(found for _, _, found in gained)
            row = {"index": edge.size, "kind": leaf["facts"]["kind"], "at": leaf["at"], "payload": payload}
            _ADD_LEAF.run(s, {**row, "hashes": hashes})
            edge = edge.grown(gained)
        _PUT_HEAD.run(s, {"id": 1, "size": edge.size, "signature": signature})
        s.info[_HEAD] = _Head(edge, hashes)

    def end(self, s: Session) -> Edge:
        """The log's right edge as the transaction leaves it. The log is this transaction's alone from here on."""
        known: _Head | None = s.info.get(_HEAD)
        if known is None:
            if s.connection().dialect.name == "postgresql":
                _LOCK.run(s, {"key": LOG_LOCK})
            known = s.info[_HEAD] = _Head(self._stored_edge(s), b"")
            after_commit(s, lambda: self._committed(s.info.pop(_HEAD)))
        return known.edge

    def _committed(self, new: _Head) -> None:
        if not new.hashes:
            return  # Nothing was appended.
        with self._head_lock:
            if self._head is None or new.edge.size > self._head.edge.size:
                self._head = new

    def _stored_edge(self, s: Session) -> Edge:
        """The stored log's right edge, once it is shown to extend the head that this guard saw last.

        The database is trusted to be there, not to be right: a backup put back under a running guard is noticed here.
        """
        head = self._head
        if head is None:
            return _edge(s, size(s))
        last = _LAST_ROW.run(s)
        if last and last[0] == (head.edge.size - 1, head.hashes):
            return head.edge
        # Another guard has written, or somebody has.
        seen = head.edge.size
        try:
            leaves, hashes = _stored_hashes(s, merkle.edge(seen))
            same = leaves >= seen and merkle.root(seen, Edge(seen, hashes).read) == merkle.root(seen, head.edge.read)
        except merkle.LogVerificationError:
            same = False
        if not same:
            raise _not_ours()
        return _edge(s, leaves)

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
        read = Edge(stated.size, _stored_hashes(s, sorted(set(places)))[1]).read
        try:
            inclusion = merkle.inclusion_proof(index, stated.size, read)
            merkle.verify_inclusion(read(0, index), index, stated.size, inclusion, stated.root)
        except merkle.LogVerificationError as error:
            raise _not_ours() from error
        return Proof(tuple(inclusion), self.sign(stated.size, stated.root))

    def prefix(self, s: Session, leaves: int | None = None) -> Checkpoint:
        """What is said of the log as this transaction leaves it, or of its first `leaves` entries.

        The stored hashes of a part are shown to lead to the whole tree that this guard knows (RFC 6962 section 2.1.2).
        Raises StorageError where they don't. The log is this transaction's alone from here on.
        """
        edge = self.end(s)
        whole = self._checkpoint(edge.size, edge.read)
        if leaves is None or leaves == edge.size:
            return whole
        try:
            read = reader(s)
            first = merkle.root(leaves, read)
            proof = merkle.consistency_proof(leaves, whole.size, read)
            merkle.verify_consistency(leaves, whole.size, first, whole.root, proof)
        except merkle.LogVerificationError as error:
            raise _not_ours() from error
        return Checkpoint(self.origin, leaves, first)

    def sign(self, leaves: int, root: bytes) -> str:
        """A signed note over a tree of so many leaves, which the caller has hashed: never what the database says.

        Whoever has this signature can make the leaves under that root pass for the guard's own.
        """
        return sign_checkpoint(Checkpoint(self.origin, leaves, root), self._key)

    def _checkpoint(self, leaves: int, read: merkle.Read) -> Checkpoint:
        return Checkpoint(self.origin, leaves, merkle.root(leaves, read))


@dataclass(frozen=True)
class Edge:
    """The right edge of a log of `size` leaves: the hashes of the complete subtrees that its root is made of."""

    size: int
    hashes: Mapping[tuple[int, int], bytes]

    def read(self, level: int, index: int) -> bytes:
        return _present(self.hashes.get((level, index)), level, index)

    def grown(self, gained: Sequence[tuple[int, int, bytes]]) -> Edge:
        """The edge with one leaf more, from the subtree hashes that the leaf added."""
        known = {**self.hashes, **{(level, index): found for level, index, found in gained}}
        return Edge(self.size + 1, {place: known[place] for place in merkle.edge(self.size + 1)})


@dataclass(frozen=True)
class _Head:
    """The end of the log as this guard has written it: its edge, and the hashes in its last row."""

    edge: Edge
    hashes: bytes


def coarse(seconds: float) -> int:
    """A time as leaves hold it: whole minutes, in Unix seconds."""
    return int(seconds) // COARSE_SECONDS * COARSE_SECONDS


def size(s: Session) -> int:
    """The number of leaves that the transaction sees."""
    last = _LAST.run(s)[0][0]
    return 0 if last is None else int(last) + 1


def _not_ours() -> StorageError:
    return StorageError(
        "The audit log isn't the one that this cloister wrote.",
        why="Entries that were committed are gone or changed, as when an old copy of the database is put back.",
        next_step="Stop the cloister, and let the admin compare the log with its last checkpoint.",
    )


def _edge(s: Session, leaves: int) -> Edge:
    return Edge(leaves, _stored_hashes(s, merkle.edge(leaves))[1])


def _stored_hashes(s: Session, places: Sequence[tuple[int, int]]) -> tuple[int, dict[tuple[int, int], bytes]]:
    """(leaves, hashes): how many leaves are stored, and those of the subtree hashes at `places` that are."""
    if not places:
        return size(s), {}
    indexes = sorted({_finished_by(level, index) for level, index in places})
    rows = _rows(len(indexes)).run(s, {f"index{number}": index for number, index in enumerate(indexes)})
    stored = {index: hashes for index, hashes, _ in rows}
    found = {(level, index): _of_level(stored.get(_finished_by(level, index), b""), level) for level, index in places}
    last = rows[0][2] if rows else None
    return 0 if last is None else last + 1, {place: hashed for place, hashed in found.items() if hashed}


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
