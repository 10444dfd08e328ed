"""Orders, one after the other. Before rows are opened errors speak; from then on every error is the same bytes."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
from pydantic import ValidationError

from cloister_data.base import Wire
from cloister_data.errors import CloisterError, InternalError, InvalidRequestError, TooLargeError
from cloister_guard.datasets.ingest import read_rows
from cloister_guard.datasets.layout import put_table
from cloister_guard.datasets.split import select_part
from cloister_guard.datasets.store import SourceFile, read_table
from cloister_guard.statistics.compute import answer
from cloister_guard.worker.pipe import GuardPipe
from cloister_guard.worker.protocol import (
    EstimatesReport,
    EvaluateOrder,
    FailedReport,
    MarkAnswer,
    PrepareEvaluationOrder,
    PrepareOrder,
    QueryOrder,
    ReadOrder,
    RefusedReport,
    RehearseOrder,
    SourceFiles,
    TableReport,
    TrainOrder,
)
from cloister_guard.worker.shared import view, writable

if TYPE_CHECKING:
    from cloister_guard.worker.learning import Evaluation, Training

HUNG_UP, FAILED, BROKEN = 0, 3, 4


def serve(pipe: GuardPipe) -> int:
    """Answer orders until the guard hangs up; the process's exit code."""
    desk = _Desk(pipe)
    while True:
        try:
            received = pipe.receive()
        except (CloisterError, ValidationError):
            return BROKEN
        if received is None:
            return HUNG_UP
        order, blob = received
        match order:
            case ReadOrder():
                desk.read(order)
            case PrepareOrder() | RehearseOrder() | PrepareEvaluationOrder():
                desk.without_rows(order, blob)
            case QueryOrder() | TrainOrder() | EvaluateOrder():
                try:
                    report, blob = desk.with_rows(order)
                except BaseException:
                    # Which error, from which line, even a memory error: all of it may follow from rows.
                    pipe.send(FailedReport())
                    return FAILED
                pipe.send(report, blob)
            case MarkAnswer():
                return BROKEN


class _Desk:
    """What has been prepared so far, and how each order is carried out."""

    def __init__(self, pipe: GuardPipe) -> None:
        self._pipe = pipe
        self._training: Training | None = None
        self._evaluation: Evaluation | None = None

    def without_rows(self, order: PrepareOrder | RehearseOrder | PrepareEvaluationOrder, blob: bytes) -> None:
        """Answer an order that touches no rows: what goes wrong may be told."""
        report: Wire
        try:
            report = self._without_rows(order, blob)
        except CloisterError as error:
            report = RefusedReport(problem=error.to_problem())
        except Exception as error:
            fault = InternalError(
                "The cloister couldn't check this model.",
                why=f"It failed with a {type(error).__name__}, which it shouldn't.",
                next_step="Nothing was charged. Tell the admin.",
            )
            report = RefusedReport(problem=fault.to_problem())
        self._pipe.send(report)

    def _without_rows(self, order: PrepareOrder | RehearseOrder | PrepareEvaluationOrder, blob: bytes) -> Wire:
        if isinstance(order, RehearseOrder):
            return self._prepared_training().rehearse()
        # Only a model's orders need torch: a question's worker never loads it.
        from cloister_guard.worker import learning

        match order:
            case PrepareOrder():
                self._training = learning.prepare_training(order, blob)
                return self._training.report()
            case PrepareEvaluationOrder():
                self._evaluation = learning.prepare_evaluation(order.query, blob)
                return self._evaluation.report()

    def read(self, order: ReadOrder) -> None:
        """Put an upload's rows into the lent memory, or say what is wrong with it: they are its owner's."""
        report: Wire
        try:
            table = read_rows(view(order.upload), order.data_format, order.data_schema)
            put_table(table, partial(_room, order.answer))
            report = TableReport(rows=table.num_rows)
        except CloisterError as error:
            report = RefusedReport(problem=error.to_problem())
        except MemoryError:
            report = RefusedReport(problem=_too_large("more memory than a worker has").to_problem())
        except Exception:
            report = FailedReport()
        self._pipe.send(report)

    def with_rows(self, order: QueryOrder | TrainOrder | EvaluateOrder) -> tuple[Wire, bytes]:
        table = open_sources(order.sources)
        match order:
            case QueryOrder(plan=plan):
                if table.num_rows != plan.units:
                    raise InvalidRequestError("The parts hold another number of units than was planned for.")
                return EstimatesReport(estimates=tuple(answer(plan, table))), b""
            case TrainOrder(noise_multiplier=noise_multiplier):
                return self._prepared_training().train(table, noise_multiplier, self._pipe)
            case EvaluateOrder():
                if self._evaluation is None:
                    raise InvalidRequestError("Nothing was prepared.")
                return self._evaluation.run(table), b""

    def _prepared_training(self) -> Training:
        if self._training is None:
            raise InvalidRequestError("Nothing was prepared.")
        return self._training


def open_sources(sources: SourceFiles) -> pa.Table:
    """The selected rows of all sources, one after the other. Raises where one was altered or schemas differ."""
    return pa.concat_tables([_open(source, sources[0]) for source in sources])


def _open(source: SourceFile, first: SourceFile) -> pa.Table:
    if source.data_schema.columns != first.data_schema.columns:
        raise InvalidRequestError("The sources don't have the same schema.")
    return select_part(read_table(Path(source.path), source.key), source.ref, source.data_schema.parts)


def _room(descriptor: int, size: int) -> memoryview:
    lent = os.fstat(descriptor).st_size
    if size > lent:
        raise _too_large(f"{size} bytes, and {lent} are the most")
    return writable(descriptor, size)


def _too_large(what: str) -> TooLargeError:
    return TooLargeError(
        "The upload is too large as a table.",
        why=f"It takes {what}.",
        next_step="Nothing was stored. Upload fewer rows or columns.",
    )
