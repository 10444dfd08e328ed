"""Renyi vectors and tight epsilons, against closed forms, brute force, dp-accounting and Opacus."""

from __future__ import annotations

import math
import warnings
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_budget.loss import (
    INFINITE,
    UNIT,
    part_of,
    rdp_epsilon,
    rdp_vector,
    tight_epsilon,
)
from cloister_budget.orders import FINITE_ORDERS, Orders, freeze
from cloister_data.mechanism import Composition, DiscreteLaplace, DpSgd
from cloister_data.policy import Limit

ORDERS = freeze(Limit(epsilon=8, delta=1e-5))
WHOLE = [order for order in FINITE_ORDERS if "." not in order]


def at(mechanism: DiscreteLaplace | DpSgd | Composition, order: str) -> float:
    return rdp_vector(mechanism, ORDERS)[FINITE_ORDERS.index(order)] / UNIT


@pytest.mark.parametrize(("sensitivity", "scale"), [(1, 5.0), (1, 0.7), (7, 3.0), (3, 40.0), (1000, 1000.0)])
def test_discrete_laplace_is_the_sum_over_the_integers(sensitivity: int, scale: float) -> None:
    reach = int(60 * scale) + 10 * sensitivity
    support = np.arange(-reach, reach + 1)
    log_p = -np.abs(support) / scale - np.log((1 + np.exp(-1 / scale)) / (1 - np.exp(-1 / scale)))
    log_q = -np.abs(support - sensitivity) / scale - np.log((1 + np.exp(-1 / scale)) / (1 - np.exp(-1 / scale)))
    mechanism = DiscreteLaplace(sensitivity=sensitivity, scale=scale)
    for order in ("1.5", "2", "5", "12"):
        a = float(order)
        brute = np.logaddexp.reduce(a * log_q + (1 - a) * log_p) / (a - 1)
        assert at(mechanism, order) == pytest.approx(brute, rel=1e-9, abs=2e-12)
        assert at(mechanism, order) >= brute - 1e-10
    assert rdp_vector(mechanism, ORDERS)[-1] == math.ceil(Decimal(sensitivity) / Decimal(scale) * UNIT)


def test_one_coordinate_is_the_worst_of_all_vectors_of_one_norm() -> None:
    for order in FINITE_ORDERS:
        apart = sum(at(DiscreteLaplace(sensitivity=k, scale=4), order) for k in (1, 2, 4))
        assert at(DiscreteLaplace(sensitivity=7, scale=4), order) >= apart - 1e-11


def test_a_statistic_of_an_epsilon_is_charged_that_epsilon_exactly() -> None:
    assert rdp_vector(DiscreteLaplace(sensitivity=1, scale=5), ORDERS)[-1] == UNIT // 5
    assert rdp_vector(DiscreteLaplace(sensitivity=137, scale=1370), ORDERS)[-1] == UNIT // 10


@pytest.mark.parametrize(
    ("sigma", "rate", "steps"),
    [(1.0, 0.01, 1000), (2.0, 0.01, 1000), (0.8, 0.001, 3000), (5.0, 0.5, 300), (1.0, 1e-5, 10), (20.0, 1.0, 1)],
)
def test_dp_sgd_agrees_with_dp_accounting_and_opacus(sigma: float, rate: float, steps: int) -> None:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.rdp import RdpAccountant

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants.analysis.rdp import compute_rdp

    orders = [float(order) for order in WHOLE]
    opacus = compute_rdp(q=rate, noise_multiplier=sigma, steps=steps, orders=orders)
    event = SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(sigma)), steps)
    theirs = RdpAccountant(orders).compose(event)._rdp
    for order, other, third in zip(WHOLE, opacus, theirs, strict=True):
        ours = at(DpSgd(noise_multiplier=sigma, sample_rate=rate, steps=steps), order)
        assert ours == pytest.approx(float(other), rel=1e-5, abs=2e-12)
        assert ours == pytest.approx(float(third), rel=1e-5, abs=2e-12)


def test_a_fractional_order_is_bounded_between_its_neighbours() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants.analysis.rdp import compute_rdp
    run = DpSgd(noise_multiplier=1.0, sample_rate=0.01, steps=1000)
    for order in ("1.5", "2.5"):
        exact = float(compute_rdp(q=0.01, noise_multiplier=1.0, steps=1000, orders=[float(order)])[0])
        above = str(math.ceil(float(order)))
        assert exact <= at(run, order) <= at(run, above)


