"""What was paid, read back: the past requests of a population, and what an account had used over time."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloister_budget.filter import share_up, used_share
from cloister_budget.limits import population_account
from cloister_budget.loss import Vector, part_of
from cloister_budget.tables import Account, ChargeAccount, ChargeRow, Population
from cloister_budget.whatif import PastRequest
from cloister_data.accounts import AccountHistory, UsedAt

MAX_POINTS = 200
COARSE_SECONDS = 60


def past_requests(s: Session, population: str) -> list[PastRequest]:
    """Every request that was paid and settled with something executed, in the order in which they were made."""
    parts = s.get_one(Population, population).parts
    accounts = [population_account(population, part) for part in parts or (None,)]
    found = []
    seen = ""
    for charge, whole in s.execute(
        select(ChargeRow, ChargeAccount.vector)
        .join(ChargeAccount, ChargeAccount.charge == ChargeRow.id)
        .where(ChargeAccount.account.in_(accounts), ChargeRow.state == "committed")
        .order_by(ChargeRow.created, ChargeRow.id)
    ):
        if charge.id == seen:
            continue  # About several parts: each of them costs the same.
        seen = charge.id
        sources = json.loads(charge.sources_json)
        source: dict[str, str] = next((each for each in sources if each["population"] == population), {})
        found.append(
            PastRequest(
                charge=charge.id,
                dataset=source.get("dataset", ""),
                part=source.get("division"),
                user=charge.user,
                operation=charge.operation,
                sandbox=charge.sandbox,
                epsilon=charge.epsilon,
                at=charge.created,
                whole=whole,
                executed=_executed(charge, whole),
                direct=charge.direct_delta,
            )
        )
    return found


def account_histories(s: Session, accounts: Sequence[str]) -> list[AccountHistory]:
    """The share of each account's present limit that was used after each settled charge; the newest 200 changes.

    Times are whole minutes and only settled charges count: marks of a running training move with private batch sizes.
    """
    rows = s.scalars(select(Account).where(Account.id.in_(list(accounts))).order_by(Account.id)).all()
    paid: dict[str, list[tuple[int, Vector]]] = defaultdict(list)
    for charge, part in s.execute(
        select(ChargeRow, ChargeAccount)
        .join(ChargeAccount, ChargeAccount.charge == ChargeRow.id)
        .where(ChargeAccount.account.in_(list(accounts)), ChargeRow.state == "committed")
        .order_by(ChargeRow.settled, ChargeRow.id)
    ):
        at = (charge.settled or charge.created) // COARSE_SECONDS * COARSE_SECONDS
        paid[part.account].append((at, _executed(charge, part.vector)))
    histories = []
    for row in rows:
        spent: Vector = (0,) * len(row.budgets)
        shares: dict[int, float] = {}
        for at, executed in paid[row.id]:
            spent = tuple(before + more for before, more in zip(spent, executed, strict=True))
            shares[at] = share_up(used_share(row.budgets, spent))
        points = tuple(UsedAt(at=at, used_share=share) for at, share in shares.items())[-MAX_POINTS:]
        histories.append(AccountHistory(account=row.id, points=points))
    return histories


def _executed(charge: ChargeRow, whole: Vector) -> Vector:
    return whole if charge.steps_total is None else part_of(whole, charge.steps_marked, charge.steps_total)
