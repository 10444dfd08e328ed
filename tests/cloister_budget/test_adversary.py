"""The filter against the strongest adversary there is, found by enumeration.

The mechanisms have few outcomes, whose privacy losses lie on a lattice. So the state of an interaction is what was
charged, and the loss so far; over these states the best adaptive choice after every outcome is computed backwards,
exactly. What it reaches is the hockey-stick divergence: the largest of all adaptive adversaries, over all transcripts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest

from cloister_budget.filter import admits, admits_direct, direct_budget, limit_budgets
from cloister_budget.loss import Vector, direct_delta, rdp_vector
from cloister_budget.orders import DIRECT_UNIT, freeze
from cloister_data.mechanism import DiscreteLaplace, Mechanism, ReportNoisyMax, ThresholdedHistogram
from cloister_data.policy import Limit

STEP = 0.2
"""The lattice of losses, unless a toy has its own."""


@dataclass(frozen=True)
class Toy:
    """A mechanism on two neighbours. `outcomes`: (probability on D, on D', loss in `step`s or None where D' can't)."""

    mechanism: Mechanism
    outcomes: tuple[tuple[float, float, int | None], ...]
    step: float = STEP


def bit(steps: int, step: float = STEP) -> Toy:
    """Randomised response, the worst that pure epsilon allows."""
    epsilon = steps * step
    likely, rare = math.exp(epsilon) / (1 + math.exp(epsilon)), 1 / (1 + math.exp(epsilon))
    return Toy(ReportNoisyMax(epsilon=epsilon), ((likely, rare, steps), (rare, likely, -steps)), step)


def count(sensitivity: int, scale: int) -> Toy:
    """Discrete Laplace noise, cut off outside the two answers: that loses nothing of what tells them apart."""
    r = math.exp(-1 / scale)
    tail = 1 / (1 + r)
    inner = [(1 - r) / (1 + r) * r**k for k in range(1, sensitivity)]
    losses = [round((sensitivity - 2 * k) / scale / STEP) for k in range(sensitivity + 1)]
    rows = [(tail, tail * r**sensitivity, losses[0])]
    rows += [(inner[k - 1], inner[sensitivity - k - 1], losses[k]) for k in range(1, sensitivity)]
    rows += [(tail * r**sensitivity, tail, losses[-1])]
    return Toy(DiscreteLaplace(sensitivity=sensitivity, scale=scale), tuple(rows))


def rare_bin(scale: float, threshold: int) -> Toy:
    """A bin that one unit alone is in: shown, or not."""
    shown = math.exp(-(threshold - 1) / scale) / (1 + math.exp(-1 / scale))
    # Not shown: a little less likely on D. Counting that as no loss at all would be too kind by less than `shown`.
    return Toy(
        ThresholdedHistogram(bins=1, scale=scale, threshold=threshold),
        ((shown, 0.0, None), (1 - shown, 1.0, 0)),
    )


def realised(toys: tuple[Toy, ...], may: Callable[[tuple[int, ...], int], bool], epsilon: float, most: int) -> float:
    """sup over adaptive adversaries of sup_E P(E) - e^epsilon P'(E), with `most` requests at most.

    `may(uses, toy)`: whether one more use of this toy is admitted after so many uses of each.
    """

    (step,) = {toy.step for toy in toys}

    @cache
    def best(uses: tuple[int, ...], loss: int, weight_gone: int) -> float:
        # Per unit of probability on D'. An outcome of no loss that D has less often keeps `weight_gone` factors.
        on_d = math.exp(loss * step) * kept**weight_gone
        found = max(0.0, on_d - math.exp(epsilon))
        if sum(uses) == most:
            return found
        for index, toy in enumerate(toys):
            if not may(uses, index):
                continue
            after = tuple(n + (i == index) for i, n in enumerate(uses))
            value = 0.0
            for p, q, change in toy.outcomes:
                if change is None:
                    value += on_d * p
                else:
                    value += q * best(after, loss + change, weight_gone + (change == 0 and q == 1.0))
            found = max(found, value)
        return found

    kept = math.prod(p for toy in toys for p, q, change in toy.outcomes if change == 0 and q == 1.0)
    return best((0,) * len(toys), 0, 0)


def total(toys: tuple[Toy, ...], uses: tuple[int, ...], vectors: list[Vector]) -> Vector:
    return tuple(sum(n * vector[k] for n, vector in zip(uses, vectors, strict=True)) for k in range(len(vectors[0])))


class Filter:
    """The product's filter, and what it might have been instead."""

    def __init__(self, limit: Limit, toys: tuple[Toy, ...]) -> None:
        self.limit = limit
        self.orders = freeze(limit)
        self.budgets = limit_budgets(limit, self.orders)
        self.toys = toys
        self.vectors = [rdp_vector(toy.mechanism, self.orders) for toy in toys]
        self.directs = [direct_delta(toy.mechanism) for toy in toys]
        self.none = (0,) * len(self.orders)

    def real(self, uses: tuple[int, ...], toy: int) -> bool:
        spent = total(self.toys, uses, self.vectors)
        direct = sum(n * delta for n, delta in zip(uses, self.directs, strict=True))
        return admits(self.budgets, spent, self.none, self.vectors[toy]) and admits_direct(
            direct_budget(self.limit), direct, 0, self.directs[toy]
        )

    def forgets_direct_deltas(self, uses: tuple[int, ...], toy: int) -> bool:
        return admits(self.budgets, total(self.toys, uses, self.vectors), self.none, self.vectors[toy])

    def least_order_per_charge(self, uses: tuple[int, ...], toy: int) -> bool:
        """Takes the smallest loss over the orders of each charge, against the largest budget."""
        after = [n + (i == toy) for i, n in enumerate(uses)]
        return sum(n * min(vector) for n, vector in zip(after, self.vectors, strict=True)) <= max(self.budgets)

    def sum_of_best_epsilons(self, uses: tuple[int, ...], toy: int) -> bool:
        """Converts each charge by its own best order to an epsilon at delta, and adds these up."""
        after = [n + (i == toy) for i, n in enumerate(uses)]
        return sum(n * self._epsilon(i) for i, n in enumerate(after)) <= self.limit.epsilon

    def _epsilon(self, toy: int) -> float:
        delta, found = self.limit.delta, self.vectors[toy][-1] / 1e12
        for order, loss in zip((float(value) for value in self.orders.values), self.vectors[toy], strict=False):
            converted = loss / 1e12 + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
            found = min(found, max(0.0, converted))
        return found


BITS = (bit(1), bit(2), count(2, 10))
LIMITS = [Limit(epsilon=epsilon, delta=delta) for epsilon in (0.5, 1.0, 2.0) for delta in (0.01, 1e-3)]
ROUNDING = 1e-12


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: f"{limit.epsilon}-{limit.delta}")
def test_no_adversary_gets_past_the_filter(limit: Limit) -> None:
    tested = Filter(limit, BITS)
    reached = realised(BITS, tested.real, limit.epsilon, most=20)
    assert reached <= limit.delta + ROUNDING
    # It isn't that nothing is admitted: what is released is more than any smaller limit allows.
    assert realised(BITS, tested.real, limit.epsilon / 4, most=20) > limit.delta


