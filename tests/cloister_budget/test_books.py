"""The books: what follows from the leaves is kept, what doesn't is named."""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister_budget import merkle
from cloister_budget.books import Books, BooksError
from cloister_budget.database import Database
from cloister_budget.entries import (
    MAX_PAYLOAD_BYTES,
    MEMBERS_IN_A_LEAF,
    AccountLimit,
    ChargedSource,
    ChargeReserved,
    ChargeSettled,
    Entry,
    GuardStarted,
    LeafBody,
    LimitsSet,
    Login,
    PolicySet,
    PopulationLoss,
    PopulationOpened,
    Released,
    Uploaded,
    in_leaves,
)
from cloister_budget.journal import Journal
from cloister_budget.log import AuditLog
from cloister_budget.loss import part_of, rdp_vector
from cloister_budget.names import Names
from cloister_budget.orders import freeze
from cloister_budget.refs import ref_of
from cloister_budget.tables import Leaf, Name
from cloister_data.errors import StorageError
from cloister_data.mechanism import DiscreteLaplace, DpSgd, Mechanism
from cloister_data.policy import Limit
from tests.fakes.audited import believe
from tests.fakes.ledgers import HandClock

LIMIT = Limit(epsilon=1.0, delta=1e-5)
ORDERS = freeze(LIMIT)
FIFTH = DiscreteLaplace(sensitivity=1, scale=5)
TRAINING = DpSgd(noise_multiplier=20, sample_rate=0.1, steps=100)
OWNER_KEY = "ab" * 32


