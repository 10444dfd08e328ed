"""The privacy loss of each mechanism: a Renyi vector and a direct delta for the ledger, a tight epsilon for people.

Adjacency is zero-out: neighbours replace one unit's data by a null that is still sampled, and the number of units is
public. For a sum, zeroing a unit changes it by the unit's contribution, so DP-SGD has the loss of the sampled Gaussian
mechanism under add/remove (dp-accounting's `REPLACE_SPECIAL` is the same relation), of which the direction computed
here is the larger one (Mironov, Talwar and Zhang 2019, Theorem 5).

Renyi losses are computed in decimal arithmetic, so every machine gets the same integers.
"""

from __future__ import annotations

import math
from decimal import (
    ROUND_CEILING,
    Context,
    Decimal,
    DivisionByZero,
    InvalidOperation,
    Overflow,
    localcontext,
)
from fractions import Fraction
from functools import lru_cache

from cloister_budget import renyi
from cloister_budget.orders import DIRECT_UNIT, PRECISION, Orders
from cloister_data.mechanism import (
    Composition,
    DiscreteGaussian,
    DiscreteLaplace,
    DpSgd,
    Exponential,
    Gaussian,
    Laplace,
    Mechanism,
    ReportNoisyMax,
    Single,
    ThresholdedHistogram,
)

UNIT = 10**12
"""Losses and budgets are integers; this many are a Renyi divergence of 1."""

INFINITE = 10**24
"""An unbounded loss, and what larger ones saturate to. No limit comes near it (the largest is 1000 x UNIT)."""

_HUGE = Decimal(INFINITE) / UNIT
GRID_POINTS = 20_000

_GUARD = Decimal(10) ** -40
"""More than the rounding of any computation here at `PRECISION` digits, relative to results below `_HUGE`."""

Vector = tuple[int, ...]
Losses = tuple[Decimal, ...]


def _context() -> Context:
    return Context(prec=PRECISION, Emin=-(10**17), Emax=10**17, traps=[InvalidOperation, DivisionByZero, Overflow])


def to_unit(loss: Decimal) -> int:
    """A loss in the ledger's unit, rounded UP, saturating at INFINITE."""
    return INFINITE if loss >= _HUGE else int((loss * UNIT).to_integral_value(ROUND_CEILING))


def rdp_vector(mechanism: Mechanism, orders: Orders) -> Vector:
    """The Renyi divergence of `mechanism` at each finite order and at infinity, in `UNIT`, rounded up, saturating.

    A composition loses the sum of what its parts lose (Mironov 2017, Proposition 1); it is rounded once. What a
    mechanism loses with its direct delta is beside this: see `direct_delta`.
    """
    parts = parts_of(mechanism)
    losses = [losses_of(part, orders.finite) for part in parts]
    with localcontext(_context()) as context:
        context.rounding = ROUND_CEILING
        finite = [to_unit(sum(column, Decimal(0))) for column in zip(*losses, strict=True)]
    pure = pure_loss(parts)
    return (*finite, INFINITE if pure is None else min(INFINITE, math.ceil(pure * UNIT)))


def parts_of(mechanism: Mechanism) -> tuple[Single, ...]:
    return mechanism.parts if isinstance(mechanism, Composition) else (mechanism,)


def pure_loss(parts: tuple[Single, ...]) -> Fraction | None:
    """The divergence of all of them at infinity, exactly; None where it is unbounded."""
    total = Fraction(0)
    for part in parts:
        pure = renyi.pure(part)
        if pure is None:
            return None
        total += pure
    return total


@lru_cache(maxsize=2048)
def losses_of(mechanism: Single, finite: tuple[str, ...]) -> Losses:
    """Upper bounds of the divergence at each finite order."""
    with localcontext(_context()) as context:
        context.rounding = ROUND_CEILING
        losses = tuple(_loss(mechanism, Decimal(order)) + _GUARD for order in finite)
        pure = renyi.pure(mechanism)
        if pure is None:
            return losses
        # No order's divergence is above that of infinity.
        most = Decimal(pure.numerator) / Decimal(pure.denominator)
        return tuple(min(most, loss) for loss in losses)


def _loss(mechanism: Single, order: Decimal) -> Decimal:
    match mechanism:
        case Laplace(sensitivity=sensitivity, scale=scale):
            return renyi.laplace(Decimal(sensitivity), Decimal(scale), order)
        case DiscreteLaplace(sensitivity=steps, scale=scale):
            return renyi.discrete_laplace(steps, Decimal(scale), order)
        case Gaussian(sensitivity=sensitivity, sigma=sigma) | DiscreteGaussian(sensitivity=sensitivity, sigma=sigma):
            return renyi.gaussian(Decimal(sensitivity), Decimal(sigma), order)
        case Exponential(epsilon=epsilon):
            return renyi.bounded_range(Decimal(repr(epsilon)), order)
        case ReportNoisyMax(epsilon=epsilon):
            return renyi.randomised_response(Decimal(repr(epsilon)), order)
        case ThresholdedHistogram(bins=bins, scale=scale):
            return bins * renyi.discrete_laplace(1, Decimal(scale), order)
        case DpSgd(noise_multiplier=sigma, sample_rate=rate, steps=steps):
            return steps * renyi.sampled_gaussian(Decimal(sigma), Decimal(rate), order)


