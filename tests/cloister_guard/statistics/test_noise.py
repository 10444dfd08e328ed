"""The noise: its scale, its quantiles, and its distribution."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opendp.domains import atom_domain, vector_domain
from opendp.measurements import make_laplace
from opendp.metrics import l1_distance
from opendp.mod import enable_features

from cloister_data.errors import InvalidRequestError
from cloister_guard.statistics.noise import (
    MAX_EPSILON,
    MIN_EPSILON,
    add_noise,
    check_epsilon,
    discrete_laplace,
    quantile,
)


@given(st.integers(1, 2**31), st.floats(MIN_EPSILON, MAX_EPSILON))
def test_the_scale_never_costs_more_than_was_asked_nor_much_less(sensitivity: int, epsilon: float) -> None:
    mechanism = discrete_laplace(sensitivity, epsilon)
    loss = Fraction(mechanism.sensitivity) / Fraction(mechanism.scale)
    assert loss <= Fraction(repr(epsilon))
    assert float(loss) >= epsilon * (1 - 1e-15)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf, 1e-7, 1001.0])
def test_bad_epsilons(epsilon: float) -> None:
    with pytest.raises(InvalidRequestError, match="epsilon must be"):
        check_epsilon(epsilon)


@pytest.mark.parametrize("sensitivity", [1, 1000, 2**30])
def test_opendp_states_the_same_loss(sensitivity: int) -> None:
    enable_features("contrib")
    mechanism = discrete_laplace(sensitivity, 0.3)
    oracle = make_laplace(vector_domain(atom_domain(T="i64")), l1_distance(T="i64"), mechanism.scale)
    assert oracle.map(sensitivity) == pytest.approx(0.3, rel=1e-12)


def chi_square(draws: np.ndarray, scale: float, reach: int) -> float:
    """Against discrete Laplace, with both tails beyond `reach` as one cell each."""
    r = math.exp(-1 / scale)
    values = np.arange(-reach, reach + 1)
    expected = np.array([(1 - r) / (1 + r) * r ** abs(int(value)) for value in values])
    tail = r ** (reach + 1) / (1 + r)
    observed = [np.count_nonzero(draws == value) for value in values]
    cells = np.array([np.count_nonzero(draws < -reach), *observed, np.count_nonzero(draws > reach)])
    wanted = np.array([tail, *expected, tail]) * len(draws)
    return float(((cells - wanted) ** 2 / wanted).sum())


def test_the_noise_has_the_stated_distribution() -> None:
    scale, reach, count = 3.0, 12, 60_000
    draws = np.array(add_noise([0] * count, scale))
    # 26 degrees of freedom: above 70 with probability 7e-6.
    assert chi_square(draws, scale, reach) < 70
    # Positive control: noise of .95 of that scale is found out.
    assert chi_square(np.array(add_noise([0] * count, 0.95 * scale)), scale, reach) > 70


@pytest.mark.parametrize("scale", [0.05, 0.5, 1.0, 7.3, 1e6])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.975])
def test_quantiles_are_the_smallest(scale: float, confidence: float) -> None:
    r = math.exp(-1 / scale)

    def within(t: int) -> float:
        return 1 - 2 * r ** (t + 1) / (1 + r)

    found = quantile(scale, confidence)
    assert within(found) >= confidence - 1e-9
    assert found == 0 or within(found - 1) < confidence + 1e-9


def test_noise_saturates_and_is_not_for_large_epsilon() -> None:
    ends = [2**63 - 1, -(2**63)]
    assert all(-(2**63) <= value < 2**63 for value in add_noise(ends * 20, 1e15))
    assert add_noise([5, -5], 0.001) == [5, -5]
    assert len({tuple(add_noise([0, 0, 0], 1e9)) for _ in range(5)}) == 5
