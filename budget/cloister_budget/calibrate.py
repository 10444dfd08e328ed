"""The parameters that meet a wanted loss: noise for a training, scale for a statistic, what still fits. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal, localcontext
from functools import lru_cache
from typing import Literal, TypeVar, cast

from cloister_budget.filter import admits, room
from cloister_budget.loss import GRID_POINTS, INFINITE, UNIT, Vector, rdp_vector, tight_epsilon
from cloister_budget.orders import PRECISION, Orders
from cloister_data.errors import InvalidRequestError
from cloister_data.mechanism import DiscreteGaussian, DiscreteLaplace, DpSgd, Gaussian, Laplace, Mechanism

MAX_NOISE = 1e6
_DIGITS = 4
"""Significant digits of a noise multiplier."""

_LEAST_NOISE = 1e-6
"""Noise that no limit is too small for: `calibrate` goes no lower."""

_SEARCH_GRID = 4_000
"""Grid of the loss distribution while searching; the answer is verified on the full grid."""


def rounded(value: float, rounding: str, digits: int = _DIGITS) -> float:
    """`value` with so many significant digits, rounded ROUND_CEILING or ROUND_FLOOR."""
    exact = Decimal(value)
    step = Decimal(1).scaleb(exact.adjusted() - digits + 1)
    with localcontext(prec=PRECISION):
        return float((exact / step).to_integral_value(rounding) * step)


@lru_cache(maxsize=512)
def noise_multiplier(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """The smallest noise multiplier, to 4 digits, that keeps the tight epsilon of the run at `delta` within `epsilon`.

    Raises InvalidRequestError where the arguments are out of range, or no multiplier up to 1e6 is enough.
    """
    if not (math.isfinite(epsilon) and epsilon > 0 and 0 < delta < 1 and 0 < sample_rate <= 1 and steps >= 1):
        raise InvalidRequestError("Epsilon, delta, the sample rate or the number of steps is out of range.")

    def excess(sigma: float, points: int | None = None) -> float:
        run = DpSgd(noise_multiplier=sigma, sample_rate=sample_rate, steps=steps)
        spent = tight_epsilon(run, delta) if points is None else tight_epsilon(run, delta, points)
        return math.log(spent / epsilon) if spent > 0 else -math.inf

    high = 0.3
    while excess(high, _SEARCH_GRID) > 0:
        high *= 2
        if high > MAX_NOISE:
            raise InvalidRequestError(
                "No amount of noise brings this training under that epsilon.",
                next_step="Ask for a larger epsilon, fewer epochs or a smaller batch size.",
            )
    near = _descend(lambda sigma: excess(sigma, _SEARCH_GRID), high, tolerance=1e-3)
    sigma = rounded(_descend(excess, near, tolerance=0.5 * 10.0**-_DIGITS), ROUND_CEILING)
    while excess(sigma) > 0:
        sigma = rounded(sigma * (1 + 2 * 10.0**-_DIGITS), ROUND_CEILING)
    return sigma


def _descend(excess: Callable[[float], float], high: float, tolerance: float) -> float:
    """From `high`, where the decreasing `excess` is not positive, down to above its root by `tolerance` of it at most.

    Regula falsi on logarithms with the Illinois rule, because each evaluation is costly and the curve nearly straight.
    """
    above = excess(high)
    if above > 0 or above > -tolerance:
        return high
    low = high
    # ln(epsilon) falls about as fast as ln(sigma) rises, so this goes a little past the root at once.
    while True:
        low *= max(0.5, math.exp(above) * (1 - 2 * tolerance))
        below = excess(low)
        if below > 0 or low < 1e-3:
            break
        high, above = low, below
    left, right = below, above
    for _ in range(20):
        if high / low < 1 + tolerance or above > -tolerance / 2:
            break
        share = left / (left - right) if math.isfinite(left - right) else 0.5
        tried = low * (high / low) ** min(max(share + 0.01, 0.02), 0.98)
        found = excess(tried)
        if found > 0:
            low, left, right = tried, found, right / 2
        else:
            high, above, left, right = tried, found, left / 2, found
    return high


def laplace_scale(sensitivity: int, epsilon: float) -> float:
    """The smallest float scale, in lattice steps, with sensitivity/scale <= epsilon (read as its shortest decimal)."""
    if not (math.isfinite(epsilon) and epsilon > 0 and sensitivity >= 1):
        raise InvalidRequestError("Epsilon must be a positive number.")
    with localcontext(prec=PRECISION) as context:
        context.rounding = ROUND_CEILING
        exact = Decimal(sensitivity) / Decimal(repr(epsilon))
        scale = float(exact)
        return scale if Decimal(scale) >= exact else math.nextafter(scale, math.inf)


def steps_that_fit(
    mechanism: DpSgd, budgets: Vector, spent: Sequence[int], reserved: Sequence[int], orders: Orders
) -> int:
    """How many of the training's steps, at its noise and sample rate, the account would still admit."""
    whole = rdp_vector(mechanism, orders)
    fitting = [
        free * mechanism.steps // loss
        for free, loss in zip(room(budgets, spent, reserved), whole, strict=True)
        if 0 < loss < INFINITE
    ]
    return min(mechanism.steps, max(fitting, default=0))


Noisy = Laplace | DiscreteLaplace | Gaussian | DiscreteGaussian | DpSgd
"""Mechanisms with noise that can be widened. What a choice or a histogram costs is its epsilon or its threshold."""

N = TypeVar("N", bound=Noisy)

