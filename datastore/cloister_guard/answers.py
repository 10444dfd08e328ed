"""Statistics and evaluations: priced, paid, computed in a worker of their own, released."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

import anyio.to_thread
from sqlalchemy import select
from sqlalchemy.orm import Session

from cloister_budget.tables import ChargeRow, ReleaseRow
from cloister_data.base import Wire
from cloister_data.errors import ConflictError, NotFoundError, PolicyRefusedError, UnavailableError
from cloister_data.policy import Operation, Platform
from cloister_data.release import Release, ReleaseList
from cloister_data.statistics import CostView, Estimate, QueryCostRequest, QueryRequest, Question
from cloister_data.training import EvaluationRequest
from cloister_guard.access import Source, admit, load_sources, refuse_halted
from cloister_guard.charging import Charging, Price, price
from cloister_guard.datasets.store import DatasetStore, SourceFile
from cloister_guard.identity import Caller
from cloister_guard.models import ModelStore
from cloister_guard.release import Answer, ReleaseDesk
from cloister_guard.statistics.evaluation import plan_evaluation
from cloister_guard.statistics.plan import QueryPlan, plan
from cloister_guard.worker.process import Worker, WorkerLimits
from cloister_guard.worker.protocol import failure

QUEUE_SECONDS = 120.0
LISTED_RELEASES = 10_000
LISTED_BYTES = 64 << 20


@dataclass(frozen=True)
class _Asked:
    """A request as the ledger knows it: who, under which id, what, and its public title."""

    caller: Caller
    request_id: str
    plan: Wire
    kind: Literal["statistic", "evaluation"]
    title: str
    operation: Operation


class WorkerPool:
    """At most `limit` workers at once; whoever waits longer than QUEUE_SECONDS is told so and pays nothing."""

    def __init__(self, limit: int, limits: WorkerLimits) -> None:
        self._slots = asyncio.Semaphore(limit)
        self._limits = limits
        self.busy = 0

    @contextlib.asynccontextmanager
    async def worker(self) -> AsyncIterator[Worker]:
        try:
            async with asyncio.timeout(QUEUE_SECONDS):
                await self._slots.acquire()
        except TimeoutError:
            raise UnavailableError(
                "The cloister is busy with other requests.",
                why=f"No worker became free in {QUEUE_SECONDS:.0f} seconds.",
                next_step="Nothing was charged. Try again later.",
            ) from None
        self.busy += 1
        try:
            async with Worker.start(self._limits) as worker:
                yield worker
        finally:
            self.busy -= 1
            self._slots.release()


class Answers:
    """The flows of `POST /queries` and `POST /evaluations`."""

    def __init__(
        self,
        charging: Charging,
        releases: ReleaseDesk,
        store: DatasetStore,
        models: ModelStore,
        pool: WorkerPool,
        platform: Platform,
    ) -> None:
        self._charging = charging
        self._releases = releases
        self._store = store
        self._models = models
        self._pool = pool
        self._platform = platform

    @property
    def workers_busy(self) -> int:
        return self._pool.busy

    def _resolve_question(
        self, session: Session, caller: Caller, question: Question, epsilon: float
    ) -> tuple[tuple[Source, ...], QueryPlan, Price]:
        sources = load_sources(session, caller, (question.source,))
        admit(sources, caller, operation=question.operation, epsilon=epsilon, platform=self._platform)
        source = sources[0]
        units = self._store.public_units(source.version, source.ref)
        found = plan(question, source.data_schema, units, epsilon)
        return sources, found, price(found.mechanism, sources)

    async def cost(self, caller: Caller, request: QueryCostRequest) -> CostView:
        def work(session: Session) -> CostView:
            sources, found, cost = self._resolve_question(session, caller, request.question, request.epsilon)
            view = self._charging.quote(session, caller, sources, cost)
            return view.model_copy(update={"expected_error": max(found.errors_95)})

        return await self._charging.read(work)

    async def query(self, caller: Caller, request: QueryRequest) -> Release:
        """Answer a question. Raises BudgetRefusedError, PolicyRefusedError and the like before anything is charged."""
        sources, found, cost = await self._charging.read(
            lambda session: self._resolve_question(session, caller, request.question, request.epsilon)
        )
        asked = QueryCostRequest(question=request.question, epsilon=request.epsilon)
        return await self._answer(
            _Asked(caller, request.request_id, asked, "statistic", found.title, request.question.operation),
            sources,
            cost,
            lambda worker, files: worker.query(found, files),
        )

    async def evaluate(self, caller: Caller, request: EvaluationRequest) -> Release:
        """A model's metric on private rows, from one noisy aggregate."""
        plan = request.plan
        sources = await self._charging.read(lambda session: load_sources(session, caller, plan.sources))
        admit(sources, caller, operation="evaluate", epsilon=plan.epsilon, platform=self._platform)
        graph, weights = await anyio.to_thread.run_sync(self._models.load, caller.user, plan.model)
        units = sum(self._store.public_units(source.version, source.ref) for source in sources)
        found = plan_evaluation(plan, sources[0].data_schema, units)
        return await self._answer(
            _Asked(caller, request.request_id, plan, "evaluation", found.title, "evaluate"),
            sources,
            price(found.mechanism, sources),
            lambda worker, files: worker.evaluate(files),
            prepare=lambda worker: worker.prepare_evaluation(found, graph, weights),
        )

    async def _answer(
        self,
        asked: _Asked,
        sources: tuple[Source, ...],
        cost: Price,
        compute: Callable[[Worker, list[SourceFile]], Awaitable[list[Estimate]]],
        prepare: Callable[[Worker], Awaitable[object]] | None = None,
    ) -> Release:
        caller = asked.caller
        earlier = await self._charging.read(lambda session: self._paid(session, asked))
        if earlier is not None:
            return await self._releases.hand_out(earlier)
        async with self._pool.worker() as worker:
            # Whatever can fail without a look at the data fails here, before anything is charged.
            files = [self._store.source_file(source.version, source.ref) for source in sources]
            if prepare is not None:
                await prepare(worker)
            reserved = await self._charging.write(
                lambda session: self._charging.reserve(
                    session, caller, sources, cost, asked.request_id, asked.plan, asked.kind, asked.operation
                )
            )
            if not reserved.fresh:
                raise ConflictError(
                    "This request is being answered already, or it ended without an answer.",
                    why="Its request id was used before.",
                    next_step="cloister.history() shows what was answered; ask again with a new request id.",
                )
            try:
                estimates = await compute(worker, files)
            except Exception as error:
                # The charge stands, because an error tells something too, and says the same whatever its cause.
                await self._charging.settle(reserved.charge_id, executed=True)
                await self._charging.announce(caller.user, sources)
                raise failure() from error
        answer = Answer(
            charge=reserved.charge_id,
            user=caller.user,
            request_digest=asked.plan.digest(),
            kind=asked.kind,
            title=asked.title,
            sources=tuple(source.as_version for source in sources),
            mechanism=cost.mechanism,
            epsilon=cost.epsilon,
            delta=cost.delta,
            estimates=tuple(estimates),
        )

        def record(session: Session) -> Release:
            refuse_halted(session, sources, caller.user)
            return self._releases.record(session, answer)

        try:
            release = await self._charging.write(record)
        except (PolicyRefusedError, UnavailableError):
            # Suspended or locked while it was computed: it was executed, so it stays spent, and it doesn't leave.
            await self._charging.settle(reserved.charge_id, executed=True)
            raise
        finally:
            await self._charging.announce(caller.user, sources)
        return await self._releases.hand_out(release)

    def _paid(self, session: Session, asked: _Asked) -> Release | None:
        """The release of an earlier request with the same id and the same content: given again, free."""
        charge = session.scalar(
            select(ChargeRow).where(ChargeRow.user == asked.caller.user, ChargeRow.request_id == asked.request_id)
        )
        if charge is None or charge.request_digest != asked.plan.digest():
            return None
        row = session.scalar(select(ReleaseRow).where(ReleaseRow.charge == charge.id))
        return self._releases.stored(row) if row is not None else None

    async def history(self, caller: Caller) -> ReleaseList:
        """What this user has paid for, oldest first: the newest of it, as much as fits one answer."""

        def work(session: Session) -> list[ReleaseRow]:
            rows = session.scalars(
                select(ReleaseRow)
                .where(ReleaseRow.user == caller.user)
                .order_by(ReleaseRow.created.desc(), ReleaseRow.id.desc())
                .limit(LISTED_RELEASES)
                .execution_options(yield_per=100)
            )
            kept, size = [], 0
            for row in rows:
                size += len(row.body)
                if size > LISTED_BYTES:
                    break
                kept.append(row)
            return kept

        found = [await self._releases.ready(row) for row in reversed(await self._charging.read(work))]
        ready = tuple(release for release in found if release is not None)
        return ReleaseList(releases=ready, withheld=len(found) - len(ready))

    async def release(self, caller: Caller, release_id: str) -> Release:
        row = await self._charging.read(lambda session: session.get(ReleaseRow, release_id))
        if row is None or row.user != caller.user:
            raise NotFoundError("There is no such release of yours.", next_step="cloister.history() lists them.")
        return await self._releases.hand_out(self._releases.stored(row))
