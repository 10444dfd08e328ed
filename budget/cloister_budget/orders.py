"""The Renyi orders that a population's accounts are kept in, frozen when the population is first seen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal, localcontext

from cloister_data.policy import Limit

FINITE_ORDERS: tuple[str, ...] = ("1.5", "2", "2.5", "3", "4", "5", "6", "8", "12", "16", "24", "32", "64", "128")
"""Fourteen orders from the one that suits epsilon 50 to the one that suits epsilon 0.2, at delta 1e-5."""

SHARE_UNIT = 10**9
"""Shares of delta are integers in this unit."""

DIRECT_SHARE = SHARE_UNIT // 100
"""Kept back for direct deltas: the sum over the orders and this is delta."""

DIRECT_UNIT = 10**18
"""Direct deltas are integers; this many are the probability 1."""

_CENTRE_SHARE = SHARE_UNIT // 2

PRECISION = 80
"""Decimal digits of every computation whose result is rounded to the ledger's unit."""


@dataclass(frozen=True)
class Orders:
    """Finite Renyi orders (> 1, ascending) and each one's share of delta; the order infinity always comes last.

    A vector over these orders has `len(orders)` = `len(finite) + 1` entries. Infinity has no share of delta: it is
    pure differential privacy. Shares are integers in `SHARE_UNIT`, and sum to at most `SHARE_UNIT - DIRECT_SHARE`.
    """

    finite: tuple[str, ...]
    shares: tuple[int, ...]

    def __post_init__(self) -> None:
        values = [Decimal(order) for order in self.finite]
        if not values or any(not value.is_finite() or value <= 1 for value in values) or values != sorted(set(values)):
            raise ValueError("Renyi orders must be finite, above 1, and ascending")
        if len(self.shares) != len(values) or any(share <= 0 for share in self.shares):
            raise ValueError("each order needs a positive share of delta")
        if sum(self.shares) > SHARE_UNIT - DIRECT_SHARE:
            raise ValueError("the shares of delta sum to more than delta")

    def __len__(self) -> int:
        return len(self.finite) + 1

    @property
    def values(self) -> tuple[Decimal, ...]:
        """The finite orders as numbers."""
        return tuple(Decimal(order) for order in self.finite)

    def deltas(self, delta: float) -> tuple[Decimal, ...]:
        """delta_k of each finite order for an account whose limit has this delta."""
        with localcontext(prec=PRECISION):
            return tuple(Decimal(repr(delta)) * share / SHARE_UNIT for share in self.shares)


def best_order(limit: Limit) -> float:
    """The order that converts Gaussian-like loss to (epsilon, delta) best: 1 + sqrt(ln(1/delta) / rho).

    rho is the zCDP that the limit allows: rho + 2 sqrt(rho ln(1/delta)) = epsilon (Bun and Steinke 2016, Prop. 1.3).
    """
    log = math.log(1 / limit.delta)
    root_rho = math.sqrt(log + limit.epsilon) - math.sqrt(log)
    return 1 + math.sqrt(log) / root_rho


def freeze(limit: Limit) -> Orders:
    """The orders of a population with this first limit: half of delta goes to the best order, the rest is spread."""
    best = best_order(limit)
    centre = min(FINITE_ORDERS, key=lambda order: abs(float(order) - best))
    rest = (SHARE_UNIT - DIRECT_SHARE - _CENTRE_SHARE) // (len(FINITE_ORDERS) - 1)
    return Orders(FINITE_ORDERS, tuple(_CENTRE_SHARE if order == centre else rest for order in FINITE_ORDERS))
