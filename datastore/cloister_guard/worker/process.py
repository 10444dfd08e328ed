"""The guard's side of a worker: start it, order, keep its marks, and kill it whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import structlog
from pydantic import ValidationError

from cloister_data.base import Wire
from cloister_data.errors import CloisterError, UnavailableError, from_problem
from cloister_data.framing import frame_length, pack_body, unpack_body
from cloister_data.graph import ModelGraph
from cloister_data.schema import Schema
from cloister_data.statistics import Estimate
from cloister_data.training import TrainingPlan
from cloister_guard.datasets.ingest import Format
from cloister_guard.datasets.store import SourceFile
from cloister_guard.statistics.evaluation import EvaluationQuery
from cloister_guard.statistics.plan import QueryPlan
from cloister_guard.training.facts import EvaluationFacts, PreparedFacts, RehearsalFigures
from cloister_guard.worker.protocol import (
    MAX_FRAME,
    REPORTS,
    EstimatesReport,
    EvaluateOrder,
    EvaluationReport,
    FailedReport,
    MarkAnswer,
    MarkReport,
    PreparedReport,
    PrepareEvaluationOrder,
    PrepareOrder,
    ProgressReport,
    QueryOrder,
    ReadOrder,
    ReadyReport,
    RefusedReport,
    RehearsedReport,
    RehearseOrder,
    TableReport,
    TrainedReport,
    TrainOrder,
    failure,
    pack_message,
)

logger = structlog.get_logger()

R = TypeVar("R", bound=Wire)


@dataclass(frozen=True)
class WorkerLimits:
    """What one worker may use. The kernel enforces memory (address space) and CPU time; the guard the waiting.

    `answer_seconds` bounds each order but a training, whose end is its user's or the CPU limit's.
    """

    memory_bytes: int = 16 << 30
    cpu_seconds: int = 24 * 3600
    answer_seconds: float = 300.0
    start_seconds: float = 60.0
    threads: int = 1


class Worker:
    """One confined process. Made by `Worker.start`; takes one order at a time."""

    def __init__(self, process: asyncio.subprocess.Process, limits: WorkerLimits) -> None:
        self._process = process
        self._limits = limits
        self._noise = 0
        self._drain = asyncio.create_task(self._drain_noise())

    @classmethod
    @contextlib.asynccontextmanager
    async def start(cls, limits: WorkerLimits | None = None, lent: Sequence[int] = ()) -> AsyncIterator[Worker]:
        """A worker that is confined and ready; it is dead when the block is left.

        `lent` are descriptors that it gets under the same numbers.

        Raises UnavailableError where it can't be confined here, or doesn't start.
        """
        limits = limits or WorkerLimits()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-B",
                "-m",
                "cloister_guard.worker",
                str(os.getpid()),
                str(limits.memory_bytes),
                str(limits.cpu_seconds),
                *map(str, lent),
                pass_fds=lent,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=_environment(limits),
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            raise UnavailableError("A worker process can't be started.", why=f"{error.strerror}.") from error
        worker = cls(process, limits)
        try:
            await worker._ready()
            yield worker
        finally:
            await worker._end()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def read(self, schema: Schema, data_format: Format, upload: int, answer: int) -> int:
        """Read a lent upload into the lent room: the number of rows. Raises the errors of `ingest.read_rows`."""
        order = ReadOrder(data_schema=schema, data_format=data_format, upload=upload, answer=answer)
        return (await self._ask(order, TableReport)).rows

    async def query(self, plan: QueryPlan, sources: Sequence[SourceFile]) -> list[Estimate]:
        """The noised answer. Raises the one constant error of `protocol.failure` for whatever goes wrong."""
        report = await self._ask(QueryOrder(plan=plan, sources=tuple(sources)), EstimatesReport)
        if [estimate.group for estimate in report.estimates] != list(plan.groups or (None,)):
            raise failure()
        return list(report.estimates)

    async def prepare(
        self, plan: TrainingPlan, schema: Schema, graph: ModelGraph, weights: bytes, units: int
    ) -> PreparedFacts:
        """Check a training without data. Raises UnsupportedModelError or InvalidRequestError."""
        order = PrepareOrder(plan=plan, data_schema=schema, units=units)
        return (await self._ask(order, PreparedReport, pack_body(graph.to_json(), weights))).facts

    async def rehearse(self) -> RehearsalFigures:
        """Run some steps of the prepared training on mock rows, as many as it has units."""
        return (await self._ask(RehearseOrder(), RehearsedReport)).figures

    async def train(
        self,
        sources: Sequence[SourceFile],
        noise_multiplier: float,
        on_mark: Callable[[int], Awaitable[None]],
        on_progress: Callable[[int], Awaitable[None]],
    ) -> bytes:
        """Run the prepared training: the weights as safetensors.

        `on_mark(k)` is awaited before any step up to k is sampled; where it raises, training ends there.
        """
        await self._send(TrainOrder(sources=tuple(sources), noise_multiplier=noise_multiplier))
        marked = 0
        while True:
            report, blob = await self._receive()
            match report:
                case MarkReport(steps=steps) if steps > marked:
                    await on_mark(steps)
                    marked = steps
                    await self._send(MarkAnswer(steps=steps))
                case ProgressReport(steps=steps) if steps <= marked:
                    await on_progress(steps)
                case TrainedReport():
                    return blob
                case _:
                    self._unexpected(report)

    async def prepare_evaluation(self, query: EvaluationQuery, graph: ModelGraph, weights: bytes) -> EvaluationFacts:
        """Check an evaluation without data. Raises UnsupportedModelError or InvalidRequestError."""
        order = PrepareEvaluationOrder(query=query)
        return (await self._ask(order, EvaluationReport, pack_body(graph.to_json(), weights))).facts

    async def evaluate(self, sources: Sequence[SourceFile]) -> list[Estimate]:
        """The noised metric of the prepared evaluation: one estimate."""
        report = await self._ask(EvaluateOrder(sources=tuple(sources)), EstimatesReport)
        if len(report.estimates) != 1:
            raise failure()
        return list(report.estimates)

    async def _ask(self, order: Wire, answer: type[R], blob: bytes = b"") -> R:
        try:
            async with asyncio.timeout(self._limits.answer_seconds):
                await self._send(order, blob)
                report, _ = await self._receive()
        except TimeoutError:
            logger.warning("worker too slow", pid=self.pid)
            raise failure() from None
        if not isinstance(report, answer):
            self._unexpected(report)
        return report

    async def _send(self, order: Wire, blob: bytes = b"") -> None:
        stream = self._process.stdin
        if stream is None:
            raise failure()
        try:
            stream.write(pack_message(order, blob))
            await stream.drain()
        except (BrokenPipeError, ConnectionResetError):
            raise failure() from None

    async def _receive(self) -> tuple[Wire, bytes]:
        stream = self._process.stdout
        if stream is None:
            raise failure()
        try:
            length = frame_length(await stream.readexactly(4), MAX_FRAME)
            head, blob = unpack_body(await stream.readexactly(length))
            return REPORTS.validate_json(head), bytes(blob)
        except (asyncio.IncompleteReadError, ConnectionResetError, CloisterError, ValidationError):
            # Killed, out of memory, or talking nonsense: all the same to whoever asked.
            raise failure() from None

    def _unexpected(self, report: Wire) -> NoReturn:
        if isinstance(report, RefusedReport):
            raise from_problem(report.problem)
        if not isinstance(report, FailedReport):
            logger.error("worker broke its protocol", pid=self.pid, report=type(report).__name__)
        raise failure()

    async def _ready(self) -> None:
        try:
            async with asyncio.timeout(self._limits.start_seconds):
                report, _ = await self._receive()
        except (TimeoutError, CloisterError):
            report = None
        if isinstance(report, RefusedReport):
            raise from_problem(report.problem)
        if not isinstance(report, ReadyReport):
            raise UnavailableError(
                "A worker process didn't start.",
                why="It ended, or stayed silent, before it was confined.",
                next_step="Nothing was charged. The guard's log has its exit code.",
            )

    async def _drain_noise(self) -> None:
        """Whatever libraries print could hold rows: its length is kept, its bytes are dropped."""
        stream = self._process.stderr
        while stream is not None and (noise := await stream.read(65536)):
            self._noise += len(noise)

    async def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            # Its own session: whatever it may have started goes with it.
            os.killpg(self.pid, signal.SIGKILL)
        code = await asyncio.shield(self._process.wait())
        self._drain.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._drain
        if self._process.stdin is not None:
            self._process.stdin.close()
        if code not in (0, -signal.SIGKILL) or self._noise:
            logger.warning("worker ended", pid=self.pid, code=code, stderr_bytes=self._noise)


def _environment(limits: WorkerLimits) -> dict[str, str]:
    threads = str(limits.threads)
    return {
        "LANG": "C.UTF-8",
        "HOME": "/nonexistent",
        # Torch makes its cache's directory while it is imported; this one is there, and takes nothing from a worker.
        "TORCHINDUCTOR_CACHE_DIR": "/",
        "OMP_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "ARROW_DEFAULT_MEMORY_POOL": "system",
    }
