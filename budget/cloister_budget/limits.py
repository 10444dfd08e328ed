"""Which accounts there are, what each may lose, and whom each binds: the policies in force, as rows.

Every account lies within a population: the population's own (what all users together learn about one person), one for
each user whom a policy lists, and one for each group, which its members share. Where the population is divided into
parts, each of these is one account for every part, with the same limit: a limit is about one person, who is in one
part. A limit is raised or lowered by the next policy, at once; what was spent stays, and the highest limit ever set is
the guarantee for what was ever released.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from cloister_budget.filter import direct_budget, limit_budgets
from cloister_budget.orders import Orders, freeze
from cloister_budget.tables import Account, AccountUser, Population
from cloister_data.errors import InvalidRequestError, PolicyRefusedError
from cloister_data.policy import Limit, Policy

MAX_ACCOUNTS = 512
"""The accounts that one request may charge: many more don't fit the leaf that names them."""

WHOLE: Mapping[str, str] = MappingProxyType({})
"""Of a request: it is about all parts of its populations."""


def population_account(population: str, part: str | None = None) -> str:
    """No population's or user's name holds a bracket, so nothing else has this id, whatever the part is called."""
    return population if part is None else f"{population}[{part}]"


def user_account(population: str, user: str, part: str | None = None) -> str:
    return f"{population_account(population, part)}:{user}"


def group_account(population: str, group: str, part: str | None = None) -> str:
    """No user's name begins with @, so a group never shares an id with a user."""
    return f"{population_account(population, part)}:@{group}"


def population_of(account: str) -> str:
    """The population of an account's id."""
    return re.split(r"[\[:]", account, maxsplit=1)[0]


@dataclass(frozen=True)
class Bound:
    """One account of a policy: its id, whose it is, what it may lose, and the users that are charged to it."""

    account: str
    part: str | None
    scope: Literal["population", "user", "group"]
    name: str | None
    limit: Limit
    users: tuple[str, ...]


def limits_of(population: str, policy: Policy, parts: tuple[str, ...] = ()) -> list[Bound]:
    """Every account that the policy sets a limit for, the population's own first. That one binds everybody."""
    found = []
    for part in parts or (None,):
        everybody = population_account(population, part)
        found.append(Bound(everybody, part, "population", None, policy.population_limit, ()))
        for user, limit in sorted(policy.users.items()):
            found.append(Bound(user_account(population, user, part), part, "user", user, limit, (user,)))
        for name, group in sorted(policy.groups.items()):
            members = tuple(sorted(set(group.members)))
            found.append(Bound(group_account(population, name, part), part, "group", name, group.limit, members))
    return found


def set_limits(s: Session, population: str, policy: Policy, parts: tuple[str, ...] = ()) -> None:
    """Put the policy's limits into force, and bind its users by their accounts.

    The first limits freeze the population's orders and its `parts`, which later calls don't change. Lowering holds for
    every later charge, also below what is spent: then nothing more is admitted. Accounts of users and groups that the
    policy no longer names keep what was spent.
    """
    row = s.get(Population, population)
    if row is None:
        orders = freeze(policy.population_limit)
        row = Population(name=population, orders=orders.finite, deltas=orders.shares, parts=parts)
        s.add(row)
        s.flush()
    else:
        orders = Orders(row.orders, row.deltas)
    wanted = limits_of(population, policy, row.parts)
    budgets = {limit: limit_budgets(limit, orders) for limit in {each.limit for each in wanted}}
    known = {account.id: account for account in _lock(s, [each.account for each in wanted])}
    for each in wanted:
        account, limit = known.get(each.account), each.limit
        if account is None:
            none = (0,) * len(orders)
            account = Account(
                id=each.account, population=population, part=each.part,
                user=each.name if each.scope == "user" else None,
                group_name=each.name if each.scope == "group" else None,
                epsilon=limit.epsilon, delta=limit.delta, highest_epsilon=limit.epsilon, highest_delta=limit.delta,
                spent=none, reserved=none, suspended=False,
            )  # fmt: skip
            s.add(account)
        account.epsilon, account.delta, account.budgets = limit.epsilon, limit.delta, budgets[limit]
        account.direct_budget = direct_budget(limit)
        account.epsilon_cap, account.expires = limit.epsilon_cap, limit.expires
        account.highest_epsilon = max(account.highest_epsilon, limit.epsilon)
        account.highest_delta = max(account.highest_delta, limit.delta)
    s.flush()
    _bind(s, population, policy.dataset, wanted)


def _bind(s: Session, population: str, dataset: str, wanted: Sequence[Bound]) -> None:
    bound = {(user, each.account) for each in wanted for user in each.users}
    here = select(Account.id).where(Account.population == population)
    s.execute(
        delete(AccountUser)
        .where(AccountUser.dataset == dataset, AccountUser.account.in_(here))
        .execution_options(synchronize_session=False)
    )
    if bound:
        rows = [{"dataset": dataset, "user": user, "account": account} for user, account in sorted(bound)]
        s.execute(insert(AccountUser), rows)


def account_ids(s: Session, populations: Sequence[str], user: str, parts: Mapping[str, str] = WHOLE) -> list[str]:
    """The accounts that a request of `user` over these populations charges.

    For each population its own, and every account by which a policy in force about its people binds the user: their
    own, and those of their groups. Of a population in `parts` (by name) those of that part; of every other one, those
    of all its parts.

    Raises:
        InvalidRequestError: a population is named twice: its people would be charged once and used twice. Or it has no
            such part, or too many accounts bind the user.
        PolicyRefusedError: the user has no account there.
    """
    if len(set(populations)) != len(populations):
        raise InvalidRequestError(
            "Two sources of the request are about the same people.",
            why="Each person would count twice in one answer.",
            next_step="Name each population once.",
        )
    found = s.execute(
        select(Account.population, Account.id, Account.part, Population.parts)
        .join(AccountUser, AccountUser.account == Account.id)
        .join(Population, Population.name == Account.population)
        .where(AccountUser.user == user, Account.population.in_(list(populations)))
        .distinct()
    ).all()
    divided = {population: whole for population, _, _, whole in found}
    if not populations or set(divided) != set(populations):
        raise PolicyRefusedError(
            "You have no budget for this.",
            why=f"The user {user} has no account for: {', '.join(sorted(populations))}.",
            next_step="Ask the data owner to list you in the dataset's policy.",
        )
    charged: dict[str, tuple[str | None, ...]] = {}
    for population in populations:
        part = parts.get(population)
        if part is not None and part not in divided[population]:
            raise InvalidRequestError(f"The people of {population} have no part {part!r}.")
        charged[population] = (part,) if part is not None else divided[population] or (None,)
    own = [population_account(population, part) for population, which in charged.items() for part in which]
    bound = sorted(name for population, name, part, _ in found if part in charged[population])
    if len(own) + len(bound) > MAX_ACCOUNTS:
        raise InvalidRequestError(
            f"The request would be charged to {len(own) + len(bound)} accounts; at most {MAX_ACCOUNTS} are possible.",
            why="Each part of the people has an account for all users, for you, and for each group that you are in.",
            next_step="Ask about one part, or about fewer datasets. Nothing was charged.",
        )
    return [*own, *bound]


def _lock(s: Session, accounts: Sequence[str]) -> list[Account]:
    """The account rows, locked in the order of their ids, as they are now (not as the session remembers them)."""
    s.flush()
    wanted = select(Account).where(Account.id.in_(accounts)).order_by(Account.id).with_for_update()
    return list(s.scalars(wanted.execution_options(populate_existing=True)))
