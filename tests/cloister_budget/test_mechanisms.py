"""Every mechanism's loss on a grid, against dp-accounting, Opacus, closed forms and brute force."""

from __future__ import annotations

import math
import warnings
from decimal import Decimal

import numpy as np
import pytest

from cloister_budget.loss import INFINITE, UNIT, direct_delta, rdp_epsilon, rdp_vector, tight_epsilon
from cloister_budget.orders import DIRECT_UNIT, FINITE_ORDERS, freeze
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
from cloister_data.policy import Limit

ORDERS = freeze(Limit(epsilon=8, delta=1e-5))
FLOATS = [float(order) for order in FINITE_ORDERS]
WHOLE = [order for order in FLOATS if order.is_integer()]

EVERY: list[Single] = [
    Laplace(sensitivity=1.5, scale=3),
    DiscreteLaplace(sensitivity=3, scale=10),
    Gaussian(sensitivity=2, sigma=5),
    DiscreteGaussian(sensitivity=2, sigma=5, answers=1),
    Exponential(epsilon=0.4),
    ReportNoisyMax(epsilon=0.4),
    ThresholdedHistogram(bins=2, scale=4, threshold=120),
    DpSgd(noise_multiplier=1.1, sample_rate=0.02, steps=100),
]


def at(mechanism: Mechanism, order: float) -> float:
    return rdp_vector(mechanism, ORDERS)[FLOATS.index(order)] / UNIT


def renyi_of(p: np.ndarray, q: np.ndarray, order: float) -> float:
    return float(np.logaddexp.reduce(order * np.log(p) + (1 - order) * np.log(q)) / (order - 1))


@pytest.mark.parametrize("rate", [1e-4, 0.01, 0.2, 1.0])
@pytest.mark.parametrize("sigma", [0.6, 1.0, 3.0, 12.0])
@pytest.mark.parametrize("steps", [1, 1000])
def test_training_on_a_grid_agrees_with_dp_accounting_and_with_opacus(rate: float, sigma: float, steps: int) -> None:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.rdp import RdpAccountant

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants.analysis.rdp import compute_rdp

    run = DpSgd(noise_multiplier=sigma, sample_rate=rate, steps=steps)
    opacus = compute_rdp(q=rate, noise_multiplier=sigma, steps=steps, orders=WHOLE)
    event = SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(sigma)), steps)
    google = RdpAccountant(WHOLE).compose(event)._rdp
    for order, theirs, others in zip(WHOLE, opacus, google, strict=True):
        ours = at(run, order)
        assert ours == pytest.approx(float(theirs), rel=1e-5, abs=2e-12)
        assert ours == pytest.approx(float(others), rel=1e-5, abs=2e-12)


@pytest.mark.parametrize("ratio", [0.3, 1.0, 4.0, 50.0])
def test_noise_on_a_grid_agrees_with_dp_accounting_and_with_opacus(ratio: float) -> None:
    """`ratio` is noise over sensitivity. Opacus knows the Gaussian only."""
    from dp_accounting import GaussianDpEvent, LaplaceDpEvent
    from dp_accounting.rdp import RdpAccountant

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants.analysis.rdp import compute_rdp

    normal = RdpAccountant(FLOATS).compose(GaussianDpEvent(ratio))._rdp
    doubly = RdpAccountant(FLOATS).compose(LaplaceDpEvent(ratio))._rdp
    opacus = compute_rdp(q=1.0, noise_multiplier=ratio, steps=1, orders=FLOATS)
    for order, gauss, laplace, third in zip(FLOATS, normal, doubly, opacus, strict=True):
        for mechanism in (
            Gaussian(sensitivity=7, sigma=7 * ratio), DiscreteGaussian(sensitivity=7, sigma=7 * ratio, answers=9)
        ):  # fmt: skip
            assert at(mechanism, order) == pytest.approx(float(gauss), rel=1e-9, abs=2e-12)
            assert at(mechanism, order) == pytest.approx(float(third), rel=1e-9, abs=2e-12)
        assert at(Laplace(sensitivity=0.5, scale=0.5 * ratio), order) == pytest.approx(
            float(laplace), rel=1e-9, abs=2e-12
        )
        fine = DiscreteLaplace(sensitivity=10**6, scale=10**6 * ratio)
        assert at(fine, order) == pytest.approx(float(laplace), rel=1e-5)


