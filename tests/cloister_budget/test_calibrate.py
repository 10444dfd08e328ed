"""Noise, scale and steps that meet a wanted loss."""

from __future__ import annotations

import math
import time
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_budget.calibrate import (
    Noisy,
    calibrate,
    laplace_epsilon_that_fits,
    laplace_scale,
    noise_multiplier,
    noise_that_fits,
    steps_that_fit,
    within_epsilon,
)
from cloister_budget.filter import admits, limit_budgets
from cloister_budget.loss import direct_delta, rdp_vector, tight_epsilon
from cloister_budget.orders import freeze
from cloister_budget.quote import Standing, within_accounts
from cloister_data.errors import InvalidRequestError
from cloister_data.mechanism import (
    DiscreteGaussian,
    DiscreteLaplace,
    DpSgd,
    Gaussian,
    Laplace,
    ThresholdedHistogram,
)
from cloister_data.policy import Limit

LIMIT = Limit(epsilon=2, delta=1e-5)
ORDERS = freeze(LIMIT)
BUDGETS = limit_budgets(LIMIT, ORDERS)
NOTHING = (0,) * len(ORDERS)


@pytest.mark.parametrize(
    ("epsilon", "delta", "rate", "steps"),
    [
        (2.0, 1e-5, 0.1, 200),
        (0.1, 1e-5, 0.01, 1000),
        (8.0, 1e-5, 1.0, 10),
        (0.01, 1e-6, 0.3, 300),
    ],
)
def test_the_noise_is_enough_and_hardly_more(epsilon: float, delta: float, rate: float, steps: int) -> None:
    tight_epsilon(DpSgd(noise_multiplier=1, sample_rate=0.1, steps=1), 1e-5)
    start = time.process_time()
    sigma = noise_multiplier(epsilon, delta, rate, steps)
    assert time.process_time() - start < 6
    assert tight_epsilon(DpSgd(noise_multiplier=sigma, sample_rate=rate, steps=steps), delta) <= epsilon
    less = sigma * (1 - 2e-3)
    assert tight_epsilon(DpSgd(noise_multiplier=less, sample_rate=rate, steps=steps), delta) > epsilon


def test_a_calibrated_training_takes_its_whole_limit_or_less(monkeypatch: pytest.MonkeyPatch) -> None:
    sigma = noise_multiplier(300.0, 1e-5, 0.1, 100)
    assert tight_epsilon(DpSgd(noise_multiplier=sigma, sample_rate=0.1, steps=100), 1e-5) <= 300


@pytest.mark.parametrize(
    "arguments",
    [
        (0.0, 1e-5, 0.1, 10),
        (-1, 1e-5, 0.1, 1),
        (math.nan, 1e-5, 0.1, 10),
        (math.inf, 1e-5, 0.1, 10),
        (1, 0, 0.1, 10),
        (1, 1e-5, 0, 10),
        (1, 1e-5, 1.5, 10),
        (1, 1e-5, 0.1, 0),
        (1e-7, 1e-5, 1.0, 1000),
    ],
)
def test_what_no_noise_can_meet_is_refused(arguments: tuple[float, float, float, int]) -> None:
    with pytest.raises(InvalidRequestError):
        noise_multiplier(*arguments)


@given(st.integers(1, 2**62), st.floats(1e-6, 1000))
@settings(max_examples=200, deadline=None)
def test_a_laplace_scale_is_never_over_the_epsilon_that_was_written(sensitivity: int, epsilon: float) -> None:
    scale = laplace_scale(sensitivity, epsilon)
    assert Decimal(sensitivity) / Decimal(scale) <= Decimal(repr(epsilon)) + Decimal("1e-25")
    assert sensitivity / math.nextafter(scale, 0) >= epsilon * (1 - 1e-15)


def test_a_laplace_scale_needs_an_epsilon() -> None:
    for epsilon in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InvalidRequestError):
            laplace_scale(1, epsilon)


def test_the_steps_that_fit_fit_and_one_more_does_not() -> None:
    run = DpSgd(noise_multiplier=2, sample_rate=0.1, steps=5000)
    fitting = steps_that_fit(run, BUDGETS, NOTHING, NOTHING, ORDERS)
    assert 0 < fitting < 5000
    assert admits(BUDGETS, NOTHING, NOTHING, rdp_vector(run.model_copy(update={"steps": fitting}), ORDERS))
    assert not admits(BUDGETS, NOTHING, NOTHING, rdp_vector(run.model_copy(update={"steps": fitting + 1}), ORDERS))
    assert steps_that_fit(run, BUDGETS, BUDGETS, NOTHING, ORDERS) == 0
    few = run.model_copy(update={"steps": 3})
    assert steps_that_fit(few, BUDGETS, NOTHING, NOTHING, ORDERS) == 3


