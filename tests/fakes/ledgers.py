"""Policies, reservations and a hand-moved clock for tests of the ledger."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from cloister_budget.ledger import Ledger, Reservation
from cloister_budget.loss import tight_epsilon
from cloister_data.mechanism import Composition, DiscreteLaplace, DpSgd
from cloister_data.policy import Limit, Policy

POPULATION = "hospital-a/patients"
_numbers = itertools.count(1)


class HandClock:
    """Unix seconds that only a test moves."""

    def __init__(self, now: int = 1_800_000_000) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def policy(population: float = 1.0, delta: float = 1e-5, **users: float) -> Policy:
    limits = {user: Limit(epsilon=epsilon, delta=delta) for user, epsilon in (users or {"alice": population}).items()}
    return Policy(
        dataset="hospital-a/records",
        version=1,
        population_limit=Limit(epsilon=population, delta=delta),
        users=limits,
        groups={},
        suspended=False,
        suspended_users=(),
        release_delta=1e-6,
        epsilon_cap=10,
        operations=("count", "sum", "mean", "train", "evaluate"),
        platforms=("simulated",),
        minimum_sandbox="none",
        transfers="allowed",
        expires=None,
    )


def laplace(epsilon: str) -> DiscreteLaplace:
    """A statistic of this pure epsilon, which must be 1/n."""
    scale = 1 / float(epsilon)
    return DiscreteLaplace(sensitivity=1, scale=round(scale))


def training(steps: int = 100, sigma: float = 3.0, rate: float = 0.1) -> DpSgd:
    return DpSgd(noise_multiplier=sigma, sample_rate=rate, steps=steps)


def request_id() -> str:
    return f"{next(_numbers):032x}"


def reservation(
    accounts: Sequence[str],
    mechanism: DiscreteLaplace | DpSgd | Composition,
    *,
    user: str = "alice",
    request: str | None = None,
    digest: str = "0" * 64,
    epsilon: float | None = None,
) -> Reservation:
    return Reservation(
        user=user,
        request_id=request or request_id(),
        request_digest=digest,
        kind="train" if isinstance(mechanism, DpSgd) else "statistic",
        mechanism=mechanism,
        epsilon=tight_epsilon(mechanism, 1e-6) if epsilon is None else epsilon,
        delta=1e-6,
        adjacency="zero-out",
        sources_json="[]",
        accounts=tuple(accounts),
    )


def ready(database: Any, population: float = 1.0, **users: float) -> Ledger:
    """A ledger whose population has these limits."""
    ledger = Ledger(HandClock())
    with database.write() as s:
        ledger.set_limits(s, POPULATION, policy(population, **users))
    return ledger
