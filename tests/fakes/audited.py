"""The leaves of one published dataset and of its charges, as a guard writes them, for tests without a guard."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.orm import Session

from cloister_budget.entries import (
    AccountLimit,
    ChargedSource,
    ChargeReserved,
    GuardStarted,
    LimitsSet,
    PolicySet,
    PopulationLoss,
    PopulationOpened,
    Uploaded,
    in_leaves,
)
from cloister_budget.journal import Journal
from cloister_budget.ledger import Reservation, Reserved
from cloister_budget.limits import limits_of
from cloister_budget.replay import Start
from cloister_budget.tables import Population
from cloister_data.policy import Policy

SOME = "0" * 64
"""A digest that nobody looks at."""


@dataclass(frozen=True)
class Published:
    """`policy` is the digest of the one in force, which a guard keeps."""

    population: str
    dataset: str
    policy: str


def begin(s: Session, journal: Journal) -> None:
    """The leaf of a guard's start."""
    start = GuardStarted(
        evidence=SOME, platform="simulated", log_key=journal.log.public_key.hex(),
        previous_key=journal.last_key(s), certificate=SOME,
    )  # fmt: skip
    journal.append(s, start)


def believe(s: Session, start: Start) -> None:
    """Vouches for every start: for tests of what doesn't depend on the machine."""


def publish(s: Session, journal: Journal, population: str, policy: Policy) -> Published:
    """A start, and a dataset whose limits are in force in the ledger already."""
    row = s.get_one(Population, population)
    dataset, people = journal.ref(s, "dataset", policy.dataset), journal.ref(s, "population", population)
    begin(s, journal)
    opened = PopulationOpened(
        population=people, owner=journal.ref(s, "user", "owner"), owner_key=SOME, orders=row.orders, shares=row.deltas,
        parts=1, statement=None,
    )  # fmt: skip
    uploaded = Uploaded(
        dataset=dataset, version=1, population=people, data_schema=SOME, units=1, owner_key=SOME, keys="file"
    )
    limits = [
        AccountLimit(
            account=journal.ref(s, "account", each.account), scope=each.scope, part=0, limit=each.limit,
            members=tuple(journal.ref(s, "user", user) for user in each.users),
        )
        for each in limits_of(population, policy)
    ]  # fmt: skip
    pieces = list(in_leaves(limits))
    put = PolicySet(dataset=dataset, version=1, policy=policy.digest(), owner_key=SOME, limits=len(pieces))
    for entry in (opened, uploaded, put):
        journal.append(s, entry)
    for piece in pieces:
        journal.append(s, LimitsSet(dataset=dataset, version=1, limits=piece))
    return Published(population, policy.dataset, policy.digest())


def reserved_leaf(
    s: Session, journal: Journal, published: Published, wanted: Reservation, reserved: Reserved
) -> ChargeReserved:
    """The leaf of a statistic that the ledger has just reserved."""
    source = ChargedSource(
        dataset=journal.ref(s, "dataset", published.dataset), version=1, data_schema=SOME, policy_version=1,
        policy=published.policy, part=None,
    )  # fmt: skip
    accounts = tuple(journal.ref(s, "account", account) for account in reserved.losses)
    loss = PopulationLoss(
        population=journal.ref(s, "population", published.population),
        loss=next(iter(reserved.losses.values())),
        accounts=accounts,
    )
    return ChargeReserved(
        charge=reserved.charge_id, user=journal.ref(s, "user", wanted.user), operation="count",
        request=wanted.request_digest, sandbox=None, sources=(source,), mechanism=wanted.mechanism,
        epsilon=wanted.epsilon, delta=wanted.delta, losses=(loss,), direct=reserved.direct, steps=None,
    )  # fmt: skip