def test_the_noise_that_fits_fits() -> None:
    run = DpSgd(noise_multiplier=0.5, sample_rate=0.1, steps=500)

    def fits(other: DpSgd) -> bool:
        return admits(BUDGETS, NOTHING, NOTHING, rdp_vector(other, ORDERS))

    noisier = noise_that_fits(run, fits)
    assert noisier is not None
    assert fits(noisier)
    assert not fits(noisier.model_copy(update={"noise_multiplier": noisier.noise_multiplier * 0.98}))
    assert noise_that_fits(run, lambda other: False) is None


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 100), st.integers(0, 100), st.sampled_from([0.05, 0.3, 1.0, 8.0]))
def test_the_statistic_that_fits_fits_at_any_sensitivity(spent: int, reserved: int, epsilon: float) -> None:
    limit = Limit(epsilon=epsilon, delta=1e-5)
    orders = freeze(limit)
    budgets = limit_budgets(limit, orders)
    used = tuple(budget * spent // 100 for budget in budgets)
    held = tuple(budget * reserved // 100 for budget in budgets)
    fits = laplace_epsilon_that_fits(budgets, used, held, orders)
    if fits:
        for sensitivity in (1, 1000):
            release = DiscreteLaplace(sensitivity=sensitivity, scale=laplace_scale(sensitivity, fits))
            assert admits(budgets, used, held, rdp_vector(release, orders))
        more = DiscreteLaplace(sensitivity=1, scale=1 / (fits * 1.0001))
        assert not admits(budgets, used, held, rdp_vector(more, orders))
    else:
        assert spent + reserved >= 100


def test_a_statistic_of_the_whole_limit_fits() -> None:
    limit = Limit(epsilon=0.2, delta=1e-5)
    budgets = limit_budgets(limit, freeze(limit))
    assert laplace_epsilon_that_fits(budgets, NOTHING, NOTHING, freeze(limit)) == 0.2
    assert laplace_epsilon_that_fits(budgets, budgets, NOTHING, freeze(limit)) == 0


NOISY: list[Noisy] = [
    Laplace(sensitivity=2, scale=1),
    DiscreteLaplace(sensitivity=3, scale=900),
    Gaussian(sensitivity=2, sigma=0.01),
    Gaussian(sensitivity=1, sigma=400),
    DiscreteGaussian(sensitivity=3, sigma=30, answers=4),
    DpSgd(noise_multiplier=0.5, sample_rate=0.1, steps=20),
]


@pytest.mark.parametrize("mechanism", NOISY, ids=lambda mechanism: mechanism.kind)
@pytest.mark.parametrize("target", ["epsilon", "account"])
def test_calibrated_noise_fits_and_a_little_less_does_not(mechanism: Noisy, target: str) -> None:
    used = tuple(budget // 3 for budget in BUDGETS)
    standing = Standing("a", LIMIT, ORDERS, BUDGETS, used, NOTHING, 0, 0, 0, suspended=False)
    fits = within_epsilon(0.7, 1e-5, 1000) if target == "epsilon" else within_accounts([standing])
    found = calibrate(mechanism, "noise", fits)
    assert found is not None
    assert fits(found)
    (field,) = {"scale", "sigma", "noise_multiplier"} & set(found.model_dump())
    assert not fits(found.model_copy(update={field: getattr(found, field) * (1 - 3e-3)}))
    assert calibrate(mechanism, "noise", lambda other: False) is None


def test_calibrated_steps_fit_and_an_epoch_more_does_not() -> None:
    run = DpSgd(noise_multiplier=2, sample_rate=0.1, steps=1000)
    standing = Standing("a", LIMIT, ORDERS, BUDGETS, NOTHING, NOTHING, 0, 0, 0, suspended=False)
    for fits in (within_epsilon(1.5, 1e-5, 1000), within_accounts([standing])):
        for epoch in (1, 10):
            found = calibrate(run, "steps", fits, epoch)
            assert found is not None
            assert found.steps % epoch == 0
            assert fits(found)
            assert not fits(run.model_copy(update={"steps": found.steps + epoch}))
    assert calibrate(run, "steps", lambda other: True, 300) == run.model_copy(update={"steps": 900})
    assert calibrate(run, "steps", lambda other: False) is None
    assert calibrate(run, "steps", within_accounts([standing]), 5000) is None
    for wrong in (Laplace(sensitivity=1, scale=1), run):
        with pytest.raises(InvalidRequestError):
            calibrate(wrong, "steps", lambda other: True, 0)


def test_what_is_suspended_or_out_of_direct_delta_fits_nothing() -> None:
    mechanism = ThresholdedHistogram(bins=1, scale=20, threshold=500)
    direct = direct_delta(mechanism)
    for budget, suspended, admitted in ((direct, False, True), (direct - 1, False, False), (direct, True, False)):
        standing = Standing("a", LIMIT, ORDERS, BUDGETS, NOTHING, NOTHING, budget, 0, 0, suspended=suspended)
        assert within_accounts([standing])(mechanism) is admitted
