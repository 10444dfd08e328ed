"""The steps that every paid request shares: quote, reserve, settle. One transaction each, with its log leaf."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import anyio.to_thread
from sqlalchemy.orm import Session

from cloister_budget.database import Database
from cloister_budget.entries import ChargedSource, ChargeReserved, ChargeSettled, PopulationLoss
from cloister_budget.journal import Journal
from cloister_budget.ledger import Ledger, Reservation, Reserved
from cloister_budget.limits import population_of
from cloister_budget.loss import tight_epsilon
from cloister_budget.tables import Population
from cloister_data.audit import NameKind
from cloister_data.base import Wire
from cloister_data.errors import StorageError
from cloister_data.events import AccountEvent
from cloister_data.mechanism import DpSgd, Mechanism
from cloister_data.policy import Operation
from cloister_data.statistics import CostView
from cloister_guard.access import Source, hold_policies, parts_asked, populations, release_delta
from cloister_guard.events import EventHub
from cloister_guard.identity import Caller
from cloister_guard.owners import Owners, owners_of

T = TypeVar("T")


@dataclass(frozen=True)
class Price:
    """What a request will cost: a mechanism, and its tight epsilon at the sources' release delta."""

    mechanism: Mechanism
    epsilon: float
    delta: float


def price(mechanism: Mechanism, sources: Sequence[Source]) -> Price:
    """The mechanism's tight epsilon at the strictest owner's delta."""
    delta = release_delta(tuple(sources))
    return Price(mechanism, tight_epsilon(mechanism, delta), delta)