def test_the_direction_computed_is_the_larger_one() -> None:
    """Zeroing a unit and its reverse: both directions of the divergence, by integration."""
    x = np.linspace(-40, 40, 400_001)
    for sigma, rate in [(1.0, 0.1), (2.0, 0.4), (0.7, 0.02)]:
        zero = -(x**2) / (2 * sigma**2)
        one = -((x - 1) ** 2) / (2 * sigma**2)
        mixed = np.logaddexp(np.log1p(-rate) + zero, np.log(rate) + one)
        norm = np.log(sigma * np.sqrt(2 * np.pi)) - np.log(x[1] - x[0])
        for order in ("2", "4", "8"):
            a = float(order)
            there = (np.logaddexp.reduce(a * mixed + (1 - a) * zero) - norm) / (a - 1)
            back = (np.logaddexp.reduce(a * zero + (1 - a) * mixed) - norm) / (a - 1)
            ours = at(DpSgd(noise_multiplier=sigma, sample_rate=rate, steps=1), order)
            assert ours == pytest.approx(there, rel=1e-6)
            assert ours >= back


@settings(max_examples=60, deadline=None)
@given(st.floats(0.3, 50), st.floats(1e-6, 1.0), st.integers(1, 10_000), st.integers(0, 10_000), st.integers(1, 10_000))
def test_marking_in_parts_never_undercharges(sigma: float, rate: float, steps: int, some: int, other: int) -> None:
    whole = rdp_vector(DpSgd(noise_multiplier=sigma, sample_rate=rate, steps=steps), ORDERS)
    first = min(some, steps)
    part = part_of(whole, first, steps)
    assert part_of(whole, steps, steps) == whole
    assert part_of(whole, 0, steps) == (0,) * len(ORDERS)
    if first:
        true = rdp_vector(DpSgd(noise_multiplier=sigma, sample_rate=rate, steps=first), ORDERS)
        # A run's total is rounded up once; a part of it by at most one unit more.
        assert all(0 <= a - b <= 1 + b // 10**9 for a, b in zip(part, true, strict=True) if b < INFINITE)
        assert part[-1] == INFINITE
    second = min(first + other, steps)
    assert all(a <= b for a, b in zip(part, part_of(whole, second, steps), strict=True))


@given(st.integers(1, 2**62), st.floats(1e-300, 1e18, exclude_min=True))
@settings(max_examples=100, deadline=None)
def test_every_statistic_has_a_vector_that_grows_with_the_order(sensitivity: int, scale: float) -> None:
    vector = rdp_vector(DiscreteLaplace(sensitivity=sensitivity, scale=scale), ORDERS)
    assert all(0 < loss <= INFINITE for loss in vector)
    assert list(vector) == sorted(vector)


@given(st.floats(1e-300, 1e6, exclude_min=True), st.floats(1e-300, 1), st.integers(1, 10_000_000))
@settings(max_examples=100, deadline=None)
def test_every_training_has_a_vector_that_grows_with_the_order(sigma: float, rate: float, steps: int) -> None:
    vector = rdp_vector(DpSgd(noise_multiplier=sigma, sample_rate=rate, steps=steps), ORDERS)
    assert all(0 < loss <= INFINITE for loss in vector)
    assert list(vector[1:]) == sorted(vector[1:])
    assert vector[-1] == INFINITE


def test_a_composition_is_the_sum_rounded_once() -> None:
    third = DiscreteLaplace(sensitivity=1, scale=30)
    run = DpSgd(noise_multiplier=2, sample_rate=0.1, steps=10)
    assert rdp_vector(Composition(parts=(third, third, third)), ORDERS)[-1] == UNIT // 10
    both = rdp_vector(Composition(parts=(third, run)), ORDERS)
    apart = [sum(pair) for pair in zip(rdp_vector(third, ORDERS), rdp_vector(run, ORDERS), strict=True)]
    assert all(0 <= b - a <= 1 for a, b in zip(both[:-1], apart[:-1], strict=True))
    assert both[-1] == INFINITE


def test_the_vector_is_the_same_in_any_decimal_context() -> None:
    import cloister_budget.loss as loss

    run = DpSgd(noise_multiplier=1.3, sample_rate=0.03, steps=77)
    before = rdp_vector(run, ORDERS)
    loss.losses_of.cache_clear()
    with localcontext(prec=5):
        assert rdp_vector(run, ORDERS) == before


def test_published_epsilons() -> None:
    run = DpSgd(noise_multiplier=1, sample_rate=0.01, steps=1000)
    assert tight_epsilon(run, 1e-5) == pytest.approx(1.828, abs=2e-3)
    assert rdp_epsilon((run,), 1e-5) == pytest.approx(2.10, abs=1e-2)


def test_tight_epsilon_is_above_the_exact_gaussian_one() -> None:
    """One full-batch step is the Gaussian mechanism, whose epsilon is known exactly (Balle and Wang 2018)."""
    from scipy.optimize import brentq  # type: ignore[import-untyped]
    from scipy.stats import norm  # type: ignore[import-untyped]

    for sigma in (0.5, 2.0, 20.0):

        def delta(epsilon: float, sigma: float = sigma) -> float:
            half = 1 / (2 * sigma)
            return float(norm.cdf(half - epsilon * sigma) - np.exp(epsilon + norm.logcdf(-half - epsilon * sigma)))

        exact = brentq(lambda epsilon, delta=delta: delta(epsilon) - 1e-5, 0, 50, xtol=1e-12)
        ours = tight_epsilon(DpSgd(noise_multiplier=sigma, sample_rate=1, steps=1), 1e-5)
        assert exact <= ours <= exact * 1.001


def test_tight_epsilon_of_statistics_is_pure() -> None:
    statistic = DiscreteLaplace(sensitivity=3, scale=10)
    assert tight_epsilon(statistic, 1e-9) == 0.3
    assert tight_epsilon(Composition(parts=(statistic, statistic)), 1e-9) == 0.6
    run = DpSgd(noise_multiplier=3, sample_rate=0.1, steps=10)
    both = tight_epsilon(Composition(parts=(statistic, run)), 1e-5)
    assert tight_epsilon(run, 1e-5) < both < 0.3 + tight_epsilon(run, 1e-5)
    twice = tight_epsilon(Composition(parts=(run, run)), 1e-5)
    assert twice == pytest.approx(tight_epsilon(run.model_copy(update={"steps": 20}), 1e-5), rel=1e-3)


def test_fewer_grid_points_only_make_epsilon_larger() -> None:
    run = DpSgd(noise_multiplier=3, sample_rate=0.1, steps=200)
    fine, coarse = tight_epsilon(run, 1e-5), tight_epsilon(run, 1e-5, 500)
    assert fine <= coarse <= rdp_epsilon((run,), 1e-5)


def test_an_epsilon_needs_a_delta() -> None:
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="delta"):
            tight_epsilon(DpSgd(noise_multiplier=1, sample_rate=0.1, steps=1), delta)


