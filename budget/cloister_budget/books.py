"""The books: every balance and every limit, recomputed from the leaves of the audit log alone. Pure.

The guard applies them to its own leaves before it writes them; they need no database, so whoever has the leaves can
too. A leaf that doesn't follow from the leaves before it raises `BooksError`, which names it. What an account holds is
one vector, spent and reserved together: marks move loss from one to the other only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import replace
from functools import lru_cache
from operator import add, sub
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from cloister_budget import entries
from cloister_budget.book_types import (
    AccountBook,
    DatasetBook,
    Held,
    Layer,
    OpenCharge,
    PopulationBook,
    TermsBook,
)
from cloister_budget.filter import admits_direct, ceilings, direct_budget, limit_budgets, within
from cloister_budget.loss import Vector, direct_delta, part_of, rdp_vector
from cloister_budget.merkle import LogVerificationError
from cloister_budget.orders import Orders
from cloister_data.mechanism import DpSgd, Mechanism
from cloister_data.terms import Gap


class BooksError(LogVerificationError):
    """A leaf doesn't follow from those before it. `leaf` is its index."""

    code: ClassVar[str] = "log-verification-failed"

    def __init__(self, leaf: int, kind: str, why: str) -> None:
        super().__init__(
            f"Entry {leaf} of the audit log ({kind}) doesn't hold.",
            why=why,
            next_step="Rely on nothing that came after it; ask the operator and the data's owner.",
        )
        self.leaf = leaf


class _Planned(NamedTuple):
    """What requests that are alike are charged to, until a limit changes. `facts` is kept so that its id is its own.

    `accounts` are (ref, ceilings, loss, direct budget); the first of them to expire does so at `expires`.
    """

    facts: entries.ChargeReserved
    accounts: tuple[tuple[str, Vector, Vector, int], ...]
    expires: int | None
    opened: OpenCharge