class Charging:
    """The ledger as the guard's request flows use it. Its methods are called from the event loop."""

    def __init__(self, database: Database, ledger: Ledger, journal: Journal, owners: Owners, events: EventHub) -> None:
        self.database = database
        self.ledger = ledger
        self.journal = journal
        self.owners = owners
        self._events = events

    async def write(self, work: Callable[[Session], T]) -> T:
        """Run `work` in one write transaction, off the event loop."""

        def run() -> T:
            with self.database.write() as session:
                return work(session)

        return await anyio.to_thread.run_sync(run)

    async def read(self, work: Callable[[Session], T]) -> T:
        def run() -> T:
            with self.database.read() as session:
                return work(session)

        return await anyio.to_thread.run_sync(run)

    def quote(self, session: Session, caller: Caller, sources: Sequence[Source], cost: Price) -> CostView:
        """What the request would cost and whether it fits now. Spends nothing."""
        accounts = self._accounts(session, caller, sources)
        quote = self.ledger.quote(session, cost.mechanism, accounts)
        return CostView(
            mechanism=cost.mechanism,
            epsilon=cost.epsilon,
            delta=cost.delta,
            expected_error=None,
            shares=quote.shares,
            admitted=quote.admitted,
            why_not="" if quote.admitted else f"It doesn't fit what is left in {quote.blocking}.",
        )

    async def check(self, caller: Caller, sources: Sequence[Source], cost: Price) -> None:
        """Raises BudgetRefusedError where `reserve` would, without holding anybody up; UnavailableError as well."""
        self._require(sources)

        def work(session: Session) -> None:
            accounts = self._accounts(session, caller, sources)
            self.ledger.check(session, cost.mechanism, cost.epsilon, cost.delta, accounts)

        await self.read(work)

    def reserve(
        self,
        session: Session,
        caller: Caller,
        sources: Sequence[Source],
        cost: Price,
        request_id: str,
        plan: Wire,
        kind: str,
        operation: Operation,
    ) -> Reserved:
        """Reserve the whole cost in every account, with a leaf. A repeated request id gives the earlier charge.

        The policies that admitted the request are held meanwhile: a suspension comes before the charge, which is then
        refused, or after it, and finds what it started. Raises UnavailableError where an owner's data are locked.
        """
        self._require(sources)
        hold_policies(session, tuple(sources), caller.user)
        request = plan.digest()
        reserved = self.ledger.reserve(
            session,
            Reservation(
                user=caller.user,
                request_id=request_id,
                request_digest=request,
                kind=kind,
                operation=operation,
                sandbox=caller.sandbox,
                mechanism=cost.mechanism,
                epsilon=cost.epsilon,
                delta=cost.delta,
                adjacency="zero-out",
                sources_json=json.dumps([source.as_version.model_dump() for source in sources]),
                accounts=self._accounts(session, caller, sources),
            ),
        )
        if reserved.fresh:
            self.journal.append(session, self._entry(session, caller, sources, cost, reserved, request, operation))
        return reserved

    def _require(self, sources: Sequence[Source]) -> None:
        self.owners.require(owners_of([source.row.name for source in sources]))

    def _accounts(self, session: Session, caller: Caller, sources: Sequence[Source]) -> list[str]:
        asked = tuple(sources)
        return self.ledger.account_ids(session, populations(asked), caller.user, parts_asked(asked))

    def _entry(
        self,
        session: Session,
        caller: Caller,
        sources: Sequence[Source],
        cost: Price,
        reserved: Reserved,
        request: str,
        operation: Operation,
    ) -> ChargeReserved:
        def ref(kind: NameKind, name: str) -> str:
            return self.journal.ref(session, kind, name)

        def part(source: Source) -> int | None:
            if source.ref.division is None:
                return None
            return session.get_one(Population, source.row.population).parts.index(source.ref.division)

        losses = []
        for name in populations(tuple(sources)):
            here = [account for account in reserved.losses if population_of(account) == name]
            losses.append(
                PopulationLoss(
                    population=ref("population", name),
                    loss=reserved.losses[here[0]],
                    accounts=tuple(ref("account", account) for account in here),
                )
            )
        mechanism = cost.mechanism
        return ChargeReserved(
            charge=reserved.charge_id,
            user=ref("user", caller.user),
            operation=operation,
            request=request,
            sandbox=caller.sandbox,
            sources=tuple(
                ChargedSource(
                    dataset=ref("dataset", source.row.name),
                    version=source.version.version,
                    data_schema=source.schema_digest,
                    policy_version=source.policy.version,
                    policy=source.policy_digest,
                    part=part(source),
                )
                for source in sources
            ),
            mechanism=mechanism,
            epsilon=cost.epsilon,
            delta=cost.delta,
            losses=tuple(losses),
            direct=reserved.direct,
            steps=mechanism.steps if isinstance(mechanism, DpSgd) else None,
        )

    def log_settled(self, session: Session, charge: str, marked: int = 0) -> None:
        """The leaf of a charge that the ledger has just settled without an answer.

        Raises StorageError where the database knows of fewer steps than the `marked` ones that this guard has run.
        """
        steps, state = self.ledger.settled(session, charge)
        if (steps or 0) < marked:
            raise StorageError(
                "The database knows of fewer steps than were run.", next_step="Stop the cloister, and ask the admin."
            )
        self.journal.append(session, ChargeSettled(charge=charge, state=state, steps=steps))

    async def settle(self, charge: str, *, executed: bool) -> None:
        """Close a charge without a release: what was executed stays spent, all of it comes back if nothing was."""

        def work(session: Session) -> None:
            if executed:
                self.ledger.commit(session, charge)
            else:
                self.ledger.refund(session, charge)
            self.log_settled(session, charge)

        await self.write(work)

    async def announce(self, user: str, sources: Sequence[Source]) -> None:
        """Tell the people concerned how the accounts stand that a request of `user` over these sources has changed."""
        names, parts = populations(tuple(sources)), parts_asked(tuple(sources))
        views = await self.read(lambda session: self.ledger.account_views(session, user, names))
        owners = {source.row.population: source.row.owner for source in sources}
        readers = {source.row.population: frozenset(source.policy.readers) for source in sources}
        for view in views:
            if view.part != parts.get(view.population, view.part):
                continue
            own = {view.user} if view.user else {*view.members} if view.scope == "group" else None
            watching = readers[view.population] if own is None else own
            self._events.publish(AccountEvent(account=view), frozenset({*watching, owners[view.population]}))
