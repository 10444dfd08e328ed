"""The noise is a true Gaussian on its lattice: chi-square, moments, and the slow exact path against the fast one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats

from cloister_guard.training import noise
from cloister_guard.training.noise import FINE_BITS, LatticeGaussian, fine_spacing
from cloister_guard.training.randomness import KeyedStream

DRAWS = 200_000


def _drawn(multiplier: float, clip: float, base: int = 0) -> Any:
    mechanism = LatticeGaussian(noise_multiplier=multiplier, max_grad_norm=clip)
    released = mechanism.release(np.full(DRAWS, base, dtype=np.int64)) * mechanism.spacing
    return (released - base * fine_spacing(clip)) / (multiplier * clip)


def _chi_square(standard: Any) -> float:
    """The p-value of 100 equally likely cells of the standard normal distribution."""
    edges = scipy.stats.norm.ppf(np.linspace(0, 1, 101))
    counts, _ = np.histogram(standard, edges)
    return float(scipy.stats.chisquare(counts).pvalue)


@pytest.mark.parametrize(("multiplier", "clip"), [(1.0, 1.0), (0.37, 12.5), (50.0, 1e-3)])
def test_the_noise_is_gaussian_of_the_stated_deviation(multiplier: float, clip: float) -> None:
    standard = _drawn(multiplier, clip, base=123_456_789_012)
    assert _chi_square(standard) > 1e-6
    # Positive control: 3% less noise is seen.
    assert _chi_square(standard * 0.97) < 1e-6


def test_neighbouring_values_are_independent() -> None:
    standard = _drawn(1.0, 1.0)
    half = DRAWS // 2
    for first, second in ((standard[:-1], standard[1:]), (standard[:half], standard[half:])):
        assert abs(np.corrcoef(first, second)[0, 1]) < 6 / math.sqrt(half)
        assert abs(np.corrcoef(first**2, second**2)[0, 1]) < 6 / math.sqrt(half)


def test_no_two_mechanisms_share_their_noise() -> None:
    assert not np.array_equal(_drawn(1.0, 1.0), _drawn(1.0, 1.0))


def test_everything_decided_exactly_gives_what_the_fast_path_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both paths see the same words; where the fast one decides, the exact one must agree."""
    count = 60
    words = KeyedStream().words(count)

    class Replayed(KeyedStream):
        def words(self, count: int) -> Any:
            return words

    monkeypatch.setattr(noise, "KeyedStream", Replayed)
    sums = np.arange(count, dtype=np.int64) * 987_654_321_987
    mechanism = LatticeGaussian(noise_multiplier=1.3, max_grad_norm=1.0)
    fast = mechanism.release(sums)
    real = noise._box_muller

    def always_unsure(*arguments: Any) -> Any:
        normal, doubt = real(*arguments)
        return normal * 0, doubt + np.inf

    monkeypatch.setattr(noise, "_box_muller", always_unsure)
    assert np.array_equal(mechanism.release(sums), fast)


def test_the_exact_cosine_and_sine() -> None:
    import decimal

    with decimal.localcontext(decimal.Context(prec=120)):
        for angle in (0.0, 0.1, 1.5, 3.0, 4.7, 6.28):
            cosine, sine = noise._cos_sin(decimal.Decimal(angle))
            assert float(cosine) == pytest.approx(math.cos(angle), abs=1e-15)
            assert float(sine) == pytest.approx(math.sin(angle), abs=1e-15)
            assert abs(cosine * cosine + sine * sine - 1) < decimal.Decimal(10) ** -100
        assert float(noise._pi()) == math.pi


def test_the_bound_holds_for_the_exact_values() -> None:
    """Exact values of many cells lie within the stated doubt of the fast ones."""
    stream = KeyedStream()
    words = stream.words(100)
    normal, doubt = noise._box_muller(words[:50], words[50:], 1000.0)
    for at in range(50):
        exact = noise._exact_pair(int(words[at]), int(words[50 + at]), 1000.0, stream)
        assert abs(float(exact[0]) - normal[at]) <= doubt[at]
        assert abs(float(exact[1]) - normal[50 + at]) <= doubt[50 + at]
    assert float(np.median(doubt)) < 1e-9


@pytest.mark.parametrize("clip", [1e-12, 0.3, 1.0, 1.5, 2.0, 1e6])
def test_the_fine_lattice_holds_the_clip(clip: float) -> None:
    assert 2**FINE_BITS <= clip / fine_spacing(clip) < 2 ** (FINE_BITS + 1)


@pytest.mark.parametrize(("multiplier", "clip"), [(1e-9, 1.0), (1e-3, 1.0), (1.0, 1.0), (1e6, 1e6)])
def test_the_released_lattice_is_coarser_than_the_sums_and_finer_than_the_noise(multiplier: float, clip: float) -> None:
    mechanism = LatticeGaussian(noise_multiplier=multiplier, max_grad_norm=clip)
    assert mechanism.spacing >= fine_spacing(clip)
    assert mechanism.spacing <= max(multiplier * clip / 2**16, fine_spacing(clip))


@pytest.mark.parametrize("multiplier", [0.0, -1.0, math.inf, math.nan])
def test_noise_of_no_or_infinite_size_is_refused(multiplier: float) -> None:
    with pytest.raises(ValueError, match="deviation"):
        LatticeGaussian(noise_multiplier=multiplier, max_grad_norm=1.0)
