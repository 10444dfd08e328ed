"""The privacy filter, in integers: may one more charge be admitted, whatever was chosen before and why?

A charge is admitted iff at SOME order the sum of all charges stays within that order's budget, and the sum of all
direct deltas within the budget for these. docs/privacy-filter.md
proves that everything ever executed is then (epsilon, delta)-differentially private.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_FLOOR, Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from operator import le

from cloister_budget.loss import UNIT, Vector
from cloister_budget.orders import DIRECT_SHARE, DIRECT_UNIT, PRECISION, SHARE_UNIT, Orders
from cloister_data.policy import Limit

_GUARD = Decimal(10) ** -40


@lru_cache(maxsize=1024)
def limit_budgets(limit: Limit, orders: Orders) -> Vector:
    """B_k: the largest Renyi divergence at order k that still converts to (epsilon, delta_k), rounded DOWN.

    Conversion: Canonne, Kamath and Steinke 2020, Proposition 12. At infinity it is epsilon itself. 0 marks an order
    that can never admit anything under this limit. Epsilon is read as the shortest decimal that the owner signed.
    """
    with localcontext(prec=PRECISION):
        epsilon = Decimal(repr(limit.epsilon))
        budgets = [
            epsilon + (delta.ln() + order.ln()) / (order - 1) - (1 - 1 / order).ln() - _GUARD
            for order, delta in zip(orders.values, orders.deltas(limit.delta), strict=True)
        ]
        return tuple(max(0, int((budget * UNIT).to_integral_value(ROUND_FLOOR))) for budget in (*budgets, epsilon))


def admits(budgets: Vector, spent: Sequence[int], reserved: Sequence[int], charge: Sequence[int]) -> bool:
    """Whether some order has room for `charge` on top of what was executed and what running requests hold."""
    fits = [
        budget > 0 and done + held + asked <= budget
        for budget, done, held, asked in zip(budgets, spent, reserved, charge, strict=True)
    ]
    return any(fits)


def ceilings(budgets: Vector) -> Vector:
    """What the sums of an account may reach at each order, for `within`: below 0 where an order never admits."""
    return tuple(budget if budget > 0 else -1 for budget in budgets)


def within(highest: Vector, sums: Vector) -> bool:
    """As `admits`, of `ceilings` and of sums that hold the charge already; fast, for whole logs."""
    return any(map(le, sums, highest))


def direct_budget(limit: Limit) -> int:
    """What direct deltas may sum to under this limit, in `DIRECT_UNIT`, rounded DOWN: the rest of delta."""
    return math.floor(Fraction(repr(limit.delta)) * DIRECT_SHARE / SHARE_UNIT * DIRECT_UNIT)


def admits_direct(budget: int, spent: int, reserved: int, charge: int) -> bool:
    """Whether the direct deltas still fit. A charge without one always does, also above a budget that was lowered."""
    return charge == 0 or spent + reserved + charge <= budget


def room(budgets: Vector, spent: Sequence[int], reserved: Sequence[int]) -> Vector:
    """What each order would still take; 0 where it takes nothing."""
    return tuple(max(0, budget - done - held) for budget, done, held in zip(budgets, spent, reserved, strict=True))


def used_share(budgets: Vector, spent: Sequence[int]) -> Fraction:
    """The share of the limit that is consumed: min over the orders of S_k/B_k, exact, at most 1.

    It is 1 exactly when no order has any room left.
    """
    shares = [Fraction(done, budget) for budget, done in zip(budgets, spent, strict=True) if budget > 0]
    return min(shares, default=Fraction(1)) if shares and min(shares) < 1 else Fraction(1)


def share_up(share: Fraction) -> float:
    """A share as a float in [0, 1], rounded up."""
    nearest = float(share)
    return nearest if Fraction(nearest) >= share else math.nextafter(nearest, math.inf)
