"""Epsilon at a delta by privacy loss distributions, from dp-accounting (Doroshenko et al. 2022), always pessimistic.

It serves the epsilon that is shown for ONE release. Composed over requests that were chosen adaptively it would be no
filter: the ledger never uses it.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from cloister_budget import renyi
from cloister_data.mechanism import DiscreteGaussian, DpSgd, Gaussian, Single

_BELOW = 100.0
"""Losses above this epsilon protect nobody; the Renyi bound is exact enough for them."""

_DELTA = 1e-11
"""Below it the loss distribution's own rounding (about 1e-15 a convolution) would show; the Renyi bound has none."""

_WIDEST_DISCRETE = 2_000.0
"""Discrete Gaussian noise wider than this has too many points; the Renyi bound, close for so many, is taken."""

_BLOCK = 1000


@lru_cache(maxsize=4096)
def distribution_epsilon(parts: tuple[Single, ...], delta: float, points: int, bound: float) -> float:
    """Epsilon of these mechanisms together at delta; infinity where no loss distribution is made for them.

    `bound` is an epsilon that holds for them: about `points` points of the grid lie below it. Pure mechanisms enter as
    randomised response of their epsilon, which dominates each (Kairouz, Oh and Viswanath 2015).
    """
    if bound > _BELOW or delta < _DELTA or any(_unsuited(part) for part in parts):
        return math.inf
    # A fine grid is exact but slow. It must tell apart the whole loss and one step's share of it, as far as one step's
    # range doesn't need too many points for that. A coarser one is only more pessimistic.
    widest = max(_loss_range(part) for part in parts)
    share = 20 * math.sqrt(sum(part.steps if isinstance(part, DpSgd) else 1 for part in parts))
    interval = min(max(bound / max(points, share), widest / (2 * points), 1e-8), 1e-3)
    composed: Any = None
    for part in parts:
        loss = _distribution(part, interval)
        if isinstance(part, DpSgd):
            loss = _self_compose(loss, part.steps)
        composed = loss if composed is None else composed.compose(loss)
    tight = float(composed.get_epsilon_for_delta(delta))
    return tight if math.isfinite(tight) else math.inf


def _unsuited(part: Single) -> bool:
    # Several integers moved at once are no single one moved further: the distribution of that is another.
    return isinstance(part, DiscreteGaussian) and (part.answers > 1 or part.sigma > _WIDEST_DISCRETE)


def _distribution(part: Single, interval: float) -> Any:
    """The loss distribution of one step of `part`."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import common, privacy_loss_distribution

    if isinstance(part, DpSgd):
        return privacy_loss_distribution.from_gaussian_mechanism(
            standard_deviation=part.noise_multiplier,
            sampling_prob=part.sample_rate,
            pessimistic_estimate=True,
            value_discretization_interval=interval,
            neighboring_relation=NeighboringRelation.REPLACE_SPECIAL,
        )
    if isinstance(part, Gaussian):
        return privacy_loss_distribution.from_gaussian_mechanism(
            standard_deviation=part.sigma,
            sensitivity=part.sensitivity,
            pessimistic_estimate=True,
            value_discretization_interval=interval,
        )
    if isinstance(part, DiscreteGaussian):
        return privacy_loss_distribution.from_discrete_gaussian_mechanism(
            part.sigma,
            sensitivity=math.ceil(part.sensitivity),
            pessimistic_estimate=True,
            value_discretization_interval=interval,
        )
    return privacy_loss_distribution.from_privacy_parameters(
        common.DifferentialPrivacyParameters(_pure_epsilon(part), 0), value_discretization_interval=interval
    )


def _pure_epsilon(part: Single) -> float:
    pure = renyi.pure(part)
    if pure is None:
        raise TypeError("the mechanism has no pure loss")
    return math.nextafter(float(pure), math.inf)


def _self_compose(loss: Any, times: int) -> Any:
    """`times` copies of a loss distribution, in blocks: each block's tails are cut (upwards), which keeps it small."""
    if times <= _BLOCK:
        return loss.self_compose(times)
    blocks = _self_compose(loss.self_compose(_BLOCK), times // _BLOCK)
    rest = times % _BLOCK
    return blocks.compose(loss.self_compose(rest)) if rest else blocks


def _loss_range(part: Single) -> float:
    """About the largest privacy loss of one step that noise within ten standard deviations meets."""
    if isinstance(part, DpSgd):
        sigma, rate = part.noise_multiplier, part.sample_rate
    elif isinstance(part, Gaussian | DiscreteGaussian):
        sigma, rate = part.sigma / part.sensitivity, 1.0
    else:
        return _pure_epsilon(part)
    shifted = (20 * sigma + 1) / (2 * sigma * sigma)
    return shifted + math.log(rate) if shifted > 700 else math.log1p(rate * math.expm1(shifted))