def direct_delta(mechanism: Mechanism) -> int:
    """The probability with which the mechanism's Renyi loss doesn't hold, in `DIRECT_UNIT`, rounded up, at most 1.

    A thresholded histogram: discrete Laplace noise m = threshold - 1 or more has the probability r^m / (1 + r),
    r = exp(-1/scale), and one unit may be alone in each of its bins.
    """
    total = 0
    for part in parts_of(mechanism):
        if isinstance(part, ThresholdedHistogram):
            with localcontext(_context()) as context:
                context.rounding = ROUND_CEILING
                scale = Decimal(part.scale)
                if (part.threshold - 1) / scale > 10**6:
                    # Below exp(-1e6): one unit is more.
                    total += 1
                    continue
                shown = (-(part.threshold - 1) / scale).exp() / (1 + (-1 / scale).exp())
                total += int((part.bins * shown * DIRECT_UNIT).to_integral_value(ROUND_CEILING)) + 1
    return min(total, DIRECT_UNIT)


def part_of(vector: Vector, steps: int, total: int) -> Vector:
    """The loss of `steps` of the `total` equal steps whose loss is `vector`, rounded up.

    It is never below the true loss of `steps` steps, because `vector` is never below the true loss of all of them.
    """
    if not 0 <= steps <= total or total < 1:
        raise ValueError("a part of a run has between 0 and all of its steps")
    if steps == 0:
        return (0,) * len(vector)
    return tuple(INFINITE if loss >= INFINITE else -(-loss * steps // total) for loss in vector)


def _float_up(value: Fraction) -> float:
    """The float whose shortest decimal, which is what people and JSON get to see, is not below `value`."""
    nearest = float(value)
    return nearest if Fraction(repr(nearest)) >= value else math.nextafter(nearest, math.inf)


def tight_epsilon(mechanism: Mechanism, delta: float, points: int = GRID_POINTS) -> float:
    """The mechanism's own epsilon at `delta`, never below the truth; infinity where there is none.

    Where every part is pure it is their sum, stated at delta 0 apart from the direct delta, whatever delta is. Else it
    is the smaller of the Renyi bound, of the pure parts' sum with the others' loss distribution, and of the loss
    distribution of all (`distribution`), at what the direct delta leaves of delta. `points` is about the size of the
    loss distribution's grid: fewer are faster, and only make the answer larger.

    Needs dp-accounting unless all parts are pure. Raises ValueError where delta is not in (0, 1).
    """
    if not 0 < delta < 1:
        raise ValueError("delta must lie between 0 and 1")
    direct = direct_delta(mechanism)
    left = delta
    if direct:
        remains = Fraction(repr(delta)) - Fraction(direct, DIRECT_UNIT)
        if remains < 0:
            return math.inf
        left = math.nextafter(float(remains), 0)
    parts = parts_of(mechanism)
    pure = pure_loss(parts)
    if pure is not None:
        return _float_up(pure)
    from cloister_budget.distribution import distribution_epsilon

    if left <= 0:
        return math.inf
    bound = rdp_epsilon(parts, left)
    bound = min(bound, distribution_epsilon(parts, left, points, bound))
    rest = tuple(part for part in parts if pure_loss((part,)) is None)
    if len(rest) < len(parts):
        certain = _float_up(pure_loss(tuple(part for part in parts if part not in rest)) or Fraction(0))
        least = rdp_epsilon(rest, left)
        apart = certain + min(least, distribution_epsilon(rest, left, points, least))
        bound = min(bound, math.nextafter(apart, math.inf))
    return bound


_RDP_ORDERS = tuple(str(order) for order in (*range(2, 33), 40, 48, 64, 96, 128, 192, 256, 512))


def rdp_epsilon(parts: tuple[Single, ...], delta: float) -> float:
    """Epsilon at delta of these mechanisms together by Renyi accounting; infinity where unbounded.

    Conversion: Canonne, Kamath and Steinke 2020, Proposition 12, the best of many orders.
    """
    best = math.inf
    losses = [losses_of(part, _RDP_ORDERS) for part in parts]
    for position, name in enumerate(_RDP_ORDERS):
        order, loss = int(name), float(sum(column[position] for column in losses))
        if math.isfinite(loss):
            epsilon = loss + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
            best = min(best, max(epsilon, 0.0))
    return best * (1 + 1e-12)
