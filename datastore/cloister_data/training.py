"""Training and evaluation requests, jobs and their progress."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cloister_data.base import Digest, Identifier, Label, RequestId, Text, UnixSeconds, Wire
from cloister_data.datasets import SplitRef
from cloister_data.mechanism import DpSgd

MAX_MODEL_BYTES = 512 << 20

Loss = Literal["cross_entropy", "binary_cross_entropy", "mse", "l1", "huber"]
Metric = Literal["accuracy", "mse"]
Sources = Annotated[tuple[SplitRef, ...], Field(min_length=1, max_length=16)]


class Optimizer(Wire):
    """torch.optim's SGD, Adam or AdamW by their own parameter names."""

    name: Literal["sgd", "adam", "adamw"] = "adam"
    lr: float = Field(gt=0, le=1000)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0, le=10)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)


class TrainingPlan(Wire):
    """Everything about a training but its request id: what a cost, a rehearsal and a job share.

    `model` is the digest that `POST /api/v1/models` answered with. `batch_size` is the EXPECTED batch size of
    Poisson sampling. Exactly one of `epsilon` and `noise_multiplier` is given.
    """

    sources: Sources
    model: Digest
    features: tuple[Label, ...] = Field(min_length=1, max_length=4096)
    target: Label
    loss: Loss
    optimizer: Optimizer
    epochs: int = Field(ge=1, le=10_000)
    batch_size: int = Field(ge=1, le=1_000_000)
    max_grad_norm: float = Field(gt=0, le=1e6)
    epsilon: float | None = Field(default=None, gt=0, le=1000)
    noise_multiplier: float | None = Field(default=None, gt=0, le=1e6)

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("give exactly one of epsilon and noise_multiplier")
        if len(set(self.features)) != len(self.features):
            raise ValueError("a feature is named twice")
        if self.target in self.features:
            raise ValueError("the target is among the features")
        return self

    def steps(self, units: int) -> int:
        """How many batches are drawn from `units` privacy units."""
        return max(1, math.ceil(self.epochs * units / self.batch_size))

    def sample_rate(self, units: int) -> float:
        """The probability with which each of `units` privacy units is in a batch."""
        return min(1.0, self.batch_size / units) if units else 1.0


class TrainingRequest(Wire):
    request_id: RequestId
    plan: TrainingPlan


class EvaluationPlan(Wire):
    sources: Sources
    model: Digest
    features: tuple[Label, ...] = Field(min_length=1, max_length=4096)
    target: Label
    metric: Metric
    epsilon: float = Field(gt=0, le=1000)


class EvaluationRequest(Wire):
    request_id: RequestId
    plan: EvaluationPlan


class ModelView(Wire):
    """The guard's answer to a model: the digest to name it by."""

    model: Digest
    parameters: int = Field(ge=0)
    nodes: int = Field(ge=0)


class RehearsalReport(Wire):
    """What the same job did on mock rows. Nothing in it comes from private rows.

    `seconds` is the expected duration of all steps, `memory_bytes` the worker's peak resident size.
    """

    mechanism: DpSgd
    epsilon: float
    delta: float
    steps: int
    units: int
    seconds: float
    memory_bytes: int
    parameters: int
    outputs: int
    notes: tuple[Text, ...] = Field(default=(), max_length=64)


JobState = Literal["running", "cancelling", "done", "cancelled", "failed"]


class JobView(Wire):
    """A job as its user sees it. `steps_done` moves in coarse ticks and `code` is one constant for every failure.

    `epsilon` is the tight epsilon of all `steps` at `delta`; `charged_steps` says how many were marked spent.
    """

    job: Identifier
    kind: Literal["train"]
    state: JobState
    sources: Sources
    created: UnixSeconds
    steps: int
    steps_done: int
    charged_steps: int
    epsilon: float
    delta: float
    mechanism: DpSgd
    release: Identifier | None = None
    code: Text = ""


class JobList(Wire):
    jobs: tuple[JobView, ...] = Field(max_length=10_000)