def test_the_enumeration_knows_one_bit_exactly() -> None:
    def once(uses: tuple[int, ...], toy: int) -> bool:
        return sum(uses) == 0

    (likely, rare, _), _ = bit(2).outcomes
    assert realised((bit(2),), once, 0.1, most=3) == pytest.approx(likely - math.exp(0.1) * rare)
    assert realised((bit(2),), once, 0.5, most=3) == pytest.approx(0, abs=1e-15)


def test_the_enumeration_agrees_with_every_strategy_written_out() -> None:
    """Positive control of the backward computation: all strategies of two requests, all events."""
    toys, epsilon = (bit(1), count(2, 10)), 0.15
    written = 0.0
    for first in toys:
        for choices in _choices(len(first.outcomes), toys):
            gain = 0.0
            for (p, q, _), second in zip(first.outcomes, choices, strict=True):
                gain += sum(max(0.0, p * a - math.exp(epsilon) * q * b) for a, b, _ in second.outcomes)
            written = max(written, gain)
    assert realised(toys, lambda uses, toy: True, epsilon, most=2) == pytest.approx(written)


def _choices(outcomes: int, toys: tuple[Toy, ...]) -> list[tuple[Toy, ...]]:
    if outcomes == 0:
        return [()]
    return [(toy, *rest) for toy in toys for rest in _choices(outcomes - 1, toys)]


def test_a_filter_that_takes_the_least_order_per_charge_is_caught() -> None:
    limit = Limit(epsilon=1.0, delta=0.01)
    tested = Filter(limit, BITS)
    assert realised(BITS, tested.least_order_per_charge, limit.epsilon, most=20) > limit.delta
    assert realised(BITS, tested.real, limit.epsilon, most=20) <= limit.delta


def test_a_filter_that_adds_up_each_charge_s_best_epsilon_is_caught() -> None:
    """At this delta each of these bits alone has epsilon 0, so they would be free."""
    limit, toys = Limit(epsilon=0.1, delta=0.01), (bit(1, step=0.005), bit(2, step=0.005))
    tested = Filter(limit, toys)
    assert tested._epsilon(0) == 0
    assert realised(toys[1:], Filter(limit, toys[1:]).sum_of_best_epsilons, 0.1, 200) > limit.delta
    assert realised(toys, tested.real, limit.epsilon, most=30) <= limit.delta


