"""What would have changed under a draft policy? Past requests are asked again, in their order. Pure.

The draft's accounts begin empty, one for each part of the population. A request that was paid is decided by the
draft's rules at its own time and, where they admit it, by the privacy filter with the draft's limits; what it then
executed is added up. Requests for other datasets of the same people aren't decided, but count. The orders stay those of
the population. Requests that were refused left no row, and trainings count as settled before the next request: overlaps
in time are not replayed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from cloister_budget.filter import admits, admits_direct, direct_budget, limit_budgets
from cloister_budget.loss import Vector
from cloister_budget.orders import Orders
from cloister_budget.policy import AccessRequest, decide
from cloister_data.policy import Limit, Operation, Platform, Policy, Sandbox


@dataclass(frozen=True)
class PastRequest:
    """A request that was paid. `whole` is what it reserved, `executed` what it spent, at the population's orders.

    `part` is the part of the population that it was about, None for the whole.
    """

    charge: str
    dataset: str
    user: str
    operation: Operation
    sandbox: Sandbox | None
    epsilon: float
    at: int
    whole: Vector
    executed: Vector
    direct: int
    part: str | None = None


@dataclass(frozen=True)
class Change:
    """A past request that the draft would have refused: by which rule (or "budget"), and why."""

    past: PastRequest
    rule: str
    reason: str


@dataclass
class _Account:
    name: str
    part: str | None
    budgets: Vector
    direct_budget: int
    spent: Vector
    direct: int = field(default=0)

    def admits(self, past: PastRequest) -> bool:
        none = (0,) * len(self.spent)
        return admits_direct(self.direct_budget, self.direct, 0, past.direct) and admits(
            self.budgets, self.spent, none, past.whole
        )

    def add(self, past: PastRequest) -> None:
        self.spent = tuple(spent + more for spent, more in zip(self.spent, past.executed, strict=True))
        self.direct += past.direct


def replay(
    past: Iterable[PastRequest], draft: Policy, orders: Orders, platform: Platform, parts: tuple[str, ...] = ()
) -> tuple[Change, ...]:
    """The past requests about the draft's dataset that it would have refused, in the order of `past`.

    `parts` are those of the population, none where it isn't divided.
    """

    def accounts(name: str, limit: Limit) -> list[_Account]:
        budgets, direct, none = limit_budgets(limit, orders), direct_budget(limit), (0,) * len(orders)
        return [
            _Account(name if part is None else f"{name} in {part}", part, budgets, direct, none)
            for part in parts or (None,)
        ]

    everybody = accounts("all users", draft.population_limit)
    users = {user: accounts(f"user {user}", limit) for user, limit in draft.users.items()}
    groups = {name: accounts(f"group {name}", group.limit) for name, group in draft.groups.items()}
    changes = []
    for each in past:
        bound = [*everybody, *(one for name in draft.groups_of(each.user) for one in groups[name])]
        bound += users.get(each.user, [])
        charged = [one for one in bound if each.part in (None, one.part)]
        if each.dataset == draft.dataset:
            request = AccessRequest(each.user, each.operation, each.epsilon, platform, each.sandbox, each.dataset)
            decision = decide(request, draft, each.at)
            full = next((one.name for one in charged if not one.admits(each)), None)
            if not decision.allowed:
                changes.append(Change(each, decision.rule, decision.reason))
                continue
            if full is not None:
                changes.append(Change(each, "budget", f"It wouldn't have fitted what was left for {full}."))
                continue
        for one in charged:
            one.add(each)
    return tuple(changes)
