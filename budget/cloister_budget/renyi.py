"""The Renyi divergence of each mechanism at one order, in decimal arithmetic, between neighbours in both directions.

Every function is an upper bound up to the rounding of `PRECISION` digits; `loss` adds a guard for that. They expect
`loss`'s decimal context. Orders are above 1.
"""

from __future__ import annotations

from decimal import ROUND_FLOOR, Decimal
from fractions import Fraction

from cloister_data.mechanism import (
    DiscreteGaussian,
    DiscreteLaplace,
    DpSgd,
    Exponential,
    Gaussian,
    Laplace,
    ReportNoisyMax,
    Single,
    ThresholdedHistogram,
)

_SMALL = Decimal("1e-15")
_PURE_FROM = 10**6
"""From this pure loss on no order's divergence is computed: it is at most the pure one."""


def pure(mechanism: Single) -> Fraction | None:
    """The divergence at infinity, exactly; None where it is unbounded. An epsilon is read as its shortest decimal."""
    match mechanism:
        case Laplace() | DiscreteLaplace():
            return Fraction(mechanism.sensitivity) / Fraction(mechanism.scale)
        case ThresholdedHistogram():
            return Fraction(mechanism.bins) / Fraction(mechanism.scale)
        case Exponential() | ReportNoisyMax():
            return Fraction(repr(mechanism.epsilon))
        case Gaussian() | DiscreteGaussian() | DpSgd():
            return None


def laplace(sensitivity: Decimal, scale: Decimal, order: Decimal) -> Decimal:
    """D_a of Laplace noise against itself moved by `sensitivity` (Mironov 2017, Table II).

    Convex in the sensitivity and 0 at 0, so one coordinate moved by s is the worst of all vectors of L1 norm s.
    """
    x = sensitivity / scale
    if x >= _PURE_FROM:
        return x
    weight = order / (2 * order - 1)
    moment = weight * ((order - 1) * x).exp() + (1 - weight) * (-order * x).exp()
    return min(x, moment.ln() / (order - 1))


def discrete_laplace(sensitivity: int, scale: Decimal, order: Decimal) -> Decimal:
    """D_a of discrete Laplace noise P(k) ~ r^|k|, r = exp(-1/scale), against itself moved by `sensitivity` steps.

    Summing P(k - s)^a P(k)^(1-a) over the three ranges k <= 0, 0 < k < s and k >= s, with x = s/scale and
    u = r^(1-2a), gives w exp((a-1)x) + (1-w) exp(-a x) with w = (1 + (1-r)/(u-1)) / (1+r); as scale grows this
    becomes the continuous Laplace formula (Mironov 2017, Table II), w = a/(2a-1). The sum's logarithm is convex in s
    and 0 at s = 0, so one coordinate moved by s is the worst of all vectors of L1 norm s.
    """
    x = Decimal(sensitivity) / scale
    if x >= _PURE_FROM:
        # The exponentials would only grow unwieldy.
        return x
    r = (-1 / scale).exp()
    u = ((2 * order - 1) / scale).exp()
    w = (1 + (1 - r) / (u - 1)) / (1 + r)
    moment = w * ((order - 1) * x).exp() + (1 - w) * (-order * x).exp()
    return min(x, moment.ln() / (order - 1))


def gaussian(sensitivity: Decimal, sigma: Decimal, order: Decimal) -> Decimal:
    """D_a = a s^2 / (2 sigma^2), s the L2 sensitivity.

    Exact for normal noise (Mironov 2017, Proposition 7), an upper bound for discrete Gaussian noise on integers
    (Canonne, Kamath and Steinke 2020, Proposition 5, added up over the coordinates).
    """
    ratio = sensitivity / sigma
    return order * ratio * ratio / 2


def bounded_range(epsilon: Decimal, order: Decimal) -> Decimal:
    """The largest D_a of a mechanism whose privacy losses lie within `epsilon` of each other, exactly.

    Let the losses lie in [t - e, t]. x^a is convex, so at given mean E_Q[exp(loss)] = 1 the moment E_Q[exp(a loss)] is
    largest with the losses at both ends, which fixes Q; then it is largest at
    exp(t) = (a-1)(1 - exp(-ae)) / (a (exp(-e) - exp(-ae))), and
    D_a = t + ln((1 - exp(-ae)) / (a (1 - exp(-e)))) / (a-1).
    It is at most a e^2 / 8 (Cesar and Rogers 2021), which is taken where the fractions would cancel.
    """
    if epsilon < _SMALL:
        return order * epsilon * epsilon / 8
    one, whole = (-epsilon).exp(), (-order * epsilon).exp()
    worst = ((order - 1) * (1 - whole) / (order * (one - whole))).ln()
    return min(epsilon, worst + ((1 - whole) / (order * (1 - one))).ln() / (order - 1))


def randomised_response(epsilon: Decimal, order: Decimal) -> Decimal:
    """The largest D_a of any pure epsilon mechanism: that of one bit whose odds are exp(+-epsilon).

    Randomised response dominates every such mechanism (Kairouz, Oh and Viswanath 2015, Theorem 2.5).
    """
    moment = ((order * epsilon).exp() + ((1 - order) * epsilon).exp()) / (1 + epsilon.exp())
    return min(epsilon, moment.ln() / (order - 1))


def sampled_gaussian(sigma: Decimal, rate: Decimal, order: Decimal) -> Decimal:
    """D_a of one step of the Poisson-sampled Gaussian mechanism, an upper bound (exact for whole orders and rate 1).

    Whole orders: Mironov, Talwar and Zhang 2019, section 3.3, a sum of positive terms. Between two whole orders
    (a-1) D_a is convex in a, so the chord through the two bounds it.
    """
    if rate == 1:
        return order / (2 * sigma * sigma)
    low = int(order.to_integral_value(ROUND_FLOOR))
    above = order - low
    log_moment = (1 - above) * _log_moment(sigma, rate, low)
    if above:
        log_moment += above * _log_moment(sigma, rate, low + 1)
    return log_moment / (order - 1)


def _log_moment(sigma: Decimal, rate: Decimal, order: int) -> Decimal:
    """ln sum_k C(a,k) (1-q)^(a-k) q^k exp((k^2-k) / (2 sigma^2)); 0 at order 1."""
    if order == 1:
        return Decimal(0)
    exponent = 1 / (2 * sigma * sigma)
    if exponent * order * order > 10**12:
        return Decimal("Infinity") if order > 1 else Decimal(0)
    # Each term from the one before it: C(a,k+1)/C(a,k) = (a-k)/(k+1), and (k+1)^2-(k+1) - (k^2-k) = 2k.
    growth, odds = (2 * exponent).exp(), rate / (1 - rate)
    term, power = (1 - rate) ** order, Decimal(1)
    total = term
    for k in range(order):
        term *= odds * (order - k) / (k + 1) * power
        power *= growth
        total += term
    return total.ln()
