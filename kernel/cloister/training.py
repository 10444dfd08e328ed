"""From a torch module and a few words to a plan that the guard can price, rehearse and run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ValidationError

from cloister import checks, rendering
from cloister.connection import Caller
from cloister.job import Job
from cloister.modules import copy_of, known_features, remember_features
from cloister.paid import request_id, send_paid
from cloister.question import Cost
from cloister.releases import Release
from cloister_data import release as wire
from cloister_data.datasets import SplitRef
from cloister_data.errors import InvalidRequestError, TooLargeError
from cloister_data.framing import pack_body
from cloister_data.mechanism import DpSgd
from cloister_data.schema import Schema
from cloister_data.statistics import CostView
from cloister_data.training import (
    MAX_MODEL_BYTES,
    EvaluationPlan,
    EvaluationRequest,
    JobView,
    Loss,
    Metric,
    ModelView,
    RehearsalReport,
    TrainingPlan,
    TrainingRequest,
)

if TYPE_CHECKING:
    from torch import nn

MODEL_TYPE = "application/vnd.cloister.model"
UNSENT = "0" * 64
"""Stands for the model's digest in a plan whose model hasn't been sent."""


class Rehearsal:
    """What the same job did on mock rows, and what the real one would cost.

    Attributes:
        epsilon, delta: the tight loss of the whole training.
        mechanism: noise multiplier, sample rate, steps.
        seconds: how long all steps will take, about; memory_bytes: the worker's peak.
        units: the public number of people in the part; parameters, outputs: of the model.
        notes: what else should be known, for example that the budget no longer admits it.
    """

    def __init__(self, report: RehearsalReport) -> None:
        self._report = report

    @property
    def epsilon(self) -> float:
        return self._report.epsilon

    @property
    def delta(self) -> float:
        return self._report.delta

    @property
    def mechanism(self) -> DpSgd:
        return self._report.mechanism

    @property
    def steps(self) -> int:
        return self._report.steps

    @property
    def units(self) -> int:
        return self._report.units

    @property
    def seconds(self) -> float:
        return self._report.seconds

    @property
    def memory_bytes(self) -> int:
        return self._report.memory_bytes

    @property
    def parameters(self) -> int:
        return self._report.parameters

    @property
    def outputs(self) -> int:
        return self._report.outputs

    @property
    def notes(self) -> tuple[str, ...]:
        return self._report.notes

    def __repr__(self) -> str:
        lines = [f"  {name}: {value}" for name, value in self._rows()]
        return "\n".join(["Rehearsal on mock rows: it works, and nothing was charged.", *lines])

    def _repr_html_(self) -> str:
        return rendering.html_box(
            "Rehearsal on mock rows: it works, and nothing was charged",
            rendering.html_table(("", ""), [list(row) for row in self._rows()]),
        )

    def _rows(self) -> list[tuple[str, str]]:
        mechanism = self.mechanism
        rows = [
            ("would cost", f"epsilon {rendering.figure(self.epsilon)} at delta {self.delta:g}, to every owner"),
            (
                "mechanism",
                f"DP-SGD, noise multiplier {rendering.figure(mechanism.noise_multiplier)}, "
                f"sample rate {rendering.figure(mechanism.sample_rate)}, {self.steps} steps",
            ),
            ("people", str(self.units)),
            ("model", f"{self.parameters} parameters, {self.outputs} outputs"),
            ("would take", f"about {rendering.duration(self.seconds)}, {self.memory_bytes / 2**20:.0f} MiB"),
        ]
        return rows + [("note", rendering.one_line(note)) for note in self.notes]


@dataclass(frozen=True)
class Recipe:
    """A training that the schema admits: the plan without its model's digest, and the model."""

    plan: TrainingPlan
    model: nn.Module
    width: int

    @classmethod
    def checked(
        cls,
        schema: Schema,
        sources: tuple[SplitRef, ...],
        model: nn.Module,
        *,
        features: Sequence[str],
        target: str,
        loss: str,
        epochs: int,
        batch_size: int,
        epsilon: float | None,
        noise_multiplier: float | None,
        optimizer: str = "adam",
        lr: float = 1e-3,
        max_grad_norm: float = 1.0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> Recipe:
        """Raises InvalidRequestError for everything that is wrong by the public schema alone."""
        names = checks.check_features(schema, features)
        kind = checks.check_choice("loss", loss, get_args(Loss))
        checks.check_target(schema, target, names, kind)
        if (epsilon is None) == (noise_multiplier is None):
            raise InvalidRequestError(
                "Give either epsilon or noise_multiplier.",
                why="One follows from the other." if epsilon is not None else "A training has a price.",
                next_step=f"For example epsilon=2.0. {checks.FREE}",
            )
        if epsilon is not None:
            epsilon = checks.check_epsilon(epsilon)
        if noise_multiplier is not None:
            noise_multiplier = checks.check_number("noise_multiplier", noise_multiplier, 1e6)
        _check_model(model)
        steps = {
            "name": checks.check_choice("optimizer", optimizer, checks.OPTIMIZERS),
            "lr": checks.check_number("lr", lr, 1000),
            "momentum": checks.check_number("momentum", momentum, 1, zero=True),
            "weight_decay": checks.check_number("weight_decay", weight_decay, 10, zero=True),
            "betas": tuple(betas),
        }
        document = {
            "sources": sources,
            "model": UNSENT,
            "features": names,
            "target": target,
            "loss": kind,
            "optimizer": steps,
            "epochs": checks.check_whole("epochs", epochs, 10_000),
            "batch_size": checks.check_whole("batch_size", batch_size, 1_000_000),
            "max_grad_norm": checks.check_number("max_grad_norm", max_grad_norm, 1e6),
            "epsilon": epsilon,
            "noise_multiplier": noise_multiplier,
        }
        return cls(_valid(TrainingPlan, document), model, checks.feature_width(schema, names))

    def cost(self, caller: Caller) -> Cost:
        return Cost(caller.call("POST", "/jobs/cost", self.plan, CostView))

    def rehearse(self, caller: Caller) -> Rehearsal:
        plan = self._with_model(caller)
        return Rehearsal(caller.call("POST", "/rehearsals", plan, RehearsalReport))

    def train(self, caller: Caller) -> Job:
        request = TrainingRequest(request_id=request_id(), plan=self._with_model(caller))
        # What is trained is what was sent: later changes to the user's module must not reach the result.
        kept = copy_of(self.model)
        remember_features(self.model, self.plan.features)
        view = send_paid(lambda: caller.call("POST", "/jobs", request, JobView))
        return Job(caller, view, kept, self.plan.features)

    def _with_model(self, caller: Caller) -> TrainingPlan:
        return self.plan.model_copy(update={"model": send_model(caller, self.model, self.width)})


def send_model(caller: Caller, model: nn.Module, width: int) -> str:
    """The digest by which the guard knows the model from now on. Raises UnsupportedModelError."""
    from cloister.modeling import export_model

    graph, weights = export_model(model, width)
    body = pack_body(graph.to_json(), weights)
    if len(body) > MAX_MODEL_BYTES:
        raise TooLargeError(
            f"The model has {len(body) / 2**20:.0f} MiB.",
            why=f"At most {MAX_MODEL_BYTES >> 20} MiB can be sent.",
            next_step=f"Make it smaller. {checks.FREE}",
        )
    return caller.call("POST", "/models", body, ModelView, MODEL_TYPE).model


def evaluate(
    caller: Caller,
    schema: Schema,
    sources: tuple[SplitRef, ...],
    model: nn.Module,
    features: Sequence[str] | None,
    target: str,
    metric: str,
    epsilon: float,
) -> Release:
    """See `DatasetHandle.evaluate`."""
    _check_model(model)
    chosen = features if features is not None else known_features(model)
    if chosen is None:
        raise InvalidRequestError(
            "It isn't known which features this model takes.",
            why="It didn't come from job.result() in this session.",
            next_step=f"Name them: evaluate(model, features=[...], ...). {checks.FREE}",
        )
    names = checks.check_features(schema, chosen)
    kind = checks.check_choice("metric", metric, get_args(Metric))
    checks.check_target(schema, target, names, kind)
    document = {
        "sources": sources,
        "model": UNSENT,
        "features": names,
        "target": target,
        "metric": kind,
        "epsilon": checks.check_epsilon(epsilon),
    }
    plan = _valid(EvaluationPlan, document)
    digest = send_model(caller, model, checks.feature_width(schema, names))
    request = EvaluationRequest(request_id=request_id(), plan=plan.model_copy(update={"model": digest}))
    return Release(send_paid(lambda: caller.call("POST", "/evaluations", request, wire.Release)))


def _check_model(model: object) -> None:
    """A class in the place of an instance, or something else altogether, without importing torch."""
    if isinstance(model, type) or not callable(getattr(model, "named_parameters", None)):
        found = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise InvalidRequestError(
            f"The model must be an instance of torch.nn.Module, not {found}.",
            next_step=f"Build one, for example torch.nn.Linear(10, 2). {checks.FREE}",
        )


def _valid(kind: type[TrainingPlan] | type[EvaluationPlan], document: dict[str, Any]) -> Any:
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequestError(
            f"{where or 'The training'} can't be so.", why=f"{first['msg']}.", next_step=checks.FREE
        ) from error
