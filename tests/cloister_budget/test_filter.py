"""The filter's figures and its edges."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_budget.filter import admits, limit_budgets, room, share_up, used_share
from cloister_budget.loss import INFINITE, UNIT, rdp_vector
from cloister_budget.orders import SHARE_UNIT, freeze
from cloister_data.mechanism import DiscreteLaplace, DpSgd
from cloister_data.policy import Limit

LIMIT = Limit(epsilon=8, delta=1e-5)
ORDERS = freeze(LIMIT)
NOTHING = (0,) * len(ORDERS)


def admitted(limit: Limit, charge: tuple[int, ...]) -> int:
    """How many such charges the filter admits, one after the other."""
    budgets, spent, count = limit_budgets(limit, freeze(limit)), NOTHING, 0
    while admits(budgets, spent, NOTHING, charge):
        spent, count = tuple(a + b for a, b in zip(spent, charge, strict=True)), count + 1
    return count


@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "least"),
    [(1, 0.01, 1000, 12), (2, 0.01, 1000, 81), (0.8, 0.001, 3000, 203), (20, 1, 1, 936)],
)
def test_runs_admitted_under_epsilon_8(sigma: float, rate: float, steps: int, least: int) -> None:
    run = DpSgd(noise_multiplier=sigma, sample_rate=rate, steps=steps)
    assert admitted(LIMIT, rdp_vector(run, ORDERS)) >= least


def test_statistics_are_admitted_up_to_the_limit_as_it_was_written() -> None:
    def statistic(scale: float) -> tuple[int, ...]:
        return rdp_vector(DiscreteLaplace(sensitivity=1, scale=scale), ORDERS)

    assert admitted(Limit(epsilon=0.2, delta=1e-5), statistic(5)) == 1
    assert admitted(Limit(epsilon=0.3, delta=1e-5), statistic(10)) == 3
    assert admitted(Limit(epsilon=0.2, delta=1e-5), statistic(math.nextafter(5, 0))) == 0


def test_many_small_statistics_compose_better_than_their_sum() -> None:
    assert admitted(LIMIT, rdp_vector(DiscreteLaplace(sensitivity=1, scale=20), ORDERS)) > 2 * 160


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-6, 1000), st.floats(1e-300, 0.01))
def test_budgets_convert_back_to_the_limit(epsilon: float, delta: float) -> None:
    """Every order's budget is at most what (epsilon, delta_k) allows: Canonne, Kamath and Steinke 2020, Prop. 12."""
    limit = Limit(epsilon=epsilon, delta=delta)
    orders = freeze(limit)
    budgets = limit_budgets(limit, orders)
    for order, share, budget in zip(orders.values, orders.shares, budgets, strict=False):
        if budget:
            a, delta_k = float(order), delta * share / SHARE_UNIT
            back = budget / UNIT + math.log1p(-1 / a) - (math.log(delta_k) + math.log(a)) / (a - 1)
            assert back <= epsilon * (1 + 1e-9) + 1e-9
    assert budgets[-1] <= Decimal(repr(epsilon)) * UNIT < budgets[-1] + 1
    assert max(budgets) < INFINITE // 1000


def test_an_order_without_a_budget_admits_nothing_not_even_nothing() -> None:
    assert not admits((0, 0), (0, 0), (0, 0), (0, 0))
    assert used_share((0, 0), (0, 0)) == 1
    assert used_share((), ()) == 1


def test_some_order_is_enough_and_reserved_counts() -> None:
    assert admits((10, 10), (0, 10), (5, 0), (5, 1))
    assert not admits((10, 10), (0, 10), (5, 0), (6, 1))
    assert room((10, 10), (0, 11), (4, 0)) == (6, 0)
    with pytest.raises(ValueError, match="argument"):
        admits((10, 10), (0, 10), (5, 0), (5,))  # a vector of another population's orders


@given(
    st.lists(st.integers(0, 10**16), min_size=3, max_size=3), st.lists(st.integers(1, 10**15), min_size=3, max_size=3)
)
def test_used_is_all_exactly_when_no_order_has_room(spent: list[int], budgets: list[int]) -> None:
    share = used_share(tuple(budgets), tuple(spent))
    assert (share == 1) == (not any(room(tuple(budgets), spent, (0, 0, 0))))
    up = share_up(share)
    assert Fraction(up) >= share
    assert (up == 1) == (share == 1)
