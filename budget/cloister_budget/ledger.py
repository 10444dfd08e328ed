"""The ledger: every answer is paid before it is computed. One ledger for statistics and training.

Every method takes the open session first, so that a caller puts a charge, its log leaf and its own rows into one
transaction (`Database.write`). Account rows are locked in the order of their ids; a caller appends to the audit log
after the ledger's call, never before it. See docs/life-of-a-charge.md.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import TypeAdapter
from sqlalchemy import select
from sqlalchemy.orm import Session

from cloister_budget import limits, rows, views
from cloister_budget.loss import Vector, direct_delta, part_of, rdp_vector
from cloister_budget.quote import Quote, Standing, quote_of, refusal, within_accounts
from cloister_budget.rows import Locked, LockedCharge
from cloister_budget.tables import Account, ChargeRow
from cloister_data.accounts import AccountView, ChargeView
from cloister_data.errors import ConflictError, InvalidRequestError, NotFoundError, PolicyRefusedError
from cloister_data.mechanism import Adjacency, DpSgd, Mechanism
from cloister_data.policy import Limit, Policy

MECHANISM: TypeAdapter[Mechanism] = TypeAdapter(Mechanism)


@dataclass(frozen=True)
class Reservation:
    """A request to be paid. `accounts` are the ids of `Ledger.account_ids`; `epsilon` is its tight one at `delta`."""

    user: str
    request_id: str
    request_digest: str
    kind: str
    mechanism: Mechanism
    epsilon: float
    delta: float
    adjacency: Adjacency
    sources_json: str
    accounts: Sequence[str]
    operation: str = ""
    sandbox: str | None = None


@dataclass(frozen=True)
class Reserved:
    """`fresh` is False where the same request was paid before; `state` is then that charge's own.

    `losses` is what a fresh charge costs each account, `direct` its direct delta.
    """

    charge_id: str
    fresh: bool
    state: str = "reserved"
    losses: Mapping[str, Vector] = field(default_factory=dict)
    direct: int = 0


class Ledger:
    """Charges on accounts. `clock` gives Unix seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock

    def set_limits(self, s: Session, population: str, policy: Policy, parts: tuple[str, ...] = ()) -> None:
        """Put the policy's limits into force: see `limits.set_limits`."""
        limits.set_limits(s, population, policy, parts)

    def account_ids(
        self, s: Session, populations: Sequence[str], user: str, parts: Mapping[str, str] = limits.WHOLE
    ) -> list[str]:
        """The accounts that a request of `user` over these populations charges: see `limits.account_ids`."""
        return limits.account_ids(s, populations, user, parts)

    def quote(self, s: Session, mechanism: Mechanism, accounts: Sequence[str], delta: float | None = None) -> Quote:
        """What the request would add to each account, and whether it would be admitted now. Spends nothing."""
        return quote_of(mechanism, _standings_of(rows.look(s, accounts), accounts), delta)

    def check(self, s: Session, mechanism: Mechanism, epsilon: float, delta: float, accounts: Sequence[str]) -> None:
        """Raises BudgetRefusedError where `reserve` would. A refused training's figures take seconds: find them here,
        in a read transaction, before the write transaction that everybody waits for.
        """
        standings = _standings_of(rows.look(s, accounts), accounts)
        if not within_accounts(standings)(mechanism):
            raise refusal(mechanism, epsilon, delta, standings)

    def reserve(self, s: Session, reservation: Reservation) -> Reserved:
        """Hold the whole cost on every account, or on none.

        Raises:
            ConflictError: the user's request id was used for another request.
            BudgetRefusedError: it doesn't fit an account; nothing was charged.
            PolicyRefusedError: it is over an account's cap, or the account has expired; nothing was charged.
        """
        wanted = reservation
        accounts = rows.lock(s, wanted.accounts)
        standings = _standings_of(accounts, wanted.accounts)
        vectors = {standing.account: rdp_vector(wanted.mechanism, standing.orders) for standing in standings}
        direct = direct_delta(wanted.mechanism)
        now = int(self._clock())
        for standing in standings:
            if terms := standing.limit.refuses(wanted.epsilon, now):
                earlier = self._earlier(s, wanted)
                if earlier is not None:
                    return earlier
                raise _over_terms(standing, wanted.epsilon, terms)
            if not standing.admits(vectors[standing.account], direct):
                earlier = self._earlier(s, wanted)
                if earlier is not None:
                    return earlier
                raise refusal(wanted.mechanism, wanted.epsilon, wanted.delta, standings)
        mechanism = wanted.mechanism
        charge_id = secrets.token_hex(16)
        fresh = rows.add_charge(s, {
            "id": charge_id, "user": wanted.user, "request_id": wanted.request_id,
            "request_digest": wanted.request_digest, "kind": wanted.kind,
            "operation": wanted.operation, "sandbox": wanted.sandbox, "mechanism_json": mechanism.model_dump_json(),
            "epsilon": wanted.epsilon, "delta": wanted.delta, "direct_delta": direct, "adjacency": wanted.adjacency,
            "sources_json": wanted.sources_json, "state": "reserved",
            "steps_total": mechanism.steps if isinstance(mechanism, DpSgd) else None, "steps_marked": 0,
            "created": int(self._clock()), "settled": None,
        })  # fmt: skip
        if not fresh:
            earlier = self._earlier(s, wanted)
            if earlier is None:
                raise ConflictError("The charge was not written.", next_step="Send the request again.")
            return earlier
        for account in accounts:
            account.reserved = _plus(account.reserved, vectors[account.id])
            account.direct_reserved += direct
        rows.add_parts(s, charge_id, vectors)
        rows.save(s, accounts)
        return Reserved(charge_id, True, losses=vectors, direct=direct)

    def mark(self, s: Session, charge_id: str, steps: int) -> None:
        """Say durably that the first `steps` steps are about to run: they are spent from here on, whatever happens.

        Marking fewer steps than are marked changes nothing. Raises ConflictError unless the charge is a reserved
        training with that many steps.
        """
        charge, parts = self._lock_charge(s, charge_id)
        if charge.state != "reserved" or charge.steps_total is None:
            raise ConflictError("Steps can only be marked on a training that is running.")
        if not 0 <= steps <= charge.steps_total:
            raise ConflictError("More steps were marked than were paid.")
        if steps <= charge.steps_marked:
            return
        direct = charge.direct_part(steps) - charge.direct_part(charge.steps_marked)
        for account, whole in parts:
            before = part_of(whole, charge.steps_marked, charge.steps_total)
            moved = _minus(part_of(whole, steps, charge.steps_total), before)
            account.reserved, account.spent = _minus(account.reserved, moved), _plus(account.spent, moved)
            account.direct_reserved, account.direct_spent = (
                account.direct_reserved - direct,
                account.direct_spent + direct,
            )
        charge.steps_marked = steps
        rows.save(s, [account for account, _ in parts])
        rows.save_charge(s, charge, None)

    def commit(self, s: Session, charge_id: str) -> None:
        """Settle what was executed: all of a statistic; the marked steps of a training, of which the rest comes back.

        A training of which no step was marked is given back. Committing twice changes nothing.
        """
        charge, parts = self._lock_charge(s, charge_id)
        if charge.state == "committed":
            return
        if charge.state != "reserved":
            raise ConflictError("A charge that was given back can't be committed.")
        self._settle(s, charge, parts)

    def refund(self, s: Session, charge_id: str) -> None:
        """Give everything back, where nothing at all was executed: no step marked, no data read, nothing answered.

        Refunding twice changes nothing. Raises ConflictError where a step was marked, or the charge is committed.
        """
        charge, parts = self._lock_charge(s, charge_id)
        if charge.state == "released":
            return
        if charge.state != "reserved" or charge.steps_marked:
            raise ConflictError("A charge of which something was executed can't be given back.")
        for account, whole in parts:
            account.reserved = _minus(account.reserved, whole)
            account.direct_reserved -= charge.direct_delta
        self._close(s, charge, parts, "released")

    def settle_dead(self, s: Session) -> list[str]:
        """Settle every charge that a guard left reserved when it died; to be called once, at start, before any request.

        Trainings keep their marked steps. Statistics are spent: whether their answer got out isn't known.
        """
        dead = list(s.scalars(select(ChargeRow.id).where(ChargeRow.state == "reserved").order_by(ChargeRow.id)))
        for charge_id in dead:
            charge, parts = self._lock_charge(s, charge_id)
            self._settle(s, charge, parts)
        return dead

    def suspend(self, s: Session, accounts: Sequence[str], suspended: bool) -> None:
        """Refuse every new charge on these accounts, or admit them again. The caller stops what is running."""
        for account in self._lock(s, accounts):
            account.suspended = suspended
        s.flush()

    def settled(self, s: Session, charge_id: str) -> tuple[int | None, Literal["committed", "released"]]:
        """(how many steps of a training were executed, None for a statistic; what became of the charge).

        Raises NotFoundError, ConflictError where it isn't settled.
        """
        row = s.get(ChargeRow, charge_id, populate_existing=True)
        if row is None:
            raise NotFoundError("There is no such charge.")
        if row.state not in ("committed", "released"):
            raise ConflictError("The charge isn't settled.")
        return (None if row.steps_total is None else row.steps_marked), (
            "committed" if row.state == "committed" else "released"
        )

    def charge_view(self, s: Session, charge_id: str) -> ChargeView:
        """Raises NotFoundError."""
        return views.charge_view(s, charge_id)

    def account_views(
        self, s: Session, user: str | None = None, populations: Sequence[str] | None = None
    ) -> list[AccountView]:
        """The accounts as people see them: of these populations (of all), and with `user` only those that bind them.

        A user sees a population's account only where they have an account of their own.
        """
        return views.account_views(s, user, populations)

    def _settle(self, s: Session, charge: LockedCharge, parts: list[tuple[Locked, Vector]]) -> None:
        for account, whole in parts:
            if charge.steps_total is None:
                account.reserved, account.spent = _minus(account.reserved, whole), _plus(account.spent, whole)
                account.direct_spent += charge.direct_delta
                account.direct_reserved -= charge.direct_delta
            else:
                unmarked = _minus(whole, part_of(whole, charge.steps_marked, charge.steps_total))
                account.reserved = _minus(account.reserved, unmarked)
                account.direct_reserved -= charge.direct_delta - charge.direct_part(charge.steps_marked)
        never_ran = charge.steps_total is not None and not charge.steps_marked
        self._close(s, charge, parts, "released" if never_ran else "committed")

    def _close(self, s: Session, charge: LockedCharge, parts: list[tuple[Locked, Vector]], state: str) -> None:
        charge.state = state
        rows.save(s, [account for account, _ in parts])
        rows.save_charge(s, charge, int(self._clock()))

    def _lock(self, s: Session, accounts: Sequence[str]) -> list[Account]:
        """The account rows, locked in the order of their ids, as they are now (not as the session remembers them)."""
        wanted = (
            select(Account)
            .where(Account.id.in_(list(accounts)))
            .order_by(Account.id)
            .with_for_update()
            .execution_options(populate_existing=True)
        )
        s.flush()
        return list(s.scalars(wanted))

    def _lock_charge(self, s: Session, charge_id: str) -> tuple[LockedCharge, list[tuple[Locked, Vector]]]:
        parts = rows.lock_of_charge(s, charge_id)
        charge = rows.lock_charge(s, charge_id)
        if charge is None:
            raise NotFoundError("There is no such charge.")
        return charge, parts

    def _earlier(self, s: Session, wanted: Reservation) -> Reserved | None:
        same = select(ChargeRow).where(ChargeRow.user == wanted.user, ChargeRow.request_id == wanted.request_id)
        charge = s.scalars(same).one_or_none()
        if charge is None:
            return None
        if charge.request_digest != wanted.request_digest:
            raise ConflictError(
                "This request id was used for another request.", next_step="Send the new request under a fresh id."
            )
        return Reserved(charge.id, False, charge.state)