_NOISE = {"laplace": "scale", "discrete_laplace": "scale", "gaussian": "sigma", "discrete_gaussian": "sigma"}


def within_epsilon(epsilon: float, delta: float, points: int = GRID_POINTS) -> Callable[[Mechanism], bool]:
    """Whether a mechanism's own tight epsilon at delta is at most `epsilon`: a target for `calibrate`.

    Fewer `points` are faster, and only stricter: see `tight_epsilon`.
    """
    return lambda mechanism: tight_epsilon(mechanism, delta, points) <= epsilon


def calibrate(
    mechanism: N, vary: Literal["noise", "steps"], fits: Callable[[Mechanism], bool], multiple: int = 1
) -> N | None:
    """The mechanism that fits and differs from this one in its noise, or in its number of steps, as little as it must.

    "noise": the smallest noise, from any to the largest that the mechanism takes, to 4 digits rounded up. "steps": the
    most steps, from this training's own down, in multiples of `multiple` (the steps of an epoch). `fits` is
    `within_epsilon`, or `quote.within_accounts` for what is left in accounts; it must hold of all that costs less.
    What is returned was itself found to fit. None where nothing does.
    """
    if vary == "noise":
        return _with_noise(mechanism, fits)
    steps = mechanism.steps if isinstance(mechanism, DpSgd) else 0
    if not steps or multiple < 1:
        raise InvalidRequestError("Only a training has steps to choose, in multiples of at least one.")
    low, high = 0, steps // multiple
    while low < high:
        middle = (low + high + 1) // 2
        if fits(_changed(mechanism, {"steps": middle * multiple})):
            low = middle
        else:
            high = middle - 1
    return _changed(mechanism, {"steps": low * multiple}) if low else None


def _with_noise(mechanism: N, fits: Callable[[Mechanism], bool]) -> N | None:
    field = _NOISE.get(mechanism.kind, "noise_multiplier")
    most = MAX_NOISE if isinstance(mechanism, DpSgd) else 1e18

    def noisy(noise: float) -> N:
        return _changed(mechanism, {field: noise})

    high = getattr(mechanism, field)
    if fits(noisy(high)):
        low = high / 2
        while low > _LEAST_NOISE and fits(noisy(low)):
            low, high = low / 2, low
    else:
        low = high
        while not fits(noisy(high)):
            if high >= most:
                return None
            low, high = high, min(2 * high, most)
    while high / low > 1 + 0.5 * 10.0**-_DIGITS:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(noisy(middle)) else (middle, high)
    found = min(rounded(high, ROUND_CEILING), most)
    return noisy(found) if fits(noisy(found)) else noisy(high)


def _changed(mechanism: N, update: dict[str, float]) -> N:
    return cast(N, mechanism.model_copy(update=update))


def noise_that_fits(mechanism: DpSgd, fits: Callable[[DpSgd], bool]) -> DpSgd | None:
    """The same training with the smallest noise multiplier (to 1%) that `fits`; None where none up to 1e6 does."""

    def run(sigma: float) -> DpSgd:
        return mechanism.model_copy(update={"noise_multiplier": sigma})

    low = high = mechanism.noise_multiplier
    while not fits(run(high)):
        low, high = high, high * 2
        if high > MAX_NOISE:
            return None
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(run(middle)) else (middle, high)
    return run(high)


def epsilon_below(mechanism: DpSgd, delta: float) -> float:
    """An epsilon for which `noise_multiplier` finds at least this mechanism's noise: its tight one, a little less."""
    tight = tight_epsilon(mechanism, delta)
    return rounded(tight * (1 - 2e-4), ROUND_FLOOR) if tight > 0 else 0.0


def laplace_epsilon_that_fits(budgets: Vector, spent: Sequence[int], reserved: Sequence[int], orders: Orders) -> float:
    """The largest epsilon of one discrete Laplace release of any sensitivity that is still admitted; 0 where none is.

    Sensitivity 1 is the worst: its two outcomes' odds are exp(+-epsilon), as in randomised response, which dominates
    every mechanism of that pure epsilon.
    """
    free = room(budgets, spent, reserved)

    def fits(epsilon: float) -> bool:
        release = DiscreteLaplace(sensitivity=1, scale=laplace_scale(1, epsilon))
        return admits(budgets, spent, reserved, rdp_vector(release, orders))

    pure = free[-1] / UNIT
    best = pure if pure > 0 and fits(pure) else 0.0
    for order, loss in zip(orders.finite, free, strict=False):
        guess = _invert_randomised_response(float(order), loss / UNIT) if loss > 0 else 0.0
        while guess > best:
            tried = rounded(guess, ROUND_FLOOR, 6)
            if tried <= best or tried < 1e-9:
                break
            if fits(tried):
                best = tried
                break
            guess = tried * (1 - 1e-5)
    return best


def _invert_randomised_response(order: float, loss: float) -> float:
    """The epsilon of randomised response whose Renyi divergence at `order` is about `loss`."""

    def renyi(epsilon: float) -> float:
        log_p, log_q = -math.log1p(math.exp(-epsilon)), -epsilon - math.log1p(math.exp(-epsilon))
        first, second = order * log_p + (1 - order) * log_q, order * log_q + (1 - order) * log_p
        return (first + math.log1p(math.exp(second - first))) / (order - 1)

    low, high = 0.0, loss + 2.0 + 2 * math.sqrt(loss)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if renyi(middle) > loss else (middle, high)
    return low
