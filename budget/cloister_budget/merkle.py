"""RFC 6962 Merkle trees: hashing, incremental append, inclusion and consistency proofs. Pure.

A tree is read through `Read`: the hash of the complete subtree of 2^level leaves that is the index-th of its level.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

from cloister_data.errors import CloisterError

Read = Callable[[int, int], bytes]

HASH_BYTES = 32
EMPTY_ROOT = hashlib.sha256(b"").digest()


class LogVerificationError(CloisterError):
    """A log, a proof or a checkpoint doesn't hold."""

    code: ClassVar[str] = "log-verification-failed"


def leaf_hash(payload: bytes) -> bytes:
    """RFC 6962 section 2.1: SHA-256(0x00 || payload)."""
    return hashlib.sha256(b"\x00" + payload).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """RFC 6962 section 2.1: SHA-256(0x01 || left || right)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def edge(size: int) -> list[tuple[int, int]]:
    """The complete subtrees (level, index) that make up a tree of `size` leaves: what its root and growth need."""
    return [(level, (size >> level) - 1) for level in range(size.bit_length()) if size >> level & 1]


def _range_root(start: int, end: int, read: Read) -> bytes:
    """MTH(D[start:end]) where start is a multiple of the largest power of two that the range can hold."""
    count = end - start
    if count & (count - 1) == 0:
        level = count.bit_length() - 1
        return read(level, start >> level)
    split = _split(count)
    return node_hash(_range_root(start, start + split, read), _range_root(start + split, end, read))


def _split(count: int) -> int:
    """The largest power of two below `count` (RFC 6962's k)."""
    return 1 << ((count - 1).bit_length() - 1)


def root(size: int, read: Read) -> bytes:
    """The tree head of the first `size` leaves, 32 bytes."""
    return EMPTY_ROOT if size == 0 else _range_root(0, size, read)


def inclusion_proof(index: int, size: int, read: Read) -> list[bytes]:
    """PATH(index, D[size]) of RFC 6962 section 2.1.1."""
    if not 0 <= index < size:
        raise ValueError("the leaf is not in a tree of that size")
    proof: list[bytes] = []
    start, end = 0, size
    while end - start > 1:
        split = start + _split(end - start)
        if index < split:
            proof.append(_range_root(split, end, read))
            end = split
        else:
            proof.append(_range_root(start, split, read))
            start = split
    return proof[::-1]


def consistency_proof(first: int, second: int, read: Read) -> list[bytes]:
    """PROOF(first, D[second]) of RFC 6962 section 2.1.2; empty where either is trivially a prefix."""
    if not 0 <= first <= second:
        raise ValueError("the first tree must be the smaller one")
    if first in (0, second):
        return []
    proof: list[bytes] = []
    start, end, whole = 0, second, True
    while end - start != first - start:
        split = start + _split(end - start)
        if first <= split:
            proof.append(_range_root(split, end, read))
            end = split
        else:
            proof.append(_range_root(start, split, read))
            start, whole = split, False
    if not whole:
        proof.append(_range_root(start, end, read))
    return proof[::-1]


class Growing:
    """A tree that grows leaf by leaf and keeps nothing but its right edge.

    `edge` are the hashes of the complete subtrees that make it up, largest first; their levels are the bits of `size`.
    """

    __slots__ = ("edge", "size")

    def __init__(self, size: int = 0, edge: Iterable[bytes] = ()) -> None:
        self.size, self.edge = size, list(edge)

    def copy(self) -> Growing:
        return Growing(self.size, self.edge)

    def add(self, leaf: bytes) -> list[bytes]:
        """Append a leaf's hash. Answers those of the complete subtrees that it finishes: of 1 leaf, 2, 4 and so on."""
        finished, edge, size = [leaf], self.edge, self.size
        while size & 1:
            leaf = node_hash(edge.pop(), leaf)
            finished.append(leaf)
            size >>= 1
        edge.append(leaf)
        self.size += 1
        return finished

    def root(self) -> bytes:
        """The tree head of what was added, 32 bytes."""
        if not self.edge:
            return EMPTY_ROOT
        found = self.edge[-1]
        for left in self.edge[-2::-1]:
            found = node_hash(left, found)
        return found


def root_of_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes]) -> bytes:
    """The root that the proof leads to (RFC 9162 section 2.1.3.2). Raises LogVerificationError where it has no form."""
    if not 0 <= index < size or any(len(part) != HASH_BYTES for part in proof):
        raise LogVerificationError("The inclusion proof can't be read.")
    position, last, found = index, size - 1, leaf
    for part in proof:
        if last == 0:
            raise LogVerificationError("The inclusion proof is too long.")
        if position & 1 or position == last:
            found = node_hash(part, found)
            while not position & 1 and position:
                position, last = position >> 1, last >> 1
        else:
            found = node_hash(found, part)
        position, last = position >> 1, last >> 1
    if last:
        raise LogVerificationError("The inclusion proof is too short.")
    return found


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], expected_root: bytes) -> bytes:
    """The root, once it is shown that the leaf hash is the index-th of the tree. Raises LogVerificationError."""
    found = root_of_inclusion(leaf, index, size, proof)
    if found != expected_root:
        raise LogVerificationError("The leaf isn't in the log.", why="Its inclusion proof leads to another root.")
    return found


def verify_consistency(first: int, second: int, first_root: bytes, second_root: bytes, proof: Sequence[bytes]) -> bytes:
    """The second root, once it is shown that the first tree is a prefix of the second (RFC 9162 section 2.1.4.2).

    Raises LogVerificationError.
    """
    forked = LogVerificationError("The log was changed.", why="The later log doesn't extend the earlier one.")
    if not 0 <= first <= second or any(len(part) != HASH_BYTES for part in proof):
        raise LogVerificationError("The consistency proof can't be read.")
    if first in (0, second):
        if proof or (first == second and first_root != second_root) or (first == 0 and first_root != EMPTY_ROOT):
            raise forked
        return second_root
    parts = list(proof)
    if first & (first - 1) == 0:
        parts.insert(0, first_root)
    if not parts:
        raise forked
    position, last = first - 1, second - 1
    while position & 1:
        position, last = position >> 1, last >> 1
    old = new = parts[0]
    for part in parts[1:]:
        if last == 0:
            raise forked
        if position & 1 or position == last:
            old, new = node_hash(part, old), node_hash(part, new)
            while not position & 1 and position:
                position, last = position >> 1, last >> 1
        else:
            new = node_hash(new, part)
        position, last = position >> 1, last >> 1
    if last or old != first_root or new != second_root:
        raise forked
    return second_root