def ref(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def reserved(charge: int, mechanism: Mechanism = FIFTH, **changes: Any) -> ChargeReserved:
    source = ChargedSource(
        dataset=ref("d"), version=1, data_schema=ref("schema"), policy_version=1, policy=ref("policy"), part=None
    )
    loss = PopulationLoss(population=ref("p"), loss=rdp_vector(mechanism, ORDERS), accounts=(ref("all"), ref("ann's")))
    given = ChargeReserved(
        charge=f"{charge:032x}",
        user=ref("ann"),
        operation="count",
        request=ref("q"),
        sandbox=None,
        sources=(source,),
        mechanism=mechanism,
        epsilon=0.2,
        delta=1e-6,
        losses=(loss,),
        direct=0,
        steps=mechanism.steps if isinstance(mechanism, DpSgd) else None,
    )
    return given.model_copy(update=changes)


def loss(**changes: Any) -> PopulationLoss:
    return reserved(1).losses[0].model_copy(update=changes)


def limits(*given: AccountLimit) -> LimitsSet:
    both = (
        AccountLimit(account=ref("all"), scope="population", part=0, limit=LIMIT, members=()),
        AccountLimit(account=ref("ann's"), scope="user", part=0, limit=LIMIT, members=(ref("ann"),)),
    )
    return LimitsSet(dataset=ref("d"), version=1, limits=given or both)


def opened(population: str = "p", statement: str | None = None) -> PopulationOpened:
    return PopulationOpened(
        population=ref(population), owner=ref("owner"), owner_key=OWNER_KEY, orders=ORDERS.finite,
        shares=ORDERS.shares, parts=1, statement=statement,
    )  # fmt: skip


def policy(**changes: Any) -> PolicySet:
    given = PolicySet(dataset=ref("d"), version=1, policy=ref("policy"), owner_key=OWNER_KEY, limits=1)
    return given.model_copy(update=changes)


def uploaded(**changes: Any) -> Uploaded:
    given = Uploaded(
        dataset=ref("d"),
        version=1,
        population=ref("p"),
        data_schema=ref("schema"),
        units=10,
        owner_key=OWNER_KEY,
        keys="file",
    )
    return given.model_copy(update=changes)


def apply(books: Books, *entries: Entry) -> Books:
    for entry in entries:
        books.apply(LeafBody(index=books.size, at=1_800_000_000, facts=entry))
    return books


def published() -> Books:
    return apply(Books(), opened(), uploaded(), policy(), limits())


def test_balances_follow_from_the_leaves() -> None:
    books = apply(published(), reserved(1), reserved(2, TRAINING))
    whole, once = rdp_vector(TRAINING, ORDERS), rdp_vector(FIFTH, ORDERS)
    for account in (ref("all"), ref("ann's")):
        assert books.held[account].loss == tuple(a + b for a, b in zip(whole, once, strict=True))
    apply(books, Released(release="0" * 32, charge=f"{1:032x}", receipt=ref("r"), steps=None))
    apply(books, ChargeSettled(charge=f"{2:032x}", state="committed", steps=30))
    kept = part_of(whole, 30, 100)
    assert books.held[ref("all")].loss == tuple(a + b for a, b in zip(kept, once, strict=True))
    assert not books.open_charges
    # What is given back whole leaves no trace.
    before = books.held[ref("all")].loss
    apply(books, reserved(3), ChargeSettled(charge=f"{3:032x}", state="released", steps=None))
    assert books.held[ref("all")].loss == before


def test_a_draft_changes_nothing_until_it_is_taken() -> None:
    books = apply(published(), reserved(1))
    before = dict(books.accounts)
    draft = books.draft()
    apply(draft, ChargeSettled(charge=f"{1:032x}", state="released", steps=None), reserved(2))
    assert dict(books.accounts) == before
    assert list(books.open_charges) == [f"{1:032x}"]
    books.take(draft)
    assert list(books.open_charges) == [f"{2:032x}"]
    assert books.size == draft.size


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ([reserved(n) for n in range(1, 7)], "over the limit"),
        ([reserved(1), reserved(1)], "already"),
        ([reserved(1, user=ref("bob"))], "gives its user an account"),
        ([reserved(1, losses=(loss(accounts=(ref("ann's"),)),))], "every account"),
        ([reserved(1, losses=(loss(loss=(1,) * len(ORDERS)),))], "mechanism's"),
        ([reserved(1, direct=1)], "direct delta"),
        ([reserved(1, TRAINING, steps=99)], "steps aren't"),
        ([reserved(1, sources=(reserved(1).sources[0].model_copy(update={"policy": ref("x")}),))], "the one in force"),
        ([reserved(1, sources=(reserved(1).sources[0].model_copy(update={"version": 2}),))], "the one in force"),
        ([reserved(1), *[ChargeSettled(charge=f"{1:032x}", state="committed", steps=None)] * 2], "such"),
        ([reserved(1, TRAINING), ChargeSettled(charge=f"{1:032x}", state="committed", steps=101)], "More steps"),
        ([reserved(1, TRAINING), ChargeSettled(charge=f"{1:032x}", state="released", steps=5)], "given back"),
        ([reserved(1, TRAINING), Released(release="0" * 32, charge=f"{1:032x}", receipt=ref("r"), steps=9)], "not all"),
        ([uploaded()], "the next one is 2"),
        ([uploaded(version=2, owner_key="cd" * 32)], "another owner key"),
        ([policy(version=3)], "the next one is 2"),
        ([policy(version=2, owner_key="cd" * 32)], "another key"),
        ([policy(version=2), Login(user=ref("ann"))], "follow it at once"),
        ([limits()], "follow it at once"),
        ([opened("q")], "signed statement"),
        ([opened("p", ref("s"))], "there already"),
    ],
)  # fmt: skip
def test_a_leaf_that_does_not_follow_is_named(entries: list[Entry], why: str) -> None:
    books = apply(published(), *entries[:-1])
    last = books.size
    with pytest.raises(BooksError, match=why) as caught:
        apply(books, entries[-1])
    assert caught.value.leaf == last


def test_the_largest_policy_fits_its_leaves() -> None:
    """1000 users, and groups of 1000, which is what a policy may name."""
    widest = Limit(epsilon=999.9999999999999, delta=0.0012345678901234567, epsilon_cap=999.9999999999998, expires=2**53)
    members = tuple(ref(str(number)) for number in range(1000))

    def limit(name: str, bound: tuple[str, ...]) -> AccountLimit:
        return AccountLimit(account=ref(name), scope="group", part=63, limit=widest, members=bound)

    given = [limit(f"user {number}", (members[number],)) for number in range(1000)]
    for group in range(3):
        given += [
            limit(f"group {group}", members[at : at + MEMBERS_IN_A_LEAF]) for at in range(0, 1000, MEMBERS_IN_A_LEAF)
        ]
    pieces = list(in_leaves(given))
    assert [each for piece in pieces for each in piece] == given
    for piece in pieces:
        leaf = LimitsSet(dataset=ref("d"), version=1_000_000, limits=piece)
        assert len(LeafBody(index=2**62, at=2**53, facts=leaf).canonical()) <= MAX_PAYLOAD_BYTES


