"""What a worker does with models: check, rehearse, train, evaluate. The only module of the worker that loads torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cloister_data.base import Wire
from cloister_data.errors import CloisterError, InternalError, InvalidRequestError
from cloister_data.framing import unpack_body
from cloister_data.graph import ModelGraph
from cloister_data.schema import Schema
from cloister_guard.datasets.mock import mock_table
from cloister_guard.encoding import Targets, encode_features, encode_target
from cloister_guard.statistics.compute import noisy_count
from cloister_guard.statistics.evaluation import EvaluationQuery
from cloister_guard.training.evaluation import evaluate, evaluation_facts
from cloister_guard.training.facts import EvaluationFacts
from cloister_guard.training.loop import train
from cloister_guard.training.planning import Prepared, prepare
from cloister_guard.training.rehearsal import rehearse
from cloister_guard.worker.pipe import GuardPipe
from cloister_guard.worker.protocol import (
    EstimatesReport,
    EvaluationReport,
    MarkAnswer,
    MarkReport,
    PreparedReport,
    PrepareOrder,
    ProgressReport,
    RehearsedReport,
    TrainedReport,
)

MOCK_ROWS = 4096


@dataclass(frozen=True)
class Training:
    """A training that was checked, and the schema of its rows."""

    prepared: Prepared
    data_schema: Schema

    def report(self) -> PreparedReport:
        return PreparedReport(facts=self.prepared.facts())

    def rehearse(self) -> RehearsedReport:
        """Some steps on as many mock rows as the plan has units: a few thousand different ones, repeated."""
        plan, schema, units = self.prepared.plan, self.data_schema, self.prepared.facts().units
        mock = mock_table(schema, min(units, MOCK_ROWS))
        rows = np.arange(units) % mock.num_rows
        targets = encode_target(mock, schema, plan.target, plan.loss)
        return RehearsedReport(
            figures=rehearse(
                self.prepared,
                encode_features(mock, schema, plan.features)[rows],
                Targets(targets.values[rows], targets.present[rows]),
            )
        )

    def train(self, table: pa.Table, noise_multiplier: float, pipe: GuardPipe) -> tuple[Wire, bytes]:
        """All steps on private rows, each block of them after the guard has marked it spent."""
        plan, schema = self.prepared.plan, self.data_schema
        _check_rows(table, self.prepared.facts().units)

        def mark(steps: int) -> None:
            pipe.send(MarkReport(steps=steps))
            received = pipe.receive()
            if received is None or received[0] != MarkAnswer(steps=steps):
                raise InternalError("The steps weren't marked.")

        weights = train(
            self.prepared,
            encode_features(table, schema, plan.features),
            encode_target(table, schema, plan.target, plan.loss),
            noise_multiplier=noise_multiplier,
            mark=mark,
            progress=lambda steps: pipe.send(ProgressReport(steps=steps)),
        )
        return TrainedReport(), weights


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that was checked, with its model."""

    query: EvaluationQuery
    graph: ModelGraph
    weights: bytes
    facts: EvaluationFacts

    def report(self) -> EvaluationReport:
        return EvaluationReport(facts=self.facts)

    def run(self, table: pa.Table) -> EstimatesReport:
        """The metric over private rows, with noise."""
        plan, schema = self.query.plan, self.query.data_schema
        _check_rows(table, self.query.units)
        exact = evaluate(
            plan,
            schema,
            self.graph,
            self.weights,
            encode_features(table, schema, plan.features),
            encode_target(table, schema, plan.target, plan.metric),
        )
        return EstimatesReport(estimates=(noisy_count(exact, self.query.mechanism, step=self.query.step),))


def prepare_training(order: PrepareOrder, blob: bytes) -> Training:
    """Raises UnsupportedModelError or InvalidRequestError; no row is needed."""
    graph, weights = _model(blob)
    return Training(prepare(order.plan, order.data_schema, graph, weights, order.units), order.data_schema)


def prepare_evaluation(query: EvaluationQuery, blob: bytes) -> Evaluation:
    """Raises UnsupportedModelError or InvalidRequestError; no row is needed."""
    graph, weights = _model(blob)
    facts = evaluation_facts(query.plan, query.data_schema, graph, weights, query.units)
    # What was priced must be what will be computed.
    if facts.sensitivity > query.mechanism.sensitivity or not math.isclose(facts.step, query.step, rel_tol=1e-9):
        raise InternalError("The evaluation's price doesn't fit its aggregate.")
    return Evaluation(query, graph, weights, facts)


def _model(blob: bytes) -> tuple[ModelGraph, bytes]:
    try:
        head, weights = unpack_body(blob)
        return ModelGraph.from_json(head), bytes(weights)
    except (CloisterError, ValueError) as error:
        raise InvalidRequestError("The model can't be read.", next_step="Export it again and send it anew.") from error


def _check_rows(table: pa.Table, units: int) -> None:
    if table.num_rows != units:
        raise InternalError("The parts hold another number of units than was planned for.")