@pytest.mark.parametrize(("shift", "sigma"), [(1, 0.5), (1, 3.0), (4, 2.5), (30, 20.0)])
def test_discrete_gaussian_noise_is_below_its_bound(shift: int, sigma: float) -> None:
    support = np.arange(-int(20 * sigma) - shift, int(20 * sigma) + shift + 1)
    q = np.exp(-(support**2) / (2 * sigma**2))
    p = np.exp(-((support - shift) ** 2) / (2 * sigma**2))
    kept = (p > 0) & (q > 0)
    p, q = (p / p.sum())[kept], (q / q.sum())[kept]
    for order in (1.5, 2.0, 3.0):
        brute = renyi_of(p, q, order)
        ours = at(DiscreteGaussian(sensitivity=shift, sigma=sigma, answers=1), order)
        assert ours >= brute * (1 - 1e-9)
        assert ours <= brute * 1.02


@pytest.mark.parametrize("epsilon", [1e-16, 1e-6, 0.1, 1.0, 5.0])
def test_a_choice_is_the_worst_of_all_of_its_range_and_no_more(epsilon: float) -> None:
    mechanism = Exponential(epsilon=epsilon)
    for order in FLOATS:
        ours = at(mechanism, order)
        assert ours <= min(order * epsilon**2 / 8 * (1 + 1e-9), epsilon) + 2e-12
        if epsilon >= 0.1:
            low = np.linspace(0, epsilon, 4001)[1:-1]
            q = (1 - np.exp(low - epsilon)) / (np.exp(low) - np.exp(low - epsilon))
            moments = q * np.exp(order * low) + (1 - q) * np.exp(order * (low - epsilon))
            worst = float(np.max(np.log(moments)) / (order - 1))
            assert ours >= worst - 1e-9
            assert ours == pytest.approx(worst, rel=1e-4)
    assert rdp_vector(mechanism, ORDERS)[-1] == math.ceil(Decimal(repr(epsilon)) * UNIT)


def test_real_exponential_mechanisms_stay_below_their_charge() -> None:
    random = np.random.default_rng(7)
    for _ in range(200):
        epsilon = float(random.uniform(0.1, 4))
        before = random.integers(0, 6, size=5).astype(float)
        after = before + random.choice([-1, 0, 1], size=5)
        p, q = np.exp(epsilon * before / 2), np.exp(epsilon * after / 2)
        p, q = p / p.sum(), q / q.sum()
        for order in FLOATS:
            assert renyi_of(p, q, order) <= at(Exponential(epsilon=epsilon), order) + 1e-9


def test_noisy_max_is_charged_as_any_pure_mechanism() -> None:
    """Randomised response, which is what discrete Laplace noise of sensitivity 1 amounts to."""
    for order in FLOATS:
        one = at(DiscreteLaplace(sensitivity=1, scale=2), order)
        assert at(ReportNoisyMax(epsilon=0.5), order) == pytest.approx(one, rel=1e-9)
        assert at(Exponential(epsilon=0.5), order) < at(ReportNoisyMax(epsilon=0.5), order)


@pytest.mark.parametrize(("bins", "scale", "threshold"), [(1, 1.0, 1), (1, 2.0, 20), (3, 5.0, 80), (2, 0.5, 4)])
def test_a_histogram_shows_a_lone_unit_as_often_as_its_direct_delta_says(
    bins: int, scale: float, threshold: int
) -> None:
    noise = np.arange(threshold - 1, threshold + int(60 * scale) + 60)
    shown = float(np.sum(np.exp(-noise / scale)) * (1 - np.exp(-1 / scale)) / (1 + np.exp(-1 / scale)))
    mechanism = ThresholdedHistogram(bins=bins, scale=scale, threshold=threshold)
    exact = 1 - (1 - shown) ** bins
    assert direct_delta(mechanism) / DIRECT_UNIT >= exact * (1 - 1e-12)
    assert direct_delta(mechanism) / DIRECT_UNIT == pytest.approx(min(1, bins * shown), rel=1e-9)
    for order in FLOATS:
        one = at(DiscreteLaplace(sensitivity=1, scale=scale), order)
        assert at(mechanism, order) == pytest.approx(bins * one, abs=2e-11)
    assert tight_epsilon(mechanism, 0.999999) == pytest.approx(bins / scale)
    below = direct_delta(mechanism) / DIRECT_UNIT * 0.99
    assert tight_epsilon(mechanism, below) == math.inf


def test_direct_deltas_add_up_and_are_never_nothing() -> None:
    one = ThresholdedHistogram(bins=1, scale=2, threshold=40)
    far = ThresholdedHistogram(bins=1, scale=1e-3, threshold=2**62)
    assert direct_delta(Composition(parts=(one, EVERY[0], one))) == 2 * direct_delta(one)
    assert direct_delta(far) == 1
    assert direct_delta(ThresholdedHistogram(bins=2**31, scale=1e18, threshold=1)) == DIRECT_UNIT
    assert all(direct_delta(part) == 0 for part in EVERY if not isinstance(part, ThresholdedHistogram))