def test_direct_deltas_are_within_the_guarantee_too() -> None:
    """A bin shows a lone unit with probability 1.7e-5 a time: five times are within 1% of delta, no more."""
    limit = Limit(epsilon=1.0, delta=0.01)
    toys = (bit(1), rare_bin(scale=50.0, threshold=515))
    tested = Filter(limit, toys)
    assert 0 < tested.directs[1] < direct_budget(limit) < 6 * tested.directs[1]
    assert realised(toys, tested.real, limit.epsilon, most=20) <= limit.delta
    shows = realised(toys[1:], Filter(limit, toys[1:]).real, limit.epsilon, most=30)
    assert 0 < shows <= direct_budget(limit) / DIRECT_UNIT
    # Positive control: a filter that forgets them passes even that budget.
    assert realised(toys[1:], Filter(limit, toys[1:]).forgets_direct_deltas, limit.epsilon, most=30) > (
        direct_budget(limit) / DIRECT_UNIT
    )


HERE, THERE, ALL = "here", "there", "all"


class Divided:
    """People in two parts, `here` and `there`; the neighbours differ in somebody who is `here`.

    Each toy can be used on either part or on everybody; each part has a filter of its own under the same limit.
    """

    def __init__(self, limit: Limit, toys: tuple[Toy, ...]) -> None:
        self.filter = Filter(limit, toys)
        self.requests = [(number, about) for about in (HERE, THERE, ALL) for number in range(len(toys))]

    def seen(self, *informative: str) -> tuple[Toy, ...]:
        """What each request shows: the same on both neighbours, unless it is about one of these."""
        toys = self.filter.toys
        nothing = ((1.0, 1.0, 0),)
        return tuple(
            toys[number] if about in informative else Toy(toys[number].mechanism, nothing, toys[number].step)
            for number, about in self.requests
        )

    def real(self, uses: tuple[int, ...], request: int) -> bool:
        """The product's: a request about everybody is charged to the accounts of both parts."""
        return self._admits(uses, request, {HERE: (HERE, ALL), THERE: (THERE, ALL)})

    def forgets_the_whole(self, uses: tuple[int, ...], request: int) -> bool:
        """Has a third account for what is about everybody, and a part's knows nothing of it."""
        return self._admits(uses, request, {HERE: (HERE,), THERE: (THERE,), ALL: (ALL,)})

    def _admits(self, uses: tuple[int, ...], request: int, accounts: dict[str, tuple[str, ...]]) -> bool:
        toy, about = self.requests[request]
        for charged in accounts.values():
            held = [0] * len(self.filter.toys)
            for (number, target), n in zip(self.requests, uses, strict=True):
                held[number] += n * (target in charged)
            if about in charged and not self.filter.real(tuple(held), toy):
                return False
        return True


@pytest.mark.parametrize("limit", LIMITS[::2], ids=lambda limit: f"{limit.epsilon}-{limit.delta}")
def test_no_adversary_gets_past_the_filters_of_two_parts(limit: Limit) -> None:
    tested = Divided(limit, (bit(2),))
    toys = tested.seen(HERE, ALL)
    assert realised(toys, tested.real, limit.epsilon, most=20) <= limit.delta + ROUNDING
    # Each part is worth its whole limit: somebody who is here loses no less than if there were no other part.
    alone = Filter(limit, (bit(2),))
    assert realised(toys, tested.real, limit.epsilon / 4, most=20) == pytest.approx(
        realised((bit(2),), alone.real, limit.epsilon / 4, most=20)
    )
    assert realised(toys, tested.real, limit.epsilon / 4, most=20) > limit.delta


def test_two_mechanisms_on_two_parts() -> None:
    limit = Limit(epsilon=0.5, delta=0.01)
    tested = Divided(limit, (bit(1), count(2, 10)))
    assert realised(tested.seen(HERE, ALL), tested.real, limit.epsilon, most=16) <= limit.delta + ROUNDING


def test_parts_that_share_somebody_are_caught() -> None:
    """Why nobody may ever change their part: whoever is in two of them loses what both filters admit."""
    limit = Limit(epsilon=1.0, delta=0.01)
    tested = Divided(limit, (bit(2),))
    assert realised(tested.seen(HERE, THERE, ALL), tested.real, limit.epsilon, most=20) > limit.delta
    assert realised(tested.seen(HERE, ALL), tested.real, limit.epsilon, most=20) <= limit.delta


def test_an_accountant_that_forgets_what_was_about_everybody_is_caught() -> None:
    limit = Limit(epsilon=1.0, delta=0.01)
    tested = Divided(limit, (bit(2),))
    assert realised(tested.seen(HERE, ALL), tested.forgets_the_whole, limit.epsilon, most=20) > limit.delta
