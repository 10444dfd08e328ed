"""Poisson sampling: inclusion counts and batch sizes are binomial, empty and full batches stay."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from opacus.utils.uniform_sampler import UniformWithReplacementSampler

from cloister_guard.training.sampler import PoissonSampler

UNITS, STEPS, RATE = 400, 3000, 0.05


def test_each_unit_is_included_as_often_as_its_coin_says() -> None:
    batches = list(PoissonSampler(num_samples=UNITS, sample_rate=RATE, steps=STEPS))
    assert len(batches) == STEPS
    counts = np.bincount(np.concatenate(batches), minlength=UNITS)
    # Sum over units of squared standardised counts is chi-square with UNITS degrees of freedom.
    spread = float((((counts - STEPS * RATE) ** 2) / (STEPS * RATE * (1 - RATE))).sum())
    assert 1e-6 < scipy.stats.chi2.cdf(spread, UNITS) < 1 - 1e-6
    sizes = np.array([len(batch) for batch in batches])
    spread = float(((sizes - UNITS * RATE) ** 2).sum() / (UNITS * RATE * (1 - RATE)))
    assert 1e-6 < scipy.stats.chi2.cdf(spread, STEPS) < 1 - 1e-6
    # Positive control: shuffling has the same counts, and batches that never vary.
    assert scipy.stats.chi2.cdf(0.0, STEPS) < 1e-6


def test_a_rate_that_is_too_high_is_seen() -> None:
    batches = list(PoissonSampler(num_samples=UNITS, sample_rate=RATE * 1.05, steps=STEPS))
    total = sum(len(batch) for batch in batches)
    assert scipy.stats.binom.sf(total, UNITS * STEPS, RATE) < 1e-6


def test_empty_batches_are_batches() -> None:
    batches = list(PoissonSampler(num_samples=3, sample_rate=0.01, steps=200))
    assert len(batches) == 200
    assert any(not batch for batch in batches)


def test_a_rate_of_one_takes_everybody() -> None:
    assert list(PoissonSampler(num_samples=7, sample_rate=1.0, steps=2)) == [list(range(7))] * 2


def test_the_true_rate_is_never_above_the_accounted_one() -> None:
    for rate in (0.1, 1 / 3, math.nextafter(1.0, 0.0), 1e-9):
        sampler = PoissonSampler(num_samples=1, sample_rate=rate, steps=1)
        assert int(sampler._threshold) / 2**53 <= rate


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, math.nan])
def test_a_rate_that_is_no_probability_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="sample_rate"):
        PoissonSampler(num_samples=5, sample_rate=rate, steps=1)


def test_it_is_a_sampler_of_opacus_with_randomness_of_its_own() -> None:
    first = PoissonSampler(num_samples=UNITS, sample_rate=RATE, steps=20)
    assert isinstance(first, UniformWithReplacementSampler)
    assert len(first) == 20
    assert list(first) != list(PoissonSampler(num_samples=UNITS, sample_rate=RATE, steps=20))