@pytest.mark.parametrize("mechanism", EVERY, ids=lambda mechanism: mechanism.kind)
def test_every_mechanism_and_its_composition(mechanism: Single) -> None:
    vector = rdp_vector(mechanism, ORDERS)
    assert all(0 < loss <= INFINITE for loss in vector)
    assert list(vector[1:]) == sorted(vector[1:])
    twice = rdp_vector(Composition(parts=(mechanism, mechanism)), ORDERS)
    assert all(b == INFINITE or 2 * a - 1 <= b <= 2 * a for a, b in zip(vector, twice, strict=True))
    assert 0 < tight_epsilon(mechanism, 1e-5) <= tight_epsilon(Composition(parts=(mechanism, mechanism)), 1e-5)
    assert Composition.from_json(Composition(parts=(mechanism,)).to_json()).parts == (mechanism,)


@pytest.mark.parametrize("ratio", [0.5, 2.0, 20.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_one_gaussian_has_the_epsilon_that_is_known_exactly(ratio: float, delta: float) -> None:
    """Balle and Wang 2018; dp-accounting's and Opacus's own epsilons are above it too."""
    from dp_accounting import GaussianDpEvent
    from dp_accounting.pld import PLDAccountant
    from scipy.optimize import brentq  # type: ignore[import-untyped]
    from scipy.stats import norm  # type: ignore[import-untyped]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

        orders = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))
        opacus, _ = get_privacy_spent(
            orders=orders, rdp=compute_rdp(q=1.0, noise_multiplier=ratio, steps=1, orders=orders), delta=delta
        )

    def excess(epsilon: float) -> float:
        half = 1 / (2 * ratio)
        there, back = norm.cdf(half - epsilon * ratio), math.exp(epsilon + norm.logcdf(-half - epsilon * ratio))
        return float(there - back - delta)

    exact = brentq(excess, 0, 50, xtol=1e-12) if excess(0) > 0 else 0.0
    ours = tight_epsilon(Gaussian(sensitivity=3, sigma=3 * ratio), delta)
    google = PLDAccountant().compose(GaussianDpEvent(ratio)).get_epsilon(delta)
    assert exact <= ours <= exact * 1.002 + 1e-6
    assert ours == pytest.approx(google, rel=2e-3, abs=2e-4)
    assert ours <= float(opacus) + 1e-6


@pytest.mark.parametrize("rate", [0.01, 0.1])
@pytest.mark.parametrize("sigma", [0.8, 2.0])
def test_tight_epsilon_on_a_grid_agrees_with_dp_accounting_and_opacus(rate: float, sigma: float) -> None:
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import PRVAccountant

        opacus = PRVAccountant()
        opacus.history = [(sigma, rate, 200)]
        third = opacus.get_epsilon(1e-5)
    run = DpSgd(noise_multiplier=sigma, sample_rate=rate, steps=200)
    event = SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(sigma)), 200)
    relation = NeighboringRelation.REPLACE_SPECIAL
    google = PLDAccountant(relation).compose(event).get_epsilon(1e-5)
    ours = tight_epsilon(run, 1e-5)
    assert ours == pytest.approx(google, rel=5e-3)
    assert ours == pytest.approx(float(third), rel=0.02, abs=0.02)


def test_tight_epsilon_of_discrete_noise_and_of_mixtures() -> None:
    near = DiscreteGaussian(sensitivity=10, sigma=40, answers=1)
    assert tight_epsilon(near, 1e-5) == pytest.approx(tight_epsilon(Gaussian(sensitivity=1, sigma=4), 1e-5), rel=2e-2)
    several = DiscreteGaussian(sensitivity=10, sigma=40, answers=3)
    assert tight_epsilon(several, 1e-5) == rdp_epsilon((several,), 1e-5) > tight_epsilon(near, 1e-5)
    wide = DiscreteGaussian(sensitivity=1e4, sigma=4e4, answers=1)
    assert tight_epsilon(wide, 1e-5) == pytest.approx(rdp_epsilon((several,), 1e-5))
    # Ten bits beside noise: together they cost less than their sum.
    bits = Composition(parts=(Gaussian(sensitivity=1, sigma=4), *(ReportNoisyMax(epsilon=0.1),) * 10))
    assert tight_epsilon(bits, 1e-5) < tight_epsilon(Gaussian(sensitivity=1, sigma=4), 1e-5) + 0.95
    shown = Composition(parts=(Gaussian(sensitivity=1, sigma=4), ThresholdedHistogram(bins=1, scale=2, threshold=40)))
    alone = tight_epsilon(Gaussian(sensitivity=1, sigma=4), 1e-5)
    assert alone + 0.4 < tight_epsilon(shown, 1e-5) < alone + 0.5
    assert tight_epsilon(shown, direct_delta(shown) / DIRECT_UNIT) == math.inf
