"""One guard, put together: what each part is made of, in the order in which it starts."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy.orm import Session

from cloister_attest.collect import attester_for
from cloister_attest.evidence import Evidence
from cloister_budget.clock import last_written, steady_time
from cloister_budget.database import open_database
from cloister_budget.entries import Refused
from cloister_budget.journal import Journal
from cloister_budget.ledger import Ledger
from cloister_budget.log import AuditLog
from cloister_budget.orders import Orders
from cloister_budget.past import account_histories, past_requests
from cloister_budget.tables import Dataset, Population
from cloister_budget.whatif import PastRequest, replay
from cloister_data.accounts import AccountHistoryList, AccountView, WhatIf, WhatIfChange
from cloister_data.base import Wire
from cloister_data.datasets import PolicyView
from cloister_data.errors import BudgetRefusedError, CloisterError, NotFoundError, UnavailableError
from cloister_data.kernels import KernelLaunch, KernelView
from cloister_data.policy import Policy, SignedPolicy
from cloister_data.requests import BudgetAnswer, BudgetRequest, BudgetRequestView
from cloister_guard.access import visible_datasets
from cloister_guard.answers import Answers, WorkerPool
from cloister_guard.audit import AuditReader
from cloister_guard.catalogue import Catalogue
from cloister_guard.charging import Charging
from cloister_guard.config import GuardConfig
from cloister_guard.counts import FLUSH_SECONDS, Counts
from cloister_guard.datasets.keys import FileKeyProvider, KeyProvider, KeyRing, NoMachineKey
from cloister_guard.datasets.store import DatasetStore
from cloister_guard.events import EventHub
from cloister_guard.evidence import EvidenceDesk
from cloister_guard.identity import Caller, Identity
from cloister_guard.jobs import Jobs, close_dead_jobs
from cloister_guard.kernel_log import KernelLog
from cloister_guard.kernels import Kernels
from cloister_guard.leases import Leases
from cloister_guard.metrics import Metrics
from cloister_guard.models import ModelStore
from cloister_guard.owners import Owners
from cloister_guard.refusals import Refusals
from cloister_guard.release import ReleaseDesk
from cloister_guard.requests import Requests
from cloister_guard.restore import read_copy
from cloister_guard.staples import Staples
from cloister_guard.starts import Vouching
from cloister_guard.transfers import Transfers
from cloister_guard.uploads import UPLOADS_AT_ONCE, UploadReader
from cloister_guard.witness import WitnessDesk
from cloister_guard.worker.process import WorkerLimits

logger = structlog.get_logger()

VERSION = version("cloister")
WATCH_SECONDS = 0.25
LOGINS_AT_ONCE = 4
"""argon2id takes 64 MiB and a core for each; more at once would be a way to stall the guard."""
EVIDENCE_AT_ONCE = 4
EVIDENCE_WAITING = 64
"""A device makes one report at a time, as fast as its host lets it, for anybody who asks. More questions than these are
told to come again: each is asked in vain when its client has gone.
"""

T = TypeVar("T")


class Guard:
    """Every part of one running guard. Made once; `docs/protocol.md` says what it answers."""

    def __init__(self, config: GuardConfig) -> None:
        """Open the state. Raises ConfigurationError or StorageError before anything listens."""
        config.make_directories()
        attester = attester_for(config.platform, config.state_dir, config.writers())
        self.config = config
        self.database = open_database(config.database_url)
        log = AuditLog(Ed25519PrivateKey.generate(), origin=f"cloister/{config.name}", clock=steady_time)
        vouching = Vouching(attester.writers(), config.state_dir / "refused-evidence.json")
        self.journal = Journal(log, vouching)
        self.ledger = Ledger(steady_time)
        self.events = EventHub()
        self.counts = Counts()
        self.identity = Identity(self.database, self.journal, self.counts)
        staples = Staples(config.collateral_dir, config.reference_values)
        self.evidence = EvidenceDesk(attester, staples, vouching, self.database, self.journal, self.counts, config.name)
        self.audit = AuditReader(self.database, self.journal)
        self.leases = Leases(config.lease_seconds)
        self.owners = Owners(self.database, self.journal, self.leases)
        self.witness = WitnessDesk(
            self.database,
            self.journal,
            self.owners,
            self.leases,
            self.counts,
            bytes.fromhex(self.evidence.certificate_digest),
        )
        machine: KeyProvider = (
            FileKeyProvider(config.state_dir / "master.key", platform=config.platform)
            if config.platform == "simulated"
            else NoMachineKey()
        )
        keys = KeyRing(machine, self.owners.lent)
        self.store = DatasetStore(config.state_dir / "data", keys)
        if config.platform == "simulated":
            # A fault of the key file shows at the start, not at somebody's upload.
            self.store.machine_secret()
        self.models = ModelStore(config.state_dir / "models")
        limits = WorkerLimits(memory_bytes=config.worker_memory_mb << 20)
        self.catalogue = Catalogue(
            self.database,
            self.ledger,
            self.journal,
            self.owners,
            self.store,
            UploadReader(limits),
            self.evidence.simulated,
        )
        self.charging = Charging(self.database, self.ledger, self.journal, self.owners, self.events)
        self.requests = Requests(self.database, self.journal, self.catalogue, self.events)
        self.refusals = Refusals(config.refusals_per_minute, self._refused)
        releases = ReleaseDesk(self.database, self.ledger, self.journal, self.evidence, self.owners, self.leases, keys)
        self.answers = Answers(
            self.charging, releases, self.store, self.models, WorkerPool(config.max_queries, limits), config.platform
        )
        self.jobs = Jobs(
            self.charging,
            releases,
            self.store,
            self.models,
            WorkerPool(config.max_jobs, limits),
            self.events,
            config.platform,
        )
        self.kernels = Kernels(config.service_socket)
        self.kernel_log = KernelLog(self.charging, self.journal)
        self.transfers = Transfers(self.kernels, self.charging, self.journal, config.state_dir)
        self.metrics = Metrics(VERSION, config.platform)
        self.login_slots = asyncio.Semaphore(LOGINS_AT_ONCE)
        # Threads of their own: whoever floods a slow device with questions keeps the rest of the guard its threads.
        self._evidence_slots = anyio.CapacityLimiter(EVIDENCE_AT_ONCE)
        self._evidence_asked = 0
        # Threads of their own: owners who wait for each other keep nobody else waiting.
        self.upload_slots = anyio.CapacityLimiter(UPLOADS_AT_ONCE)
        # By user: a model or an upload takes some times its size in memory, so each user sends one after the other.
        self.large_bodies: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._paid: set[asyncio.Task[Any]] = set()

    def recover(self, restore: Path | None = None) -> None:
        """Put right what the last guard left: dead charges are settled from their marks, half uploads removed.

        Where the database is a backup, `restore` is the directory of a copy of the log with what it lacks. Raises
        ConfigurationError where it can't be used.
        """
        copy = None
        with self.database.read() as session:
            steady_time.not_before(last_written(session))
            self.journal.open(session, lambda done, total: logger.info("reading the audit log", done=done, of=total))
            if restore is not None:
                copy = read_copy(restore, self.journal.end())
        self.evidence.record_start(copy)
        if self.config.bootstrap is not None:
            self.identity.bootstrap(self.config.bootstrap.admin, self.config.bootstrap.password_hash)
        with self.database.write() as session:
            settled = self.ledger.settle_dead(session)
            close_dead_jobs(session)
            session.flush()
            for charge in settled:
                self.charging.log_settled(session, charge)
        self.catalogue.discard_orphans()

    async def show_evidence(self, nonce: bytes) -> Evidence:
        """Raises UnavailableError, also where too many have asked before."""
        # Not by the slots' own count: between its look and its turn others pass.
        if self._evidence_asked >= EVIDENCE_AT_ONCE + EVIDENCE_WAITING:
            raise UnavailableError("Too many ask for this cloister's evidence at once.", next_step="Try again soon.")
        self._evidence_asked += 1
        try:
            return await anyio.to_thread.run_sync(self.evidence.answer, nonce, limiter=self._evidence_slots)
        finally:
            self._evidence_asked -= 1

    async def watch(self) -> None:
        """Until it is cancelled: lock the data of owners whose witness is silent, and write down what was counted."""
        flushed = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for owner in self.leases.expire():
                logger.warning("an owner's witness is silent: the data are locked", owner=owner)
                self.store.forget()
                await self.jobs.lock(owner)
                await self._noted(lambda owner=owner: self.owners.locked(owner))  # type: ignore[misc]
            if time.monotonic() - flushed >= FLUSH_SECONDS:
                flushed = time.monotonic()
                await self._noted(self._write_counts)

    async def _noted(self, work: Callable[[], None]) -> None:
        """Write an entry about what has happened anyway: where the database refuses, the guard goes on."""
        try:
            await anyio.to_thread.run_sync(work)
        except CloisterError as error:
            logger.error("an event couldn't be written to the audit log", kind=type(error).__name__)

    def _write_counts(self) -> None:
        with self.database.write() as session:
            self.counts.write(session, self.journal)

    async def _refused(self, caller: Caller, request: Wire, error: CloisterError) -> None:
        """Write down that policy or budget refused a request. Without its entry a refusal isn't answered."""

        def work(session: Session) -> None:
            self.journal.append(
                session,
                Refused(
                    user=self.journal.ref(session, "user", caller.user),
                    code="budget-refused" if isinstance(error, BudgetRefusedError) else "policy-refused",
                    request=request.digest(),
                    sandbox=caller.sandbox,
                ),
            )

        await self.charging.write(work)

    async def start_kernel(self, caller: Caller, launch: KernelLaunch) -> KernelView:
        """Start a kernel, and write down how it is kept apart; one that can't be written down is ended."""
        view = await self.kernels.start(caller, launch)

        try:
            await self.kernel_log.started(caller, view.kernel, view.sandbox)
        except BaseException:
            await self.kernels.signal(caller, view.kernel, "end")
            raise
        return view

    async def paid(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a request that charges to its end, also when the client has gone: its charge must be settled."""
        task = asyncio.create_task(work)
        self._paid.add(task)
        task.add_done_callback(self._paid.discard)
        return await asyncio.shield(task)

    async def set_policy(self, caller: Caller, name: str, signed: SignedPolicy) -> PolicyView:
        """Put a policy in force, and end what it suspends."""
        view = await anyio.to_thread.run_sync(self.catalogue.set_policy, caller, name, signed)
        await self.jobs.suspend(view.signed.policy())
        return view

    async def ask_for_budget(self, caller: Caller, request: BudgetRequest) -> BudgetRequestView:
        view = await anyio.to_thread.run_sync(self.requests.ask, caller, request)
        self.requests.publish(view)
        return view

    async def answer_request(self, caller: Caller, request: str, answer: BudgetAnswer) -> BudgetRequestView:
        """Answer a request for more; where that puts a policy in force, end what it suspends."""
        view, policy = await anyio.to_thread.run_sync(self.requests.answer, caller, request, answer)
        self.requests.publish(view)
        if policy is not None:
            await self.jobs.suspend(policy)
        return view

    async def accounts(self, caller: Caller) -> list[AccountView]:
        """The accounts that concern this caller: an owner's populations whole, else the caller's own and the totals."""

        def work(session: Session) -> list[AccountView]:
            datasets = visible_datasets(session, caller, simulated=self.evidence.simulated)
            names: dict[str, list[str]] = {}
            for dataset in datasets:
                names.setdefault(dataset.population, []).append(dataset.name)
            owned = {dataset.population for dataset in datasets if dataset.owner == caller.user}
            # What fits takes milliseconds for each account: a scientist's request must not look at everybody's.
            views = self.ledger.account_views(session, caller.user, sorted(set(names) - owned))
            views += self.ledger.account_views(session, None, sorted(owned)) if owned else []
            return [
                view.model_copy(update={"datasets": tuple(names[view.population])})
                for view in sorted(views, key=lambda view: view.account)
            ]

        return await self.charging.read(work)

    async def histories(self, caller: Caller) -> AccountHistoryList:
        """How the accounts that concern this caller were used over time."""
        names = [view.account for view in await self.accounts(caller)]
        found = await self.charging.read(lambda session: account_histories(session, names))
        return AccountHistoryList(histories=tuple(found))

    async def what_if(self, caller: Caller, name: str, draft: Policy) -> WhatIf:
        """Put a dataset's past requests to a draft of its owner. Nothing is stored, nothing changes."""
        caller.require("owner")

        def load(session: Session) -> tuple[list[PastRequest], Orders, tuple[str, ...]]:
            row = session.get(Dataset, name)
            if row is None or row.owner != caller.user or draft.dataset != name:
                raise NotFoundError(f"There is no dataset {name!r} of yours here, or the draft is for another.")
            population = session.get_one(Population, row.population)
            past = past_requests(session, row.population)
            return past, Orders(population.orders, population.deltas), population.parts

        past, orders, parts = await self.charging.read(load)
        changes = await anyio.to_thread.run_sync(lambda: replay(past, draft, orders, self.config.platform, parts))
        return WhatIf(
            dataset=name,
            requests=sum(each.dataset == name for each in past),
            refused=len(changes),
            changes=tuple(
                WhatIfChange(
                    charge=each.past.charge, user=each.past.user, operation=each.past.operation,
                    epsilon=each.past.epsilon, created=each.past.at, rule=each.rule, reason=each.reason,
                )
                for each in changes[:1000]
            ),
        )  # fmt: skip

    async def stop(self) -> None:
        """End what runs. Charges that are not settled now are settled from their marks at the next start."""
        self.events.close()
        await self.jobs.stop()
        await self._noted(self._write_counts)
        for task in list(self._paid):
            task.cancel()
        if self._paid:
            await asyncio.wait(self._paid, timeout=5)