def test_extreme_trainings_are_answered_quickly() -> None:
    assert tight_epsilon(DpSgd(noise_multiplier=1e-6, sample_rate=1, steps=1), 1e-5) > 1e11
    assert tight_epsilon(DpSgd(noise_multiplier=1e-7, sample_rate=0.5, steps=1), 1e-5) == math.inf
    assert tight_epsilon(DpSgd(noise_multiplier=1e6, sample_rate=1e-9, steps=1), 1e-5) < 1e-3
    assert 1 < tight_epsilon(DpSgd(noise_multiplier=1e4, sample_rate=1, steps=10_000_000), 1e-5) < 1.3
    assert tight_epsilon(DpSgd(noise_multiplier=2, sample_rate=0.1, steps=50), 1e-300) > 0


def test_orders_are_frozen_with_a_share_kept_for_direct_deltas() -> None:
    assert sum(ORDERS.shares) <= 990_000_000
    assert ORDERS.shares[FINITE_ORDERS.index("4")] == 500_000_000
    assert len(ORDERS) == 15
    assert len({freeze(Limit(epsilon=e, delta=1e-5)).shares for e in (0.1, 1, 3, 8, 50)}) == 5
    for finite, shares in [((), ()), (("1",), (1,)), (("3", "2"), (1, 1)), (("2",), (0,)), (("2",), (10**9,))]:
        with pytest.raises(ValueError, match=r"order|delta"):
            Orders(finite, shares)