def _standings_of(accounts: Sequence[Locked], wanted: Sequence[str]) -> list[Standing]:
    if not wanted or len(set(wanted)) != len(wanted) or {row.id for row in accounts} != set(wanted):
        raise InvalidRequestError("A charge needs accounts that exist, each once.")
    return [
        Standing(
            row.id, Limit(epsilon=row.epsilon, delta=row.delta, epsilon_cap=row.epsilon_cap, expires=row.expires),
            row.orders,
            row.budgets, row.spent, row.reserved,
            row.direct_budget, row.direct_spent, row.direct_reserved, row.suspended,
        )
        for row in accounts
    ]  # fmt: skip


def _over_terms(standing: Standing, epsilon: float, terms: str) -> PolicyRefusedError:
    if terms == "expired":
        return PolicyRefusedError(
            f"The account {standing.account} has expired.",
            why="Its owner set a time after which it admits nothing.",
            next_step="Ask the data owner: cloister budget request DATASET.",
        )
    return PolicyRefusedError(
        f"The request is over the cap of {standing.account} for one request.",
        why=f"It asks for epsilon {epsilon:.4g}; the cap is {standing.limit.epsilon_cap:.4g}.",
        next_step="Ask for less at once. Nothing was charged.",
    )


def _plus(left: Vector, right: Vector) -> Vector:
    return tuple(a + b for a, b in zip(left, right, strict=True))


def _minus(left: Vector, right: Vector) -> Vector:
    found = tuple(a - b for a, b in zip(left, right, strict=True))
    if any(entry < 0 for entry in found):
        raise ArithmeticError("an account would hold less than nothing")
    return found
