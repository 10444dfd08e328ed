"""What changes while a request waits, and what is stopped at the worst moment: a guard inside the test, real but for
its workers, which do what each test says."""

import asyncio
import contextlib
import errno
import os
import secrets
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio.to_thread
import httpx
import numpy as np
import pytest
import safetensors.numpy
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister_budget import views
from cloister_budget.tables import JobRow
from cloister_data.datasets import Declaration, UploadView
from cloister_data.errors import BudgetRefusedError, ConflictError, StorageError
from cloister_data.events import AccountEvent
from cloister_data.framing import pack_body
from cloister_data.graph import InputRef, ModelGraph, Node, NodeRef, ParameterRef, TensorSpec
from cloister_data.identity import LoginRequest, NewUser
from cloister_data.owner import public_bytes, sign_policy, sign_terms
from cloister_data.policy import Policy
from cloister_data.schema import Schema
from cloister_data.statistics import Estimate, QueryRequest, Question
from cloister_data.terms import OwnerTerms, TermsRequest
from cloister_data.training import JobView, TrainingPlan, TrainingRequest
from cloister_guard import answers
from cloister_guard.config import GuardConfig
from cloister_guard.datasets.ingest import Format, read_rows
from cloister_guard.datasets.layout import put_table
from cloister_guard.datasets.store import StoredFile
from cloister_guard.guard import Guard
from cloister_guard.http.scientist import _while_signed_in
from cloister_guard.http.servers import kernel_app, laptop_app
from cloister_guard.identity import Caller
from cloister_guard.training.facts import PreparedFacts
from cloister_guard.uploads import UPLOADS_AT_ONCE
from cloister_guard.worker.shared import view, writable
from tests.fakes.data import PEOPLE, people
from tests.fakes.running import make_policy

ANN = Caller("ann", "scientist")
ROWS = 100
MODEL = pack_body(
    ModelGraph(
        input_shape=(2,),
        parameters=(TensorSpec(name="weight", shape=(2, 2), dtype="float32"),),
        trainable=("weight",),
        nodes=(Node(op="aten.linear.default", args=(InputRef(), ParameterRef(name="weight"))),),
        output=NodeRef(index=0),
    ).to_json(),
    safetensors.numpy.save({"weight": np.zeros((2, 2), np.float32)}),
)


class FakeWorker:
    """Ready at once; answers 1.0, and trains as `training` says."""

    training: Callable[..., Awaitable[bytes]] | None = None

    def __init__(self) -> None:
        self.open = True

    async def read(self, schema: Schema, data_format: Format, upload: int, answer: int) -> int:
        table = read_rows(view(upload), data_format, schema)
        put_table(table, lambda size: writable(answer, size))
        return table.num_rows

    async def query(self, *_: Any) -> list[Estimate]:
        return [Estimate(value=1.0, error_95=1.0)]

    async def prepare(self, plan: TrainingPlan, *_: Any) -> PreparedFacts:
        return PreparedFacts(
            parameters=6, trainable=6, outputs=2, units=ROWS, steps=plan.steps(ROWS),
            sample_rate=plan.sample_rate(ROWS), slots=8, bytes_bound=1,
        )  # fmt: skip

    async def train(self, *arguments: Any) -> bytes:
        assert FakeWorker.training is not None
        return await FakeWorker.training(*arguments)


