"""Random lives of a ledger against a plain model that recomputes every account from the charges on it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cloister_budget.database import Database
from cloister_budget.filter import admits, limit_budgets
from cloister_budget.ledger import Ledger
from cloister_budget.loss import Vector, part_of, rdp_vector
from cloister_budget.orders import freeze
from cloister_budget.tables import Account
from cloister_data.errors import BudgetRefusedError, ConflictError
from cloister_data.mechanism import DiscreteLaplace, DpSgd
from cloister_data.policy import Limit
from tests.fakes.ledgers import HandClock, policy, reservation

_populations = itertools.count()
MECHANISMS: list[DiscreteLaplace | DpSgd] = [
    DiscreteLaplace(sensitivity=1, scale=4),
    DiscreteLaplace(sensitivity=5, scale=50),
    DiscreteLaplace(sensitivity=3, scale=700),
    DpSgd(noise_multiplier=4, sample_rate=0.1, steps=50),
    DpSgd(noise_multiplier=9, sample_rate=0.02, steps=7),
]


@dataclass
class Charge:
    user: str
    request: str
    mechanism: DiscreteLaplace | DpSgd
    part: str | None = None
    state: str = "reserved"
    marked: int = 0


class LedgerMachine(RuleBasedStateMachine):
    database: Database

    def __init__(self) -> None:
        super().__init__()
        self.clock = HandClock()
        self.ledger = Ledger(self.clock)
        self.population = f"hospital/p{next(_populations)}"
        self.limit = {"": 2.0, "alice": 1.5, "bob": 1.0}
        self.orders = freeze(Limit(epsilon=2.0, delta=1e-5))
        self.charges: dict[str, Charge] = {}
        self.last_spent: dict[str, Vector] = {}
        self.parts: tuple[str, ...] = ()

    @initialize(parts=st.sampled_from([(), ("north", "south")]))
    def open(self, parts: tuple[str, ...]) -> None:
        self.parts = parts
        self.set_limits()

    def set_limits(self) -> None:
        with self.database.write() as s:
            limits = policy(self.limit[""], alice=self.limit["alice"], bob=self.limit["bob"])
            self.ledger.set_limits(s, self.population, limits, self.parts)

    def accounts(self, user: str, part: str | None) -> list[str]:
        """What a request is charged to, written out: of the whole, the accounts of every part."""
        places = [f"[{each}]" for each in self.parts if part in (None, each)] if self.parts else [""]
        return [f"{self.population}{place}{whose}" for place in places for whose in ("", f":{user}")]

    def expected(self, account: str) -> tuple[Vector, Vector]:
        """(spent, reserved) of an account, from its charges alone."""
        none = (0,) * len(self.orders)
        spent, reserved = none, none
        for charge in self.charges.values():
            if account not in self.accounts(charge.user, charge.part) or charge.state == "released":
                continue
            whole = rdp_vector(charge.mechanism, self.orders)
            if isinstance(charge.mechanism, DpSgd):
                done = part_of(whole, charge.marked, charge.mechanism.steps)
            else:
                done = whole if charge.state == "committed" else none
            held = none if charge.state == "committed" else tuple(a - b for a, b in zip(whole, done, strict=True))
            spent = tuple(a + b for a, b in zip(spent, done, strict=True))
            reserved = tuple(a + b for a, b in zip(reserved, held, strict=True))
        return spent, reserved

    def fits(self, user: str, part: str | None, mechanism: DiscreteLaplace | DpSgd) -> bool:
        whole = rdp_vector(mechanism, self.orders)
        return all(
            admits(
                limit_budgets(Limit(epsilon=self.limit[name.partition(":")[2]], delta=1e-5), self.orders),
                *self.expected(name),
                whole,
            )
            for name in self.accounts(user, part)
        )

    @rule(
        user=st.sampled_from(["alice", "bob"]),
        part=st.sampled_from([None, "north", "south"]),
        mechanism=st.sampled_from(MECHANISMS),
    )
    def reserve(self, user: str, part: str | None, mechanism: DiscreteLaplace | DpSgd) -> None:
        part = part if self.parts else None
        wanted = reservation(self.accounts(user, part), mechanism, user=user, epsilon=1.0)
        fits = self.fits(user, part, mechanism)
        try:
            with self.database.write() as s:
                asked = {} if part is None else {self.population: part}
                assert sorted(self.ledger.account_ids(s, [self.population], user, asked)) == sorted(wanted.accounts)
                reserved = self.ledger.reserve(s, wanted)
        except BudgetRefusedError:
            assert not fits
        else:
            assert fits
            assert reserved.fresh
            self.charges[reserved.charge_id] = Charge(user, wanted.request_id, mechanism, part)

    @precondition(lambda self: self.charges)
    @rule(data=st.data(), same=st.booleans())
    def retry(self, data: st.DataObject, same: bool) -> None:
        charge_id = data.draw(st.sampled_from(sorted(self.charges)))
        charge = self.charges[charge_id]
        wanted = reservation(
            self.accounts(charge.user, charge.part), charge.mechanism, user=charge.user, request=charge.request,
            epsilon=1.0, digest="0" * 64 if same else "1" * 64,
        )  # fmt: skip
        try:
            with self.database.write() as s:
                reserved = self.ledger.reserve(s, wanted)
        except ConflictError:
            assert not same
        else:
            assert same
            assert (reserved.charge_id, reserved.fresh, reserved.state) == (charge_id, False, charge.state)

    @precondition(lambda self: self.charges)
    @rule(data=st.data(), steps=st.integers(0, 60))
    def mark(self, data: st.DataObject, steps: int) -> None:
        charge_id = data.draw(st.sampled_from(sorted(self.charges)))
        charge = self.charges[charge_id]
        total = charge.mechanism.steps if isinstance(charge.mechanism, DpSgd) else -1
        try:
            with self.database.write() as s:
                self.ledger.mark(s, charge_id, steps)
        except ConflictError:
            assert charge.state != "reserved" or steps > total
        else:
            assert charge.state == "reserved"
            charge.marked = max(charge.marked, steps)

    @precondition(lambda self: self.charges)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        charge_id = data.draw(st.sampled_from(sorted(self.charges)))
        charge = self.charges[charge_id]
        try:
            with self.database.write() as s:
                self.ledger.commit(s, charge_id)
        except ConflictError:
            assert charge.state == "released"
        else:
            self.settled(charge)

    def settled(self, charge: Charge) -> None:
        if charge.state == "reserved":
            never_ran = isinstance(charge.mechanism, DpSgd) and not charge.marked
            charge.state = "released" if never_ran else "committed"

    @precondition(lambda self: self.charges)
    @rule(data=st.data())
    def refund(self, data: st.DataObject) -> None:
        charge_id = data.draw(st.sampled_from(sorted(self.charges)))
        charge = self.charges[charge_id]
        try:
            with self.database.write() as s:
                self.ledger.refund(s, charge_id)
        except ConflictError:
            assert charge.marked or charge.state == "committed"
        else:
            assert not charge.marked
            charge.state = "released"

    @rule(seconds=st.sampled_from([-(10**9), -3600, -1, 1, 86400]))
    def move_the_clock(self, seconds: int) -> None:
        self.clock.now += seconds

    @precondition(lambda self: self.charges)
    @rule(data=st.data(), mechanism=st.sampled_from(MECHANISMS))
    def use_a_request_id_again_for_something_else(
        self, data: st.DataObject, mechanism: DiscreteLaplace | DpSgd
    ) -> None:
        charge = self.charges[data.draw(st.sampled_from(sorted(self.charges)))]
        wanted = reservation(
            self.accounts(charge.user, charge.part),
            mechanism,
            user=charge.user,
            request=charge.request,
            digest="f" * 64,
            epsilon=1.0,
        )
        with pytest.raises(ConflictError), self.database.write() as s:
            self.ledger.reserve(s, wanted)

    @rule()
    def restart(self) -> None:
        with self.database.write() as s:
            dead = set(self.ledger.settle_dead(s))
        assert {key for key, charge in self.charges.items() if charge.state == "reserved"} <= dead
        for charge in self.charges.values():
            self.settled(charge)

    @rule(name=st.sampled_from(["", "alice", "bob"]), epsilon=st.sampled_from([0.1, 0.5, 1.0, 2.0]))
    def change_limit(self, name: str, epsilon: float) -> None:
        self.limit[name] = epsilon
        self.set_limits()

    @invariant()
    def every_account_is_the_sum_of_its_charges(self) -> None:
        with self.database.read() as s:
            rows = list(s.query(Account).where(Account.population == self.population))
            assert len(rows) == 3 * max(1, len(self.parts))
            for row in rows:
                assert (row.spent, row.reserved) == self.expected(row.id)
                before = self.last_spent.get(row.id, (0,) * len(self.orders))
                assert all(a >= b for a, b in zip(row.spent, before, strict=True)), "what is spent never comes back"
                self.last_spent[row.id] = row.spent
            for charge_id, charge in self.charges.items():
                view = self.ledger.charge_view(s, charge_id)
                assert view.state == charge.state
                assert (view.steps_charged or 0) == charge.marked


def test_the_ledger_is_the_model(database: Database) -> None:
    machine = type("Machine", (LedgerMachine,), {"database": database})
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=10 if database.is_sqlite else 5,
            stateful_step_count=15,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
