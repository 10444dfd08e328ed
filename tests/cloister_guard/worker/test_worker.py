"""A worker process from the guard's side: right answers, one error for every failure, and no process left."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from cloister_data.errors import CloisterError, InternalError, UnavailableError
from cloister_data.framing import frame_length
from cloister_data.schema import RealColumn, Schema
from cloister_data.statistics import Question
from cloister_guard.datasets.store import SourceFile
from cloister_guard.statistics.plan import QueryPlan, plan
from cloister_guard.worker import process
from cloister_guard.worker.process import Worker, WorkerLimits
from cloister_guard.worker.protocol import FailedReport, QueryOrder, failure, pack_message
from tests.fakes.stored import SCHEMA, Shelf

T = TypeVar("T")
QUICK = WorkerLimits(answer_seconds=60)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf"), rows=300)


def question(shelf: Shelf, part: str = "all", **more: Any) -> QueryPlan:
    asked = Question(source=shelf.ref(part), operation="mean", column="radius", group_by=more.get("group_by"))
    return plan(asked, SCHEMA, more.get("units", shelf.units(part)), 1000.0)


def with_worker(job: Callable[[Worker], Awaitable[T]], limits: WorkerLimits = QUICK) -> T:
    async def run() -> T:
        async with Worker.start(limits) as worker:
            return await job(worker)

    return asyncio.run(run())


async def reply(worker: Worker, order: bytes) -> bytes:
    """The raw bytes of one answer."""
    stdin, stdout = worker._process.stdin, worker._process.stdout
    assert stdin is not None
    assert stdout is not None
    stdin.write(order)
    return await stdout.readexactly(frame_length(await stdout.readexactly(4), 1 << 20))


def test_it_answers_questions_about_parts(shelf: Shelf) -> None:
    async def job(worker: Worker) -> None:
        exact = shelf.table.column("radius").to_numpy().mean()
        (whole,) = await worker.query(question(shelf), [shelf.source()])
        assert whole.value == pytest.approx(exact, abs=0.01)
        parts = [await worker.query(question(shelf, part), [shelf.source(part)]) for part in ("train", "test")]
        weighted = sum(found[0].value * shelf.units(part) for part, found in zip(("train", "test"), parts, strict=True))
        assert weighted / 300 == pytest.approx(exact, abs=0.02)
        grouped = await worker.query(question(shelf, group_by="ward"), [shelf.source()])
        assert [estimate.group for estimate in grouped] == ["a", "b", "c"]

    with_worker(job)


def test_several_sources_are_one(shelf: Shelf, tmp_path: Path) -> None:
    other = Shelf(tmp_path, rows=100, seed=5)
    found = with_worker(lambda worker: worker.query(question(shelf, units=400), [shelf.source(), other.source()]))
    radii = [*shelf.table.column("radius").to_pylist(), *other.table.column("radius").to_pylist()]
    assert found[0].value == pytest.approx(sum(radii) / 400, abs=0.01)


def test_a_questions_worker_never_loads_torch_and_is_confined(shelf: Shelf) -> None:
    def facts(pid: int) -> dict[str, str]:
        return {
            name: Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace")
            for name in ("maps", "status", "cmdline", "environ")
        }

    async def job(worker: Worker) -> dict[str, str]:
        await worker.query(question(shelf), [shelf.source()])
        return facts(worker.pid)

    found = with_worker(job)
    assert "opendp" in found["maps"]
    assert "libtorch" not in found["maps"]
    assert "Seccomp:\t2" in found["status"]
    assert "NoNewPrivs:\t1" in found["status"]
    assert shelf.source().key.decode(errors="replace") not in found["cmdline"] + found["environ"]
    assert "CLOISTER" not in found["environ"]


def failures(shelf: Shelf, tmp_path: Path) -> dict[str, tuple[QueryPlan, SourceFile]]:
    source = shelf.source()
    tampered = tmp_path / "tampered"
    data = bytearray(Path(source.path).read_bytes())
    data[-30] ^= 1
    tampered.write_bytes(data)
    nulls = question(shelf).model_copy(update={"column": "gone"})
    other = Schema(columns=(RealColumn(name="x", low=0, high=1),))
    return {
        "a tampered file": (question(shelf), source.model_copy(update={"path": str(tampered)})),
        "a missing file": (question(shelf), source.model_copy(update={"path": str(tmp_path / "none")})),
        "a wrong key": (question(shelf), source.model_copy(update={"key": bytes(32)})),
        "another number of units": (question(shelf, units=299), source),
        "a column that isn't there": (nulls, source),
        "not a file": (question(shelf), source.model_copy(update={"path": "/", "data_schema": other})),
    }


def test_every_failure_with_rows_is_the_same_bytes(shelf: Shelf, tmp_path: Path) -> None:
    seen = {}
    for name, (query, source) in failures(shelf, tmp_path).items():
        order = pack_message(QueryOrder(plan=query, sources=(source,)))
        seen[name] = with_worker(lambda worker, order=order: reply(worker, order))  # type: ignore[misc]
    assert set(seen.values()) == {pack_message(FailedReport())[4:]}
    # Positive control: an order that works is answered by something else.
    good = pack_message(QueryOrder(plan=question(shelf), sources=(shelf.source(),)))
    assert with_worker(lambda worker: reply(worker, good)) not in set(seen.values())


def test_the_guard_tells_one_constant_error(shelf: Shelf, tmp_path: Path) -> None:
    query, source = failures(shelf, tmp_path)["a tampered file"]

    async def killed(worker: Worker) -> object:
        os.kill(worker.pid, signal.SIGKILL)
        return await worker.query(question(shelf), [shelf.source()])

    async def memory(worker: Worker) -> object:
        # Less than the interpreter has already.
        psutil.Process(worker.pid).rlimit(psutil.RLIMIT_AS, (1 << 20, 1 << 20))
        return await worker.query(question(shelf), [shelf.source()])

    for job in (lambda worker: worker.query(query, [source]), killed, memory):
        with pytest.raises(InternalError) as failed:
            with_worker(job)  # type: ignore[arg-type]
        assert failed.value.to_problem() == failure().to_problem()


def test_too_slow_is_the_same_error(shelf: Shelf) -> None:
    async def job(worker: Worker) -> object:
        os.kill(worker.pid, signal.SIGSTOP)
        return await worker.query(question(shelf), [shelf.source()])

    with pytest.raises(InternalError) as failed:
        with_worker(job, WorkerLimits(answer_seconds=0.5))
    assert failed.value.to_problem() == failure().to_problem()


@pytest.mark.parametrize("how", ["normal", "error", "cancelled", "stopped"])
def test_no_process_is_left(shelf: Shelf, how: str) -> None:
    async def run() -> int:
        pid, started = 0, asyncio.Event()

        async def job() -> None:
            nonlocal pid
            async with Worker.start(QUICK) as worker:
                pid = worker.pid
                started.set()
                if how == "error":
                    raise KeyError
                if how == "stopped":
                    os.kill(pid, signal.SIGSTOP)
                if how == "cancelled":
                    await asyncio.sleep(60)

        task = asyncio.create_task(job())
        if how == "cancelled":
            await started.wait()
            task.cancel()
        await asyncio.wait({task})
        if how == "error":
            assert isinstance(task.exception(), KeyError)
        return pid

    pid = asyncio.run(run())
    assert not psutil.pid_exists(pid)


def test_a_worker_dies_with_its_guard(tmp_path: Path) -> None:
    script = tmp_path / "guard.py"
    script.write_text(
        "import asyncio, os\n"
        "from cloister_guard.worker.process import Worker\n"
        "async def main():\n"
        "    async with Worker.start() as worker:\n"
        "        print(worker.pid, flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n",
        encoding="utf-8",
    )

    async def run() -> int:
        guard = await asyncio.create_subprocess_exec(
            process.sys.executable, str(script), stdout=asyncio.subprocess.PIPE
        )
        assert guard.stdout is not None
        pid = int(await guard.stdout.readline())
        assert psutil.pid_exists(pid)
        guard.kill()
        await guard.wait()
        return pid

    pid = asyncio.run(run())
    gone = psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)[1]
    assert not [found for found in gone if found.status() != psutil.STATUS_ZOMBIE]


def test_what_libraries_print_is_dropped(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, object]] = []
    monkeypatch.setattr(
        process.logger, "warning", lambda text, **facts: logged.append({"text": text, **facts}), raising=False
    )
    broken = question(shelf).model_copy(update={"column": "gone"})
    with pytest.raises(CloisterError):
        with_worker(lambda worker: worker.query(broken, [shelf.source()]))
    assert all(set(found) <= {"text", "pid", "code", "stderr_bytes"} for found in logged)


def test_a_machine_that_cannot_confine_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    original = asyncio.create_subprocess_exec

    async def orphaned(*arguments: str, **more: Any) -> asyncio.subprocess.Process:
        # Another parent's id: the parent-death signal would never come.
        changed = ["1" if argument == str(os.getpid()) else argument for argument in arguments]
        return await original(*changed, **more)

    monkeypatch.setattr(process.asyncio, "create_subprocess_exec", orphaned)
    with pytest.raises(UnavailableError, match="parent-death signal") as refused:
        with_worker(lambda worker: asyncio.sleep(0))
    assert "Nothing was charged" in refused.value.next_step


def test_a_worker_that_does_not_start_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.sys, "executable", "/bin/false")
    with pytest.raises(UnavailableError, match="didn't start"):
        with_worker(lambda worker: asyncio.sleep(0))
    monkeypatch.setattr(process.sys, "executable", "/none/such")
    with pytest.raises(UnavailableError, match="can't be started"):
        with_worker(lambda worker: asyncio.sleep(0))
