"""The rows that every charge moves. What a session remembers of them is expired when they are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sqlalchemy import Executable, bindparam, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session
from sqlalchemy.orm.util import identity_key

from cloister_budget.loss import Vector, part_of
from cloister_budget.orders import Orders
from cloister_budget.statements import Statement
from cloister_budget.tables import Account, ChargeAccount, ChargeRow, Population

orders_of = lru_cache(maxsize=4096)(Orders)
"""`Orders`, made (and checked) once for each population's frozen ones."""


@dataclass(slots=True)
class Locked:
    """An account as it is now, locked until the transaction ends. `save` writes its running sums back."""

    id: str
    population: str
    orders: Orders
    epsilon: float
    delta: float
    epsilon_cap: float | None
    expires: int | None
    budgets: Vector
    spent: Vector
    reserved: Vector
    direct_budget: int
    direct_spent: int
    direct_reserved: int
    suspended: bool


@dataclass(slots=True)
class LockedCharge:
    """How far a charge has come, locked until the transaction ends."""

    id: str
    state: str
    steps_total: int | None
    steps_marked: int
    direct_delta: int

    def direct_part(self, steps: int) -> int:
        """The direct delta of that many of the charge's steps, rounded up."""
        return 0 if self.steps_total is None else part_of((self.direct_delta,), steps, self.steps_total)[0]


RUNNING = ("spent", "reserved", "direct_spent", "direct_reserved")
"""The columns of `Locked` that charges move."""

_FIELDS = (
    Account.id, Account.population, Population.orders, Population.deltas, Account.epsilon, Account.delta,
    Account.epsilon_cap, Account.expires,
    Account.budgets, Account.spent, Account.reserved,
    Account.direct_budget, Account.direct_spent, Account.direct_reserved, Account.suspended,
)  # fmt: skip


def _accounts(count: int) -> Any:
    named = Account.id.in_([bindparam(f"id{number}") for number in range(count)])
    return select(*_FIELDS).join(Population, Population.name == Account.population).where(named).order_by(Account.id)


@lru_cache(maxsize=256)
def _look(count: int) -> Statement:
    return Statement(lambda _: _accounts(count))


@lru_cache(maxsize=256)
def _lock(count: int) -> Statement:
    return Statement(lambda _: _accounts(count).with_for_update(of=Account))


def _named(accounts: Sequence[str]) -> dict[str, str]:
    return {f"id{number}": account for number, account in enumerate(accounts)}


# Which accounts a charge is on never changes.
_LOCK_OF_CHARGE = Statement(
    lambda _: (
        select(*_FIELDS, ChargeAccount.vector)
        .join(Population, Population.name == Account.population)
        .join(ChargeAccount, ChargeAccount.account == Account.id)
        .where(ChargeAccount.charge == bindparam("charge_id"))
        .order_by(Account.id)
        .with_for_update(of=Account)
    )
)
_LOCK_CHARGE = Statement(
    lambda _: (
        select(ChargeRow.id, ChargeRow.state, ChargeRow.steps_total, ChargeRow.steps_marked, ChargeRow.direct_delta)
        .where(ChargeRow.id == bindparam("charge_id"))
        .with_for_update()
    )
)
_SAVE_CHARGE = Statement(
    lambda _: (
        update(ChargeRow.__table__)  # type: ignore[arg-type]
        .where(ChargeRow.id == bindparam("charge_id"))
        .values(state=bindparam("state"), steps_marked=bindparam("steps_marked"), settled=bindparam("settled"))
    )
)
_SAVE = Statement(
    lambda _: (
        update(Account.__table__)  # type: ignore[arg-type]
        .where(Account.id == bindparam("account_id"))
        .values({name: bindparam(name) for name in RUNNING})
    )
)
_ADD_PARTS = Statement(lambda _: insert(ChargeAccount.__table__))  # type: ignore[arg-type]


def _add_charge(dialect: str) -> Executable:
    conflict = ["user", "request_id"]
    if dialect == "sqlite":
        return sqlite.insert(ChargeRow).on_conflict_do_nothing(index_elements=conflict).returning(ChargeRow.id)
    return postgresql.insert(ChargeRow).on_conflict_do_nothing(index_elements=conflict).returning(ChargeRow.id)


_ADD_CHARGE = Statement(_add_charge)


def _locked(row: Sequence[Any]) -> Locked:
    name, population, orders, shares, *rest = row
    return Locked(name, population, orders_of(orders, shares), *rest)


def look(s: Session, accounts: Sequence[str]) -> list[Locked]:
    """These accounts as the transaction sees them, without locking them: for what only shows them."""
    s.flush()
    return [_locked(row) for row in _look(len(accounts)).run(s, _named(accounts))] if accounts else []


def lock(s: Session, accounts: Sequence[str]) -> list[Locked]:
    """These accounts, locked in the order of their ids; those that don't exist are left out."""
    s.flush()
    return [_locked(row) for row in _lock(len(accounts)).run(s, _named(accounts))] if accounts else []


def lock_of_charge(s: Session, charge: str) -> list[tuple[Locked, Vector]]:
    """The accounts of a charge, locked in the order of their ids, each with what the whole charge costs it."""
    s.flush()
    return [(_locked(row[:-1]), row[-1]) for row in _LOCK_OF_CHARGE.run(s, {"charge_id": charge})]


def lock_charge(s: Session, charge: str) -> LockedCharge | None:
    """The charge as it is now; its accounts are to be locked before it."""
    found = _LOCK_CHARGE.run(s, {"charge_id": charge})
    return LockedCharge(*found[0]) if found else None


def save_charge(s: Session, charge: LockedCharge, settled: int | None) -> None:
    """Write how far the charge has come; `settled` in Unix seconds, once it is."""
    _SAVE_CHARGE.run(
        s, {"charge_id": charge.id, "state": charge.state, "steps_marked": charge.steps_marked, "settled": settled}
    )
    _expire(s, ChargeRow, charge.id)


def save(s: Session, accounts: Sequence[Locked]) -> None:
    """Write the running sums of locked accounts."""
    _SAVE.run_many(s, [{"account_id": row.id, **{name: getattr(row, name) for name in RUNNING}} for row in accounts])
    for row in accounts:
        _expire(s, Account, row.id)


def add_charge(s: Session, charge: Mapping[str, Any]) -> bool:
    """Add a charge's row; False where its user's request id has one already."""
    return bool(_ADD_CHARGE.run(s, charge))


def add_parts(s: Session, charge: str, vectors: Mapping[str, Vector]) -> None:
    """What the charge costs each account."""
    _ADD_PARTS.run_many(s, [{"charge": charge, "account": name, "vector": vector} for name, vector in vectors.items()])


def _expire(s: Session, kind: type[Any], key: str) -> None:
    known = s.identity_map.get(identity_key(kind, key))
    if known is not None:
        s.expire(known)