def test_keys_go_on_from_each_other() -> None:
    def start(key: str, previous: str | None) -> GuardStarted:
        return GuardStarted(
            evidence=ref("e"), platform="simulated", log_key=key, previous_key=previous, certificate=ref("c")
        )

    first, second = "11" * 32, "22" * 32
    books = apply(Books(), start(first, None), start(second, first))
    assert books.log_keys == (first, second)
    for wrong in (start("33" * 32, first), start("33" * 32, None), start(first, second)):
        with pytest.raises(BooksError):
            apply(books.draft(), wrong)


@pytest.mark.parametrize("leaves", [0, 1, 2, 3, 7, 8, 100, 257])
def test_a_growing_tree_has_the_root_of_the_stored_one(leaves: int) -> None:
    growing, stored = merkle.Growing(), dict[tuple[int, int], bytes]()
    for number in range(leaves):
        hashed = merkle.leaf_hash(str(number).encode())
        for level, found in enumerate(growing.add(hashed)):
            stored[level, number >> level] = found
    assert growing.root() == merkle.root(leaves, lambda level, place: stored[level, place])


def test_a_ref_is_one_names_and_can_be_forgotten(database: Database) -> None:
    names = Names()
    with database.write() as s:
        first = names.ref(s, "user", "ann")
        assert names.ref(s, "user", "ann") == first
        assert names.ref(s, "dataset", "ann") != first
    with database.write() as s:
        row = s.get_one(Name, first)
        assert ref_of("user", "ann", row.salt) == first
        s.delete(row)
    with database.read() as s:
        assert s.get(Name, first) is None


def test_a_ref_of_a_failed_transaction_is_not_remembered(database: Database) -> None:
    names, seen = Names(), []
    with contextlib.suppress(RuntimeError), database.write() as s:
        seen.extend(names.ref(s, "user", "ann") for _ in range(2))
        raise RuntimeError
    assert seen[0] == seen[1]
    with database.write() as s:
        assert names.ref(s, "user", "ann") != seen[0]


def test_leaves_of_another_guard_are_read_if_a_guard_signed_for_them(database: Database) -> None:
    clock = HandClock()
    one, two, nobody = (
        Journal(AuditLog(Ed25519PrivateKey.generate(), "books.example/log", clock), believe) for _ in range(3)
    )

    def start(journal: Journal) -> None:
        with database.write() as s:
            entry = GuardStarted(
                evidence=ref("e"), platform="simulated", log_key=journal.log.public_key.hex(),
                previous_key=journal.last_key(s), certificate=ref("c"),
            )  # fmt: skip
            journal.append(s, entry)

    start(one)
    start(two)
    for journal in (one, two, one):
        with database.write() as s:
            journal.append(s, Login(user=ref("ann")))
    # A leaf that one guard wrote is altered, with the hashes left, before the other has read it.
    with database.write() as s:
        index = one.append(s, Login(user=ref("ann"))).index
    with database.write() as s:
        written = s.get_one(Leaf, index)
        kept, written.payload = written.payload, written.payload.replace(ref("ann").encode(), ref("bob").encode())
    with pytest.raises(StorageError, match="make up its tree"), database.write() as s:
        Journal(two.log, believe).append(s, Login(user=ref("ann")))
    with database.write() as s:
        s.get_one(Leaf, index).payload = kept
    with database.write() as s:
        two.append(s, Login(user=ref("ann")))
    with database.write() as s:
        nobody.log.append(s, "login", Login(user=ref("ann")))
    # However often it is tried: what was refused once isn't believed the next time.
    for journal in (one, one, two, two):
        with pytest.raises(StorageError, match="signed for"), database.write() as s:
            journal.append(s, Login(user=ref("ann")))
        with pytest.raises(StorageError, match="signed for"), database.read() as s:
            journal.last_key(s)
