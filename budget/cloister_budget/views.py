"""The ledger's rows as people see them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloister_budget.calibrate import laplace_epsilon_that_fits
from cloister_budget.filter import share_up, used_share
from cloister_budget.loss import Vector, part_of
from cloister_budget.orders import Orders
from cloister_budget.tables import Account, AccountUser, ChargeAccount, ChargeRow, Dataset, Population
from cloister_data.accounts import AccountView, ChargeView
from cloister_data.errors import NotFoundError
from cloister_data.policy import Limit


def charge_view(s: Session, charge_id: str) -> ChargeView:
    charge = s.get(ChargeRow, charge_id)
    if charge is None:
        raise NotFoundError("There is no such charge.")
    accounts = s.scalars(
        select(ChargeAccount.account).where(ChargeAccount.charge == charge_id).order_by(ChargeAccount.account)
    )
    return ChargeView.model_validate(
        {
            "charge": charge.id,
            "state": charge.state,
            "epsilon": charge.epsilon,
            "delta": charge.delta,
            "steps": charge.steps_total,
            "steps_charged": None if charge.steps_total is None else charge.steps_marked,
            "accounts": tuple(accounts),
            "policies": {source["dataset"]: source["policy_version"] for source in json.loads(charge.sources_json)},
        }
    )


def account_views(s: Session, user: str | None, populations: Sequence[str] | None) -> list[AccountView]:
    wanted = select(Account).order_by(Account.id)
    if user is not None:
        bound = select(AccountUser.account).where(AccountUser.user == user)
        own = select(Account.population).where(Account.id.in_(bound))
        wanted = wanted.where(
            Account.population.in_(own),
            Account.id.in_(bound) | (Account.user.is_(None) & Account.group_name.is_(None)),
        )
    if populations is not None:
        wanted = wanted.where(Account.population.in_(list(populations)))
    orders = {row.name: Orders(row.orders, row.deltas) for row in s.scalars(select(Population))}
    datasets: dict[str, list[str]] = defaultdict(list)
    for name, population in s.execute(select(Dataset.name, Dataset.population).order_by(Dataset.name)):
        datasets[population].append(name)
    marked = _marks_of_running(s)
    members: dict[str, set[str]] = defaultdict(set)
    for account, member in s.execute(select(AccountUser.account, AccountUser.user)):
        members[account].add(member)
    return [
        account_view(
            row, orders[row.population], datasets[row.population], marked.get(row.id, ()), sorted(members[row.id])
        )
        for row in s.scalars(wanted)
    ]


def _marks_of_running(s: Session) -> dict[str, Vector]:
    """By account, what the marked steps of charges that aren't settled have spent of it."""
    found: dict[str, Vector] = {}
    for part, steps, total in s.execute(
        select(ChargeAccount, ChargeRow.steps_marked, ChargeRow.steps_total)
        .join(ChargeRow, ChargeRow.id == ChargeAccount.charge)
        .where(ChargeRow.state == "reserved", ChargeRow.steps_marked > 0)
    ):
        marked = part_of(part.vector, steps, total or 1)
        before = found.get(part.account, (0,) * len(marked))
        found[part.account] = tuple(a + b for a, b in zip(before, marked, strict=True))
    return found


def account_view(
    row: Account, orders: Orders, datasets: Sequence[str], marked: Vector = (), members: Sequence[str] = ()
) -> AccountView:
    """`marked` shows as reserved until its training ends: marks move with the pace of the batches, which is private."""
    held = tuple(done + kept for done, kept in zip(row.spent, row.reserved, strict=True))
    settled = tuple(done - running for done, running in zip(row.spent, marked, strict=True)) if marked else row.spent
    used, both = used_share(row.budgets, settled), used_share(row.budgets, held)
    share = share_up(used)
    fits = 0.0 if row.suspended else laplace_epsilon_that_fits(row.budgets, row.spent, row.reserved, orders)
    return AccountView(
        account=row.id,
        population=row.population,
        part=row.part,
        scope="user" if row.user is not None else "population" if row.group_name is None else "group",
        user=row.user,
        group=row.group_name,
        members=tuple(members) if row.group_name is not None else (),
        limit=Limit(epsilon=row.epsilon, delta=row.delta, epsilon_cap=row.epsilon_cap, expires=row.expires),
        guarantee=Limit(epsilon=row.highest_epsilon, delta=row.highest_delta),
        used_share=share,
        reserved_share=share_up(both - used),
        used=share * row.epsilon,
        fits=fits,
        datasets=tuple(datasets),
    )
