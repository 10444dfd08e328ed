"""RFC 6962 trees against the certificate-transparency reference vectors, a naive tree, and corrupted proofs."""

from __future__ import annotations

import hashlib

import pymerkle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_budget import merkle
from cloister_budget.merkle import LogVerificationError

# The eight leaves and their roots of the certificate-transparency project's own tests.
LEAVES = [bytes.fromhex(leaf) for leaf in (
    "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"
)]  # fmt: skip
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


class Tree:
    """A tree kept in a dictionary, as the log keeps it in a table."""

    def __init__(self, leaves: int, salt: bytes = b"") -> None:
        self.nodes: dict[tuple[int, int], bytes] = {}
        self.hashes: list[bytes] = []
        self.growing = merkle.Growing()
        for index in range(leaves):
            self.add(salt + str(index).encode())

    def add(self, payload: bytes) -> None:
        hashed = merkle.leaf_hash(payload)
        for level, found in enumerate(self.growing.add(hashed)):
            place = level, len(self.hashes) >> level
            assert place not in self.nodes
            self.nodes[place] = found
        self.hashes.append(hashed)

    def read(self, level: int, index: int) -> bytes:
        return self.nodes[level, index]

    def root(self, size: int | None = None) -> bytes:
        return merkle.root(len(self.hashes) if size is None else size, self.read)


def naive(hashes: list[bytes]) -> bytes:
    """MTH as RFC 6962 section 2.1 writes it."""
    if not hashes:
        return hashlib.sha256(b"").digest()
    if len(hashes) == 1:
        return hashes[0]
    k = 1
    while 2 * k < len(hashes):
        k *= 2
    return hashlib.sha256(b"\x01" + naive(hashes[:k]) + naive(hashes[k:])).digest()


def test_roots_are_those_of_certificate_transparency() -> None:
    tree = Tree(0)
    assert tree.root() == merkle.EMPTY_ROOT == hashlib.sha256(b"").digest()
    for leaf, root in zip(LEAVES, ROOTS, strict=True):
        tree.add(leaf)
        assert tree.root().hex() == root


def test_incremental_roots_are_those_of_the_definition() -> None:
    tree = Tree(130)
    for size in range(131):
        assert tree.root(size) == naive(tree.hashes[:size])


def test_every_leaf_of_every_size_is_proved() -> None:
    tree = Tree(33)
    for size in range(1, 34):
        for index in range(size):
            proof = merkle.inclusion_proof(index, size, tree.read)
            assert merkle.verify_inclusion(tree.hashes[index], index, size, proof, tree.root(size)) == tree.root(size)


def test_every_prefix_of_every_size_is_proved() -> None:
    tree = Tree(33)
    for second in range(34):
        for first in range(second + 1):
            proof = merkle.consistency_proof(first, second, tree.read)
            merkle.verify_consistency(first, second, tree.root(first), tree.root(second), proof)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_changed_inclusion_proof_fails(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 40))
    index = data.draw(st.integers(0, size - 1))
    tree = Tree(size)
    proof = merkle.inclusion_proof(index, size, tree.read)
    change = data.draw(st.sampled_from(["part", "drop", "extra", "leaf", "index", "size", "length"]))
    leaf, at, of = tree.hashes[index], index, size
    if change == "part":
        proof[data.draw(st.integers(0, len(proof) - 1))] = b"x" * 32
    elif change == "drop":
        proof.pop()
    elif change == "extra":
        proof.append(b"x" * 32)
    elif change == "leaf":
        leaf = merkle.leaf_hash(b"another")
    elif change == "index":
        at = data.draw(st.integers(-1, size).filter(lambda other: other != index))
    elif change == "size":
        of = data.draw(st.sampled_from([0, index, 4 * size]))
    else:
        proof[0] = proof[0][:31]
    with pytest.raises(LogVerificationError):
        merkle.verify_inclusion(leaf, at, of, proof, tree.root())


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_forked_log_has_no_consistency_proof(data: st.DataObject) -> None:
    second = data.draw(st.integers(2, 40))
    first = data.draw(st.integers(1, second))
    honest, forked = Tree(second), Tree(second, b"other")
    proof = merkle.consistency_proof(first, second, honest.read)
    with pytest.raises(LogVerificationError):
        merkle.verify_consistency(first, second, forked.root(first), honest.root(), proof)
    with pytest.raises(LogVerificationError):
        merkle.verify_consistency(first, second, honest.root(first), forked.root(), proof)
    with pytest.raises(LogVerificationError):
        merkle.verify_consistency(first, second, honest.root(first), honest.root(), [*proof, b"x" * 32])
    if proof:
        with pytest.raises(LogVerificationError):
            merkle.verify_consistency(first, second, honest.root(first), honest.root(), proof[:-1])
    with pytest.raises(LogVerificationError):
        merkle.verify_consistency(second, first - 1, honest.root(), honest.root(first - 1), proof)
    with pytest.raises(LogVerificationError):
        merkle.verify_consistency(0, second, honest.root(first), honest.root(), [])


def test_proofs_outside_the_tree_are_not_made() -> None:
    tree = Tree(4)
    for index, size in [(4, 4), (-1, 4)]:
        with pytest.raises(ValueError, match="leaf"):
            merkle.inclusion_proof(index, size, tree.read)
    with pytest.raises(ValueError, match="smaller"):
        merkle.consistency_proof(4, 3, tree.read)


def test_an_independent_implementation_finds_the_same_heads_and_proofs() -> None:
    """pymerkle cuts a consistency proof into other pieces, so each side verifies its own proof against the other's
    heads; inclusion proofs consist of the same hashes."""
    theirs, ours = pymerkle.InmemoryTree(algorithm="sha256"), Tree(0)
    for number in range(70):
        theirs.append_entry(b"%d" % number)
        ours.add(b"%d" % number)
    for size in range(1, 71):
        root = theirs.get_root(size)
        assert root == ours.root(size)
        for index in range(0, size, 5):
            proof, leaf = theirs.prove_inclusion(index + 1, size), ours.hashes[index]
            path = merkle.inclusion_proof(index, size, ours.read)
            assert sorted(proof.path) == sorted([leaf, *path])
            pymerkle.verify_inclusion(leaf, ours.root(size), proof, index=index + 1, size=size)
            merkle.verify_inclusion(leaf, index, size, path, root)
        for first in range(1, size, 7):
            pymerkle.verify_consistency(ours.root(first), ours.root(size), theirs.prove_consistency(first, size))
            path = merkle.consistency_proof(first, size, ours.read)
            merkle.verify_consistency(first, size, theirs.get_root(first), root, path)
            if path:
                with pytest.raises(LogVerificationError):
                    merkle.verify_consistency(first, size, theirs.get_root(first), root, [*path[:-1], bytes(32)])
