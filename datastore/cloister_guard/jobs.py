"""Training jobs: checked on synthetic rows, paid, run in a worker, settled from the steps that were marked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import anyio.to_thread
import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from cloister_budget.calibrate import noise_multiplier
from cloister_budget.policy import halted
from cloister_budget.tables import ChargeRow, JobRow, ReleaseRow
from cloister_data.datasets import joint_title
from cloister_data.errors import ConflictError, NotFoundError, PolicyRefusedError, UnavailableError
from cloister_data.events import JobEvent
from cloister_data.mechanism import DpSgd
from cloister_data.policy import Platform, Policy
from cloister_data.statistics import CostView
from cloister_data.training import JobList, JobView, RehearsalReport, TrainingPlan, TrainingRequest
from cloister_guard.access import Source, admit, load_sources, refuse_halted, release_delta
from cloister_guard.answers import WorkerPool
from cloister_guard.charging import Charging, Price, price
from cloister_guard.datasets.store import DatasetStore, SourceFile, StoredFile
from cloister_guard.events import EventHub
from cloister_guard.identity import Caller
from cloister_guard.models import ModelStore
from cloister_guard.owners import owners_of
from cloister_guard.release import Answer, ReleaseDesk
from cloister_guard.training.facts import PreparedFacts
from cloister_guard.worker.process import Worker

logger = structlog.get_logger()

LISTED_JOBS = 1_000
TICK_SECONDS = 5.0
TICK_SHARE = 0.05
"""Users see progress in steps of 5%, and no oftener than every 5 seconds: its pace follows batch sizes (private)."""


@dataclass
class _Running:
    task: asyncio.Task[None] | None = None
    user: str = ""
    datasets: frozenset[str] = frozenset()
    cancelled: bool = False
    stopped: Literal["", "suspended", "locked"] = ""
    marked: int = 0
    shown: int = 0
    shown_at: float = field(default_factory=time.monotonic)


class Jobs:
    """The flows of `/jobs` and `/rehearsals`."""

    def __init__(
        self,
        charging: Charging,
        releases: ReleaseDesk,
        store: DatasetStore,
        models: ModelStore,
        pool: WorkerPool,
        events: EventHub,
        platform: Platform,
    ) -> None:
        self._charging = charging
        self._releases = releases
        self._store = store
        self._models = models
        self._pool = pool
        self._events = events
        self._platform = platform
        self._running: dict[str, _Running] = {}
        self._pricing: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    @property
    def workers_busy(self) -> int:
        return self._pool.busy

    @property
    def running(self) -> int:
        """How many trainings are under way."""
        return len(self._running)

    async def _load(self, caller: Caller, plan: TrainingPlan) -> tuple[tuple[Source, ...], int]:
        """(the sources, how many units they have together). A stated epsilon is put to the policies at once."""
        sources = await self._charging.read(lambda session: load_sources(session, caller, plan.sources))
        if plan.epsilon is not None:
            admit(sources, caller, operation="train", epsilon=plan.epsilon, platform=self._platform)
        return sources, sum(self._store.public_units(source.version, source.ref) for source in sources)

    async def _price(
        self, caller: Caller, plan: TrainingPlan, sources: tuple[Source, ...], steps: int, sample_rate: float
    ) -> Price:
        """The price of a plan, admitted by every policy. Solving for the noise takes a second or two: in a thread."""
        delta = release_delta(sources)

        def solve() -> Price:
            if plan.epsilon is None:
                sigma = plan.noise_multiplier or 0.0
            else:
                sigma = noise_multiplier(plan.epsilon, delta, sample_rate, steps)
            return price(DpSgd(noise_multiplier=sigma, sample_rate=sample_rate, steps=steps), sources)

        # One at a time for each user: some plans take half a minute, and all threads at it would stall the guard.
        async with self._pricing[caller.user]:
            found = await anyio.to_thread.run_sync(solve)
        admit(sources, caller, operation="train", epsilon=found.epsilon, platform=self._platform)
        return found

    async def _prepare(
        self, worker: Worker, caller: Caller, plan: TrainingPlan, sources: tuple[Source, ...], units: int
    ) -> tuple[Price, PreparedFacts]:
        graph, weights = await anyio.to_thread.run_sync(self._models.load, caller.user, plan.model)
        facts = await worker.prepare(plan, sources[0].data_schema, graph, weights, units)
        return await self._price(caller, plan, sources, facts.steps, facts.sample_rate), facts

    async def cost(self, caller: Caller, plan: TrainingPlan) -> CostView:
        """What the training would cost, from the plan and public sizes alone; the model isn't looked at."""
        sources, units = await self._load(caller, plan)
        cost = await self._price(caller, plan, sources, plan.steps(units), plan.sample_rate(units))
        view = await self._charging.read(lambda session: self._charging.quote(session, caller, sources, cost))
        return view.model_copy(update={"steps": plan.steps(units)})

    async def rehearse(self, caller: Caller, plan: TrainingPlan) -> RehearsalReport:
        """The same job on mock rows in the same worker: every mistake shows, nothing is charged, no data is opened."""
        sources, units = await self._load(caller, plan)
        async with self._pool.worker() as worker:
            cost, facts = await self._prepare(worker, caller, plan, sources, units)
            mechanism = cost.mechanism
            if not isinstance(mechanism, DpSgd):
                raise TypeError("a training is priced as DP-SGD")
            measured = await worker.rehearse()
            fits = await self._charging.read(lambda session: self._charging.quote(session, caller, sources, cost))
        return RehearsalReport(
            mechanism=mechanism,
            epsilon=cost.epsilon,
            delta=cost.delta,
            steps=mechanism.steps,
            units=units,
            seconds=measured.seconds,
            memory_bytes=measured.memory_bytes,
            parameters=facts.parameters,
            outputs=facts.outputs,
            notes=measured.notes if fits.admitted else (*measured.notes, fits.why_not),
        )

    async def submit(self, caller: Caller, request: TrainingRequest) -> JobView:
        """Check, pay and start a training. Answers once it runs; every refusal comes before the charge."""
        earlier = await self._charging.read(lambda session: self._earlier(session, caller, request))
        if earlier is not None:
            return earlier
        plan = request.plan
        sources, units = await self._load(caller, plan)
        async with contextlib.AsyncExitStack() as stack:
            worker = await stack.enter_async_context(self._pool.worker())
            files = [self._store.source_file(source.version, source.ref) for source in sources]
            cost, _ = await self._prepare(worker, caller, plan, sources, units)
            await self._charging.check(caller, sources, cost)
            job = secrets.token_hex(16)
            running = _Running(user=caller.user, datasets=frozenset(source.row.name for source in sources))

            def work(session: Session) -> tuple[str, JobView]:
                reserved = self._charging.reserve(
                    session, caller, sources, cost, request.request_id, plan, "train", "train"
                )
                if not reserved.fresh:
                    raise ConflictError("This training was sent twice at once.", next_step="cloister.jobs() lists it.")
                session.add(
                    JobRow(
                        id=job,
                        charge=reserved.charge_id,
                        user=caller.user,
                        plan_json=plan.model_dump_json(),
                        state="running",
                        steps_done=0,
                        release=None,
                        code="",
                        created=int(time.time()),
                    )
                )
                session.flush()
                return reserved.charge_id, self._view(session, job)

            # Known before it is paid, so that a suspension that comes right after finds it.
            self._running[job] = running
            try:
                charge, view = await self._charging.write(work)
            except BaseException:
                del self._running[job]
                raise
            # The worker outlives this request: the job's task closes it.
            running.task = asyncio.create_task(
                self._run(job, charge, worker, stack.pop_all(), caller, sources, files, plan, cost), name=f"job {job}"
            )
        self._events.publish(JobEvent(job=view), frozenset({caller.user}))
        await self._charging.announce(caller.user, sources)
        return view

    async def _run(
        self,
        job: str,
        charge: str,
        worker: Worker,
        stack: contextlib.AsyncExitStack,
        caller: Caller,
        sources: tuple[Source, ...],
        files: list[SourceFile],
        plan: TrainingPlan,
        cost: Price,
    ) -> None:
        mechanism = cost.mechanism
        if not isinstance(mechanism, DpSgd):
            raise TypeError("a training is priced as DP-SGD")

        owners = owners_of([source.row.name for source in sources])

        async def on_mark(steps: int) -> None:
            def mark(session: Session) -> None:
                # Asked of the database too: another guard may have taken the policy that suspends.
                refuse_halted(session, sources, caller.user)
                self._charging.owners.require(owners)
                self._charging.ledger.mark(session, charge, steps)

            await self._charging.write(mark)
            self._running[job].marked = steps

        async def on_progress(steps: int) -> None:
            await self._tick(job, caller.user, steps, mechanism.steps)

        stored: StoredFile | None = None
        try:
            async with stack:
                await self._charging.read(lambda session: refuse_halted(session, sources, caller.user))
                weights = await worker.train(files, mechanism.noise_multiplier, on_mark, on_progress)
            stored = await anyio.to_thread.run_sync(
                lambda: self._store.write_result(weights, charge=charge, owners=owners)
            )
            answer = Answer(
                charge=charge,
                user=caller.user,
                request_digest=plan.digest(),
                kind="model",
                title=f"model for {plan.target!r} trained on {joint_title(plan.sources)}",
                sources=tuple(source.as_version for source in sources),
                mechanism=mechanism,
                epsilon=cost.epsilon,
                delta=cost.delta,
                weights=stored,
            )

            def finish(session: Session) -> None:
                refuse_halted(session, sources, caller.user)
                self._finish(session, job, answer)

            await self._charging.write(finish)
        except (PolicyRefusedError, UnavailableError) as error:
            self._running[job].stopped = "suspended" if isinstance(error, PolicyRefusedError) else "locked"
            if stored is not None:
                self._store.discard(stored)
            await self._end(job, charge)
        except asyncio.CancelledError:
            await asyncio.shield(self._end(job, charge))
        except Exception as error:
            logger.error("job failed", job=job, kind=type(error).__name__)
            if stored is not None:
                self._store.discard(stored)
            await self._end(job, charge)
        finally:
            self._running.pop(job, None)
        await self._show(job, caller.user)
        await self._charging.announce(caller.user, sources)

    def _finish(self, session: Session, job: str, answer: Answer) -> None:
        release = self._releases.record(session, answer)
        # Read once the charge is locked: a cancel that came first has closed the job, and nothing may be released.
        row = session.get_one(JobRow, job, populate_existing=True)
        if row.state != "running":
            raise ConflictError("The job was stopped.")
        row.state, row.release, row.steps_done = (
            "done",
            release.release,
            session.get_one(ChargeRow, answer.charge).steps_marked,
        )

    async def _end(self, job: str, charge: str) -> None:
        """Close a job that has no result: marked steps stay spent, the others come back."""
        running = self._running.get(job)
        state, code = "failed", "job-failed"
        if running is not None and running.stopped:
            state, code = "cancelled", running.stopped
        elif running is not None and running.cancelled:
            state, code = "cancelled", ""

        def work(session: Session) -> None:
            self._charging.ledger.commit(session, charge)
            row = session.get_one(JobRow, job, populate_existing=True)
            if row.state != "running":
                return  # It finished in the moment in which it was stopped.
            row.state, row.code = state, code
            session.flush()
            self._charging.log_settled(session, charge, marked=running.marked if running else 0)

        await self._charging.write(work)

    async def _tick(self, job: str, user: str, steps: int, total: int) -> None:
        running = self._running.get(job)
        if running is None:
            return
        coarse = int(steps / total / TICK_SHARE) * max(1, int(total * TICK_SHARE))
        now = time.monotonic()
        if coarse <= running.shown or now - running.shown_at < TICK_SECONDS:
            return
        running.shown, running.shown_at = min(coarse, total), now

        def work(session: Session) -> None:
            session.get_one(JobRow, job).steps_done = running.shown

        await self._charging.write(work)
        await self._show(job, user)

    async def _show(self, job: str, user: str) -> None:
        view = await self._charging.read(lambda session: self._view(session, job))
        self._events.publish(JobEvent(job=view), frozenset({user}))

    async def cancel(self, caller: Caller, job: str) -> JobView:
        """Stop a job. Its marked steps stay spent, the rest comes back."""
        view = await self.view(caller, job)
        running = self._running.get(job)
        if view.state == "running" and running is not None and running.task is not None:
            running.cancelled = True
            await asyncio.sleep(0)  # A task that is cancelled before its first step would leave its worker running.
            running.task.cancel()
            await asyncio.wait({running.task})
        return await self.view(caller, job)

    async def suspend(self, policy: Policy) -> None:
        """End at once every job that a policy, which is in force already, suspends. Marked steps stay spent."""
        await self._end_all(
            "suspended", lambda running: policy.dataset in running.datasets and bool(halted(policy, running.user))
        )

    async def lock(self, owner: str) -> None:
        """End at once every job on an owner's data, which have been locked. Marked steps stay spent."""
        await self._end_all("locked", lambda running: owner in owners_of(running.datasets))

    async def _end_all(self, code: Literal["suspended", "locked"], which: Callable[[_Running], bool]) -> None:
        ending = []
        for running in self._running.values():
            if which(running):
                running.stopped = code
                if running.task is not None:
                    running.task.cancel()
                    ending.append(running.task)
        if ending:
            await asyncio.wait(ending)

    async def stop(self) -> None:
        """End every job because the guard stops; the next start settles them from their marks."""
        tasks = [running.task for running in self._running.values() if running.task is not None]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def view(self, caller: Caller, job: str) -> JobView:
        def work(session: Session) -> JobView:
            self._own(session, caller, job)
            return self._view(session, job)

        return await self._charging.read(work)

    async def list(self, caller: Caller) -> JobList:
        """The newest jobs of this user, oldest first."""

        def work(session: Session) -> JobList:
            newest = session.scalars(
                select(JobRow)
                .where(JobRow.user == caller.user)
                .order_by(JobRow.created.desc(), JobRow.id.desc())
                .limit(LISTED_JOBS)
            ).all()
            return JobList(jobs=tuple(self._view(session, row.id) for row in reversed(newest)))

        return await self._charging.read(work)

    async def result(self, caller: Caller, job: str) -> bytes:
        """The trained weights as safetensors. Raises UnavailableError while there are none."""

        def work(session: Session) -> tuple[ReleaseRow, StoredFile]:
            row = self._own(session, caller, job)
            if row.state != "done" or row.release is None:
                raise UnavailableError(
                    f"The job has no result: it is {row.state}.",
                    next_step="Wait for a running job with job.wait(); train again after a failed or cancelled one.",
                )
            release = session.get_one(ReleaseRow, row.release)
            if release.user != caller.user or release.file is None or release.wrapped_key is None:
                raise NotFoundError("This release has no weights.")
            return release, StoredFile(release.file, release.wrapped_key)

        row, stored = await self._charging.read(work)
        release = await self._releases.hand_out(self._releases.stored(row))
        # Only the weights that this very release was recorded for, whatever the rows say: others may not leave yet.
        charge = release.receipt.charge
        return await anyio.to_thread.run_sync(lambda: self._store.read_result(stored, charge=charge, owners=row.owners))

    def _own(self, session: Session, caller: Caller, job: str) -> JobRow:
        row = session.get(JobRow, job)
        if row is None or row.user != caller.user:
            raise NotFoundError("There is no such job of yours.", next_step="cloister.jobs() lists them.")
        return row

    def _earlier(self, session: Session, caller: Caller, request: TrainingRequest) -> JobView | None:
        charge = session.scalar(
            select(ChargeRow).where(ChargeRow.user == caller.user, ChargeRow.request_id == request.request_id)
        )
        if charge is None or charge.request_digest != request.plan.digest():
            return None
        row = session.scalar(select(JobRow).where(JobRow.charge == charge.id))
        return self._view(session, row.id) if row is not None else None

    def _view(self, session: Session, job: str) -> JobView:
        row = session.get_one(JobRow, job)
        charge = session.get_one(ChargeRow, row.charge)
        running = self._running.get(job)
        # While it runs, marks move with the batches' pace; users see the coarse figure.
        charged = row.steps_done if row.state == "running" else charge.steps_marked
        return JobView(
            job=job,
            kind="train",
            state="cancelling" if running is not None and (running.cancelled or running.stopped) else row.state,
            sources=TrainingPlan.from_json(row.plan_json).sources,
            created=row.created,
            steps=charge.steps_total or 0,
            steps_done=row.steps_done,
            charged_steps=charged,
            epsilon=charge.epsilon,
            delta=charge.delta,
            mechanism=DpSgd.model_validate(json.loads(charge.mechanism_json)),
            release=row.release,
            code=row.code,
        )


def close_dead_jobs(session: Session) -> None:
    """Jobs whose worker died with the last guard: the ledger has settled their charges, here they are closed."""
    for row in session.scalars(select(JobRow).where(JobRow.state == "running")):
        row.state, row.code = "failed", "guard-restarted"
