"""What the guard and a worker say to each other: frames of `cloister_data.framing` on the worker's stdin and stdout.

Each frame holds `pack_body(JSON, blob)`. The guard orders, the worker reports; while it trains the worker waits for
each mark's acknowledgement before it goes on.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from cloister_data.base import Wire
from cloister_data.errors import CloisterError, InternalError, Problem
from cloister_data.framing import pack_body, pack_frame
from cloister_data.schema import Schema
from cloister_data.statistics import MAX_GROUPS, Estimate
from cloister_data.training import MAX_MODEL_BYTES, TrainingPlan
from cloister_guard.datasets.ingest import Format
from cloister_guard.datasets.readers import MAX_ROWS
from cloister_guard.datasets.store import SourceFile
from cloister_guard.statistics.evaluation import EvaluationQuery
from cloister_guard.statistics.plan import QueryPlan
from cloister_guard.training.facts import EvaluationFacts, PreparedFacts, RehearsalFigures

MAX_FRAME = MAX_MODEL_BYTES + (64 << 20)

SourceFiles = Annotated[tuple[SourceFile, ...], Field(min_length=1, max_length=16)]


class ReadOrder(Wire):
    """Read an upload. Only its owner hears what is wrong with it, so that may be told in words.

    `upload` and `answer` are the descriptors of lent memory (`worker.shared`): the file, and room for its table as
    `datasets.layout` writes it.
    """

    op: Literal["read"] = "read"
    data_schema: Schema
    data_format: Format
    upload: int = Field(ge=3)
    answer: int = Field(ge=3)


class QueryOrder(Wire):
    op: Literal["query"] = "query"
    plan: QueryPlan
    sources: SourceFiles


class PrepareOrder(Wire):
    """The blob is `pack_body(graph JSON, safetensors)`. No data: what goes wrong here may be told in words."""

    op: Literal["prepare"] = "prepare"
    plan: TrainingPlan
    data_schema: Schema
    units: int = Field(ge=0)


class RehearseOrder(Wire):
    """The job that was prepared, on rows made from the schema alone."""

    op: Literal["rehearse"] = "rehearse"


class TrainOrder(Wire):
    """The job that was prepared, on these sources."""

    op: Literal["train"] = "train"
    sources: SourceFiles
    noise_multiplier: float = Field(gt=0, le=1e6)


class PrepareEvaluationOrder(Wire):
    """The blob is `pack_body(graph JSON, safetensors)`. No data, like PrepareOrder."""

    op: Literal["prepare-evaluation"] = "prepare-evaluation"
    query: EvaluationQuery


class EvaluateOrder(Wire):
    """The evaluation that was prepared, on these sources."""

    op: Literal["evaluate"] = "evaluate"
    sources: SourceFiles


class MarkAnswer(Wire):
    """The steps up to `steps` are durably spent: they may run."""

    op: Literal["marked"] = "marked"
    steps: int = Field(ge=0)


Order = Annotated[
    ReadOrder
    | QueryOrder
    | PrepareOrder
    | RehearseOrder
    | TrainOrder
    | PrepareEvaluationOrder
    | EvaluateOrder
    | MarkAnswer,
    Field(discriminator="op"),
]


class ReadyReport(Wire):
    """The worker is confined and waits for its order."""

    kind: Literal["ready"] = "ready"


class TableReport(Wire):
    """The upload's rows are in the lent memory."""

    kind: Literal["table"] = "table"
    rows: int = Field(ge=1, le=MAX_ROWS)


class EstimatesReport(Wire):
    kind: Literal["estimates"] = "estimates"
    estimates: tuple[Estimate, ...] = Field(min_length=1, max_length=MAX_GROUPS)


class PreparedReport(Wire):
    kind: Literal["prepared"] = "prepared"
    facts: PreparedFacts


class RehearsedReport(Wire):
    kind: Literal["rehearsed"] = "rehearsed"
    figures: RehearsalFigures


class EvaluationReport(Wire):
    """The evaluation can run as planned."""

    kind: Literal["evaluation-prepared"] = "evaluation-prepared"
    facts: EvaluationFacts


class MarkReport(Wire):
    """Before steps up to `steps` are sampled: spend them, then answer."""

    kind: Literal["mark"] = "mark"
    steps: int = Field(ge=1)


class ProgressReport(Wire):
    """So many steps are done."""

    kind: Literal["progress"] = "progress"
    steps: int = Field(ge=0)


class TrainedReport(Wire):
    """The blob is the trained weights as safetensors."""

    kind: Literal["trained"] = "trained"


class RefusedReport(Wire):
    """The order can't be run, for reasons that hold whatever the rows are."""

    kind: Literal["refused"] = "refused"
    problem: Problem


class FailedReport(Wire):
    """Something went wrong after rows were opened. It has no fields: every such failure is the same bytes."""

    kind: Literal["failed"] = "failed"


Report = Annotated[
    ReadyReport
    | TableReport
    | EstimatesReport
    | PreparedReport
    | RehearsedReport
    | EvaluationReport
    | MarkReport
    | ProgressReport
    | TrainedReport
    | RefusedReport
    | FailedReport,
    Field(discriminator="kind"),
]

ORDERS: TypeAdapter[Order] = TypeAdapter(Order)
REPORTS: TypeAdapter[Report] = TypeAdapter(Report)


def pack_message(message: Wire, blob: bytes = b"") -> bytes:
    """One frame."""
    return pack_frame(pack_body(message.to_json(), blob))


def failure() -> CloisterError:
    """What a worker's failure looks like to everybody, whatever its cause."""
    return InternalError(
        "The cloister couldn't finish this request.",
        why="The reason isn't told, because it could say something about the data.",
        next_step="What was charged stays charged. If it happens again, tell the admin the time.",
    )