class House:
    """One guard with two owners' datasets, and the workers that it has started."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.workers: list[FakeWorker] = []
        self.keys = {owner: Ed25519PrivateKey.generate() for owner in ("hosp-a", "hosp-b")}

    def publish(self, dataset: str, users: dict[str, float]) -> None:
        owner = dataset.split("/")[0]
        declaration = Declaration(
            dataset=dataset,
            population=dataset,
            data_schema=PEOPLE,
            data_format="csv",
            owner_key=public_bytes(self.keys[owner]),
            policy=sign_policy(make_policy(dataset, users), self.keys[owner]),
        )
        body = pack_body(declaration.to_json(), people(ROWS).to_csv(index=False).encode())
        self.guard.catalogue.upload(Caller(owner, "owner"), body)

    def change(self, policy: Policy) -> None:
        owner = policy.dataset.split("/")[0]
        signed = sign_policy(policy, self.keys[owner])
        self.guard.catalogue.set_policy(Caller(owner, "owner"), policy.dataset, signed)

    async def used(self) -> dict[str, tuple[float, float]]:
        views = await self.guard.accounts(ANN)
        return {view.account: (view.used_share, view.reserved_share) for view in views}

    def plan(self, **changes: object) -> TrainingPlan:
        model = self.guard.models.add("ann", MODEL).model
        given: dict[str, object] = {
            "sources": ({"dataset": "hosp-a/people"},), "model": model, "features": ("height", "age"), "target": "ill",
            "loss": "cross_entropy", "optimizer": {"name": "sgd", "lr": 0.1}, "epochs": 1, "batch_size": ROWS,
            "max_grad_norm": 1.0, "noise_multiplier": 20.0,
        }  # fmt: skip
        return TrainingPlan.model_validate(given | changes)

    async def submit(self, plan: TrainingPlan) -> JobView:
        return await self.guard.jobs.submit(ANN, TrainingRequest(request_id=secrets.token_hex(16), plan=plan))

    async def ask(self) -> object:
        question = Question.model_validate({"source": {"dataset": "hosp-a/people"}, "operation": "count"})
        return await self.guard.answers.query(
            ANN, QueryRequest(request_id=secrets.token_hex(16), question=question, epsilon=0.5)
        )


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    runtime = tempfile.TemporaryDirectory(prefix="clo-run-")  # pytest's own path is too long for a unix socket
    config = GuardConfig(
        name="races", listen="127.0.0.1:0", state_dir=tmp_path / "state", runtime_dir=Path(runtime.name),
        platform="simulated", max_queries=1, max_jobs=1,
    )  # fmt: skip
    guard = Guard(config)
    guard.recover()
    guard.identity.create(NewUser(user="ann", role="scientist", password="long enough"))
    found = House(guard)
    found.publish("hosp-a/people", {"ann": 5.0})

    @contextlib.asynccontextmanager
    async def start(*_: object) -> AsyncIterator[FakeWorker]:
        worker = FakeWorker()
        found.workers.append(worker)
        try:
            yield worker
        finally:
            worker.open = False

    monkeypatch.setattr(answers.Worker, "start", start)
    yield found
    guard.database.close()
    runtime.cleanup()


async def everything(
    sources: object, noise: float, on_mark: Callable[[int], Awaitable[None]], on_progress: object
) -> bytes:
    await on_mark(1)
    return b"weights"


async def nothing(*_: object) -> bytes:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


@pytest.mark.parametrize("change", ["revoked", "expired", "new data"])
def test_what_changed_while_a_request_waited_is_noticed_before_it_is_paid(
    house: House, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        before = await house.used()
        async with house.guard.answers._pool.worker():
            waiting = asyncio.create_task(house.ask())
            await asyncio.sleep(0.2)
            if change == "revoked":
                house.change(make_policy("hosp-a/people", {"bob": 1.0}, version=2))
            elif change == "expired":
                monkeypatch.setattr("cloister_guard.access.steady_time", lambda: 4e9)
            else:
                declaration = Declaration(
                    dataset="hosp-a/people", population="hosp-a/people", data_schema=PEOPLE, data_format="csv",
                    owner_key=public_bytes(house.keys["hosp-a"]),
                )  # fmt: skip
                body = pack_body(declaration.to_json(), people(ROWS + 1).to_csv(index=False).encode())
                await anyio.to_thread.run_sync(house.guard.catalogue.upload, Caller("hosp-a", "owner"), body)
        with pytest.raises(ConflictError):
            await waiting
        monkeypatch.undo()
        if change == "revoked":
            house.change(make_policy("hosp-a/people", {"ann": 5.0}, version=3))
        assert await house.used() == before

    if change == "expired":
        house.change(make_policy("hosp-a/people", {"ann": 5.0}, version=2, expires=3_000_000_000))
    asyncio.run(scenario())


def test_nothing_changed_is_answered(house: House) -> None:
    """The control: the same wait, and an answer."""

    async def scenario() -> None:
        async with house.guard.answers._pool.worker():
            waiting = asyncio.create_task(house.ask())
            await asyncio.sleep(0.1)
        await waiting

    asyncio.run(scenario())


def test_a_job_cancelled_in_its_first_moment_ends_its_worker(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeWorker, "training", nothing)
    reading = house.guard.charging.read

    async def slowly(work: Any) -> Any:
        name = asyncio.current_task().get_name()  # type: ignore[union-attr]
        if name.startswith("job "):
            await asyncio.sleep(0.3)
        return await reading(work)

    monkeypatch.setattr(house.guard.charging, "read", slowly)

    async def scenario() -> None:
        view = await house.submit(house.plan())
        assert (await house.guard.jobs.cancel(ANN, view.job)).state == "cancelled"
        assert [worker.open for worker in house.workers] == [False]
        assert all(reserved == 0 for _, reserved in (await house.used()).values())

    asyncio.run(scenario())


def test_a_job_whose_cancel_came_first_releases_nothing(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeWorker, "training", everything)
    jobs = house.guard.jobs
    finish = jobs._finish

    async def scenario() -> None:
        view = await house.submit(house.plan())

        def late(session: Any, job: str, answer: Any) -> None:
            jobs._charging.ledger.commit(session, answer.charge)
            session.get_one(JobRow, job).state = "cancelled"
            session.flush()
            finish(session, job, answer)

        monkeypatch.setattr(jobs, "_finish", late)
        task = jobs._running[view.job].task
        assert task is not None
        await asyncio.wait({task})
        assert (await jobs.view(ANN, view.job)).release is None
        assert (await house.guard.answers.history(ANN)).releases == ()

    asyncio.run(scenario())


def test_a_refused_training_is_refused_outside_of_the_write_transaction(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would fit takes seconds to find, and all writers wait for a write transaction."""
    plan = house.plan(noise_multiplier=0.5)
    monkeypatch.setattr(house.guard.charging, "write", None)

    async def scenario() -> None:
        with pytest.raises(BudgetRefusedError) as refused:
            await house.submit(plan)
        assert refused.value.budget is not None
        assert refused.value.budget.fits > 0

    asyncio.run(scenario())