class Books:
    """The state after some leaves. `draft` is the same state with room for leaves that may yet be undone."""

    def __init__(self, base: Books | None = None) -> None:
        self.size: int = 0 if base is None else base.size
        self.log_keys: tuple[str, ...] = () if base is None else base.log_keys
        self._pending: str | None = None if base is None else base._pending
        self.owners: MutableMapping[str, str] = _layer(base and base.owners)
        self.terms: MutableMapping[str, TermsBook] = _layer(base and base.terms)
        self.gaps: Mapping[str, Gap] = {} if base is None else base.gaps
        self.populations: MutableMapping[str, PopulationBook] = _layer(base and base.populations)
        self.datasets: MutableMapping[str, DatasetBook] = _layer(base and base.datasets)
        self.accounts: MutableMapping[str, AccountBook] = _layer(base and base.accounts)
        self.held: MutableMapping[str, Held] = _layer(base and base.held)
        self.open_charges: MutableMapping[str, OpenCharge | None] = _layer(base and base.open_charges)
        self._plans: dict[int, _Planned] = {}

    def draft(self) -> Books:
        """A layer over this state: what is applied to it changes nothing here until `take`."""
        return Books(self)

    def take(self, draft: Books) -> None:
        """Make a draft's changes this state's own."""
        self.size, self.log_keys, self._pending = draft.size, draft.log_keys, draft._pending
        self.gaps = draft.gaps
        self._plans.clear()
        for mine, changed in (
            (self.owners, draft.owners),
            (self.terms, draft.terms),
            (self.populations, draft.populations),
            (self.datasets, draft.datasets),
            (self.accounts, draft.accounts),
            (self.held, draft.held),
            (self.open_charges, draft.open_charges),
        ):
            _merge(mine, changed)
        for charge in [name for name, found in self.open_charges.items() if found is None]:
            self._close(charge)

    def apply(self, leaf: entries.LeafBody) -> None:
        """Go on by one leaf. Raises BooksError; the state is then not to be used any more."""
        self.go_on(leaf.index, leaf.at, leaf.facts)

    def go_on(self, index: int, at: int, facts: entries.Entry, charge: str | None = None) -> None:
        """As `apply`, of a leaf's parts. `charge` stands for the one in `facts`, which many alike may share."""
        if index != self.size:
            raise BooksError(self.size, facts.kind, f"Entry {index} stands in its place.")
        if (self._pending is not None) != isinstance(facts, entries.LimitsSet):
            raise BooksError(index, facts.kind, "A policy's limits don't follow it at once.")
        try:
            if isinstance(facts, entries.ChargeReserved):
                self._reserved(facts, at, charge)
            elif isinstance(facts, entries.ChargeSettled):
                self._settle(charge or facts.charge, facts.steps, given_back=facts.state == "released")
            elif isinstance(facts, entries.Released):
                self._released(facts, charge or facts.charge)
            elif (rule := _RULES.get(type(facts))) is not None:
                self._plans.clear()
                rule(self, facts)
        except _Wrong as error:
            raise BooksError(index, facts.kind, str(error)) from None
        self.size += 1

    def _started(self, facts: entries.GuardStarted) -> None:
        if facts.previous_key != (self.log_keys[-1] if self.log_keys else None):
            raise _Wrong("It goes on from another log key than the last start's.")
        if facts.log_key in self.log_keys:
            raise _Wrong("Its log key was used before.")
        self.log_keys = (*self.log_keys, facts.log_key)

    def _terms(self, facts: entries.OwnerTermsSet) -> None:
        self._pin(facts.owner, facts.owner_key)
        known = self.terms.get(facts.owner)
        if facts.version != (1 if known is None else known.version + 1):
            raise _Wrong("It isn't the next version of the owner's terms.")
        if known is None and any(each.owner == facts.owner for each in self.populations.values()):
            raise _Wrong("The owner had data here before, which no witness guards.")
        if known is not None and known.unlock != facts.unlock:
            raise _Wrong("It names another key to the owner's data, which nothing that is stored would open with.")
        self.terms[facts.owner] = TermsBook(facts.version, facts.witness, facts.unlock)

    def _unlocked(self, facts: entries.Unlocked) -> None:
        known = self.terms.get(facts.owner)
        if known is None or known.witness != facts.witness or facts.size > self.size:
            raise _Wrong("It isn't the owner's witness that unlocked the data, or it saw another log.")

    def _restored(self, facts: entries.Restored) -> None:
        if facts.first > self.size:
            raise _Wrong("It restores more than there was.")
        # Whoever hasn't accepted an earlier restore yet is asked for both: a small one hides no large one.
        first = {owner: min(facts.first, gap.first) for owner, gap in self.gaps.items()}
        self.gaps = {
            owner: Gap(restored=self.size, first=first.get(owner, facts.first), end=self.size) for owner in self.owners
        }

    def _accepted(self, facts: entries.GapAccepted) -> None:
        gap = self.gaps.get(facts.owner)
        if gap is None or gap.restored != facts.restored or self.owners.get(facts.owner) != facts.owner_key:
            raise _Wrong("No such restore waits for this owner's signature.")
        self.gaps = {owner: each for owner, each in self.gaps.items() if owner != facts.owner}

    def _opened(self, facts: entries.PopulationOpened) -> None:
        if facts.population in self.populations:
            raise _Wrong("The population is there already.")
        self._pin(facts.owner, facts.owner_key)
        first = all(known.owner != facts.owner for known in self.populations.values())
        if first != (facts.statement is None):
            raise _Wrong("An owner's second population needs a signed statement, and the first has none.")
        try:
            orders = Orders(facts.orders, facts.shares)
        except ValueError as error:
            raise _Wrong(f"Its orders can't be: {error}.") from None
        self.populations[facts.population] = PopulationBook(
            facts.population, facts.owner, facts.owner_key, orders, facts.parts
        )

    def _uploaded(self, facts: entries.Uploaded) -> None:
        population = self._population(facts.population)
        if facts.owner_key != population.owner_key:
            raise _Wrong("It was uploaded with another owner key than the one that opened the population.")
        if (facts.keys == "owner") != (population.owner in self.terms):
            raise _Wrong("Its keys aren't held by whom the owner's terms say.")
        known = self.datasets.get(facts.dataset)
        if known is None:
            known = DatasetBook(facts.dataset, facts.population, 0, "")
            self.populations[facts.population] = replace(population, datasets=(*population.datasets, facts.dataset))
        elif known.population != facts.population:
            raise _Wrong("A dataset's versions must be about the same population.")
        if facts.version != known.version + 1:
            raise _Wrong(f"It is version {facts.version}, and the next one is {known.version + 1}.")
        self.datasets[facts.dataset] = replace(known, version=facts.version, data_schema=facts.data_schema)

    def _policy(self, facts: entries.PolicySet) -> None:
        known = self._dataset(facts.dataset)
        if facts.owner_key != self._population(known.population).owner_key:
            raise _Wrong("It is signed by another key than the one that opened the population.")
        if facts.version != known.policy + 1:
            raise _Wrong(f"It is version {facts.version}, and the next one is {known.policy + 1}.")
        self.datasets[facts.dataset] = replace(
            known,
            policy=facts.version,
            policy_digest=facts.policy,
            pending=facts.limits,
            bound=MappingProxyType({}),
        )
        self._pending = facts.dataset

    def _limits(self, facts: entries.LimitsSet) -> None:
        known = self._dataset(facts.dataset)
        if facts.dataset != self._pending or facts.version != known.policy or not known.pending:
            raise _Wrong("They belong to no policy that just came into force.")
        bound = dict(known.bound)
        for given in facts.limits:
            self._set_limit(known.population, given)
            for member in given.members:
                bound[member] = (*bound.get(member, ()), given.account)
        self.datasets[facts.dataset] = replace(known, pending=known.pending - 1, bound=MappingProxyType(bound))
        self._pending = facts.dataset if known.pending > 1 else None

    def _set_limit(self, name: str, given: entries.AccountLimit) -> None:
        population = self._population(name)
        if given.part >= population.parts:
            raise _Wrong("An account is for a part that its population doesn't have.")
        if (given.scope == "population") != (not given.members):
            raise _Wrong("An account binds nobody, or the population's own account names somebody.")
        account = self.accounts.get(given.account)
        if account is None:
            account = AccountBook(given.account, name, given.part, given.scope, None, (), 0)
            self.held[given.account] = Held((0,) * len(population.orders), 0)
        if (account.population, account.part, account.scope) != (name, given.part, given.scope):
            raise _Wrong("An account was another population's, part's or scope's before.")
        if given.scope == "population" and given.account not in population.scope_accounts:
            if any(self.accounts[each].part == given.part for each in population.scope_accounts):
                raise _Wrong("The population's part has an account already.")
            self.populations[name] = replace(population, scope_accounts=(*population.scope_accounts, given.account))
        self.accounts[given.account] = replace(
            account,
            limit=given.limit,
            ceilings=ceilings(limit_budgets(given.limit, population.orders)),
            direct_budget=direct_budget(given.limit),
        )

    def _reserved(self, facts: entries.ChargeReserved, at: int, charge: str | None) -> None:
        name = charge or facts.charge
        if self.open_charges.get(name) is not None:
            raise _Wrong("The charge is there already.")
        planned = self._plans.get(id(facts)) if charge is not None else None
        if planned is None:
            planned = self._plan(facts)
            if charge is not None:
                self._plans[id(facts)] = planned
        if planned.expires is not None and at >= planned.expires:
            raise _Wrong("An account that it is charged to has expired.")
        direct, held = facts.direct, self.held
        for account, highest, loss, direct_highest in planned.accounts:
            lost, direct_lost = held[account]
            after = tuple(map(add, lost, loss))
            if not (within(highest, after) and admits_direct(direct_highest, direct_lost, 0, direct)):
                raise _Wrong("It is over the limit of an account.")
            held[account] = Held(after, direct_lost + direct)
        self.open_charges[name] = planned.opened

    def _plan(self, facts: entries.ChargeReserved) -> _Planned:
        """What the request must be charged to by the limits that are in force, and is: with what loss."""
        if facts.steps != (facts.mechanism.steps if isinstance(facts.mechanism, DpSgd) else None):
            raise _Wrong("Its steps aren't its mechanism's.")
        self._check_losses(facts)
        for given in facts.losses:
            expected = self._charged(facts, given.population)
            if set(given.accounts) != expected or len(given.accounts) != len(expected):
                raise _Wrong("It isn't charged to every account that binds its user, each once.")
        if {given.population for given in facts.losses} != {self._dataset(s.dataset).population for s in facts.sources}:
            raise _Wrong("It isn't charged to the populations of its sources.")
        if len(facts.losses) != len(facts.sources):
            raise _Wrong("Two of its sources are about the same people.")
        charged = [(self.accounts[name], given.loss) for given in facts.losses for name in given.accounts]
        limits = [account.limit for account, _ in charged if account.limit is not None]
        if len(limits) < len(charged) or any(limit.over_cap(facts.epsilon) for limit in limits):
            raise _Wrong("An account has no limit, or caps one request below this one.")
        return _Planned(
            facts,
            tuple((account.ref, account.ceilings, loss, account.direct_budget) for account, loss in charged),
            min((limit.expires for limit in limits if limit.expires is not None), default=None),
            OpenCharge(tuple((given.accounts, given.loss) for given in facts.losses), facts.direct, facts.steps),
        )

    def _charged(self, facts: entries.ChargeReserved, name: str) -> set[str]:
        """The accounts of the population `name` that the request must be charged to."""
        population = self._population(name)
        if population.owner in self.gaps:
            raise _Wrong("The owner of its data hasn't accepted a restore.")
        source = next((each for each in facts.sources if self._dataset(each.dataset).population == name), None)
        if source is None:
            raise _Wrong("It is charged to a population that it isn't about.")
        dataset = self._dataset(source.dataset)
        asked = (source.version, source.data_schema, source.policy_version, source.policy)
        if asked != (dataset.version, dataset.data_schema, dataset.policy, dataset.policy_digest):
            raise _Wrong("It was admitted under a policy or a version that isn't the one in force.")
        own = [each for one in population.datasets for each in self.datasets[one].bound.get(facts.user, ())]
        if not own:
            raise _Wrong("No policy in force gives its user an account.")
        found = {*own, *population.scope_accounts}
        return {each for each in found if source.part is None or self.accounts[each].part == source.part}

    def _check_losses(self, facts: entries.ChargeReserved) -> None:
        """That what is charged is the mechanism's loss at the orders that the log froze, whatever the database says."""
        for given in facts.losses:
            if _loss_of(facts.mechanism, self._population(given.population).orders) != given.loss:
                raise _Wrong("Its loss isn't its mechanism's.")
        if direct_delta(facts.mechanism) != facts.direct:
            raise _Wrong("Its direct delta isn't its mechanism's.")

    def _released(self, facts: entries.Released, name: str) -> None:
        charge = self.open_charges.get(name)
        if charge is not None and facts.steps != charge.steps:
            raise _Wrong("A training's model leaves, and not all of its steps were paid.")
        self._settle(name, facts.steps, given_back=False)

    def _settle(self, name: str, steps: int | None, *, given_back: bool) -> None:
        charge = self.open_charges.get(name)
        if charge is None:
            raise _Wrong("There is no such charge, or it is settled already.")
        if (charge.steps is None) != (steps is None) and not (given_back and steps is None):
            raise _Wrong("Steps are a training's, and of a training their number must be said.")
        if given_back and steps:
            raise _Wrong("A charge of which something was executed was given back.")
        executed = 0 if given_back else steps
        if charge.steps is not None and not 0 <= (executed or 0) <= charge.steps:
            raise _Wrong("More steps were executed than were paid.")
        self._close(name)
        if executed is None:
            return
        for accounts, whole in charge.losses:
            rest = tuple(map(sub, whole, _part(whole, executed, charge.steps)))
            direct = charge.direct - _part((charge.direct,), executed, charge.steps)[0]
            for each in accounts:
                held = self.held[each]
                self.held[each] = Held(tuple(map(sub, held.loss, rest)), held.direct - direct)

    def _close(self, charge: str) -> None:
        if isinstance(self.open_charges, dict):
            del self.open_charges[charge]
        else:
            self.open_charges[charge] = None

    def _pin(self, owner: str, key: str) -> None:
        if owner not in self.owners and key in self.owners.values():
            raise _Wrong("The owner's key speaks for another owner already.")
        if self.owners.setdefault(owner, key) != key:
            raise _Wrong("The owner's key isn't the one that was pinned.")

    def _population(self, ref: str) -> PopulationBook:
        found = self.populations.get(ref)
        if found is None:
            raise _Wrong("It names a population that was never opened.")
        return found

    def _dataset(self, ref: str) -> DatasetBook:
        found = self.datasets.get(ref)
        if found is None:
            raise _Wrong("It names a dataset that was never uploaded.")
        return found


class _Wrong(Exception):
    """Why a leaf doesn't hold, in a sentence for people."""


@lru_cache(maxsize=4096)
def _loss_of(mechanism: Mechanism, orders: Orders) -> Vector:
    return rdp_vector(mechanism, orders)


def _part(whole: Vector, steps: int, total: int | None) -> Vector:
    return part_of(whole, steps, total or 1)


def _layer(base: Any) -> Any:
    return {} if base is None else Layer({}, base)


def _merge(mine: MutableMapping[str, Any], draft: Any) -> None:
    mine.update(draft.maps[0])


_RULES: Mapping[type, Callable[[Books, Any], None]] = {
    entries.GuardStarted: Books._started,
    entries.OwnerTermsSet: Books._terms,
    entries.Unlocked: Books._unlocked,
    entries.Restored: Books._restored,
    entries.GapAccepted: Books._accepted,
    entries.PopulationOpened: Books._opened,
    entries.Uploaded: Books._uploaded,
    entries.PolicySet: Books._policy,
    entries.LimitsSet: Books._limits,
}
"""What moves a limit or a key, beside the charges, which move balances; every other entry stands for itself."""