def test_one_users_prices_are_found_one_after_the_other(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    running, most = 0, 0
    pricing = answers.anyio.to_thread.run_sync

    async def counted(work: Callable[..., Any], *more: Any, **options: Any) -> Any:
        nonlocal running, most
        if work.__name__ != "solve":
            return await pricing(work, *more, **options)
        running += 1
        most = max(most, running)
        try:
            await asyncio.sleep(0.01)
            return await pricing(work, *more, **options)
        finally:
            running -= 1

    monkeypatch.setattr("cloister_guard.jobs.anyio.to_thread.run_sync", counted)
    plan = house.plan()

    async def scenario() -> None:
        await asyncio.gather(*(house.guard.jobs.cost(ANN, plan) for _ in range(5)))

    asyncio.run(scenario())
    assert most == 1


def test_an_account_is_shown_to_its_own_populations_people_alone(house: House) -> None:
    house.publish("hosp-b/people", {"ann": 5.0, "eve": 1.0})

    async def scenario() -> None:
        published: list[tuple[str, frozenset[str]]] = []

        def publish(body: object, users: frozenset[str]) -> None:
            assert isinstance(body, AccountEvent)
            published.append((body.account.account, users))

        house.guard.charging._events.publish = publish  # type: ignore[method-assign,assignment]
        refs = ({"dataset": "hosp-a/people"}, {"dataset": "hosp-b/people"})
        sources, _ = await house.guard.jobs._load(ANN, house.plan(sources=refs))
        await house.guard.charging.announce("ann", sources)
        told = dict(published)
        assert told["hosp-a/people"] == {"ann", "hosp-a"}
        assert told["hosp-b/people"] == {"ann", "eve", "hosp-b"}

    asyncio.run(scenario())


def test_who_has_paid_for_very_much_still_gets_the_newest_of_it(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeWorker, "training", everything)
    monkeypatch.setattr(answers, "LISTED_RELEASES", 2)
    monkeypatch.setattr("cloister_guard.jobs.LISTED_JOBS", 2)
    plan = house.plan()

    async def scenario() -> None:
        asked = []
        for _ in range(3):
            asked.append(await house.ask())
            await house.submit(plan)
            await asyncio.gather(*(each.task for each in house.guard.jobs._running.values() if each.task))
        history = (await house.guard.answers.history(ANN)).releases
        assert len(history) == 2
        assert len((await house.guard.jobs.list(ANN)).jobs) == 2
        monkeypatch.setattr(answers, "LISTED_BYTES", 0)
        assert (await house.guard.answers.history(ANN)).releases == ()

    asyncio.run(scenario())


def test_a_scientists_accounts_are_found_without_everybody_elses(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.change(make_policy("hosp-a/people", {"ann": 5.0, **{f"user-{n}": 1.0 for n in range(50)}}, version=2))
    looked: list[str] = []
    view = views.account_view

    def counted(row: Any, *more: Any) -> Any:
        looked.append(row.id)
        return view(row, *more)

    monkeypatch.setattr(views, "account_view", counted)

    async def scenario() -> None:
        await house.guard.accounts(ANN)
        await house.ask()
        assert set(looked) == {"hosp-a/people", "hosp-a/people:ann"}
        assert len(await house.guard.accounts(Caller("hosp-a", "owner"))) == 52

    asyncio.run(scenario())


def test_one_users_large_bodies_are_read_one_after_the_other(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes some times its size in memory: many at once would end the guard."""
    inner = kernel_app(house.guard)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["cloister.caller"] = ANN
        await inner(scope, receive, send)

    async def scenario() -> None:
        go, pulled = asyncio.Event(), []

        async def sent(name: str) -> AsyncIterator[bytes]:
            pulled.append(name)
            yield MODEL[:10]
            await go.wait()
            yield MODEL[10:]

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://guard") as client:
            sends = [asyncio.create_task(client.post("/api/v1/models", content=sent(name))) for name in "ab"]
            await asyncio.sleep(0.2)
            assert pulled == ["a"]
            go.set()
            assert [answer.status_code for answer in await asyncio.gather(*sends)] == [201, 201]
            go.clear()
            monkeypatch.setattr("cloister_guard.http.messages.STALLED_SECONDS", 0.05)
            assert (await client.post("/api/v1/models", content=sent("stalled"))).status_code == 422
            go.set()
            assert (await client.post("/api/v1/models", content=sent("after it"))).status_code == 201

    asyncio.run(scenario())


def test_owners_whose_uploads_wait_keep_nobody_else_waiting(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many owners' uploads at once: a few are read, and the threads that others need stay free."""
    go, running, most = threading.Event(), [], []

    def upload(caller: Caller, body: bytes) -> UploadView:
        running.append(caller.user)
        most.append(len(running))
        assert go.wait(60)
        running.remove(caller.user)
        return UploadView(dataset=f"{caller.user}/d", version=1, rows=1, columns=("x",))

    monkeypatch.setattr(house.guard.catalogue, "upload", upload)
    monkeypatch.setattr(house.guard.identity, "authenticate", lambda token: Caller(token[:5], "owner"))
    owners = [f"own-{at}" for at in range(6)]

    async def scenario() -> None:
        anyio.to_thread.current_default_thread_limiter().total_tokens = 4
        transport = httpx.ASGITransport(laptop_app(house.guard))
        async with httpx.AsyncClient(transport=transport, base_url="https://guard") as client:

            def of(owner: str) -> dict[str, str]:
                return {"authorization": f"Bearer {owner}-some-long-token"}

            sends = [asyncio.create_task(client.post("/api/v1/datasets", headers=of(each))) for each in owners]
            while house.guard.upload_slots.statistics().tasks_waiting < len(owners) - UPLOADS_AT_ONCE:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert (await client.get("/api/v1/datasets", headers=of("other"))).status_code == 200
            assert not any(send.done() for send in sends)
            go.set()
            assert {answer.status_code for answer in await asyncio.gather(*sends)} == {201}
        assert max(most) == UPLOADS_AT_ONCE

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_full_disk_refuses_a_model_in_words(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("cloister_data.crypt.os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        house.plan()
    assert list((house.guard.config.state_dir / "models" / "ann").iterdir()) == []


def test_events_end_with_the_session_that_listens(house: House) -> None:
    identity = house.guard.identity
    token = identity.login(LoginRequest(user="ann", password="long enough")).token
    caller = identity.authenticate(token)

    async def scenario() -> None:
        for listener in (caller, ANN):
            stream = _while_signed_in(house.guard, listener, house.guard.events.listen("ann", None))
            first = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.05)
            await house.ask()
            assert (await first) is not None
            await stream.aclose()
        stream = _while_signed_in(house.guard, caller, house.guard.events.listen("ann", None))
        after = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.05)
        identity.logout(caller)
        await house.ask()
        with pytest.raises(StopAsyncIteration):
            await after

    asyncio.run(scenario())


def test_a_witness_that_is_named_while_data_are_stored_isn_t_passed_by(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie under the machine's key by then; the log must not say that the witness holds it."""
    guard, key = house.guard, house.keys["hosp-b"]
    write = guard.store.write

    def meanwhile(*given: Any, **named: Any) -> StoredFile:
        stored = write(*given, **named)
        terms = OwnerTerms(
            origin=guard.journal.log.origin, owner="hosp-b", version=1, witness=public_bytes(key), unlock="0" * 64
        )
        request = TermsRequest(owner_key=public_bytes(key), terms=sign_terms(terms, key))
        guard.owners.set_terms(Caller("hosp-b", "owner"), request)
        return stored

    monkeypatch.setattr(guard.store, "write", meanwhile)
    before = sorted((guard.config.state_dir / "data").iterdir())
    with pytest.raises(ConflictError, match="witness was named"):
        house.publish("hosp-b/people", {"ann": 5.0})
    assert sorted((guard.config.state_dir / "data").iterdir()) == before
