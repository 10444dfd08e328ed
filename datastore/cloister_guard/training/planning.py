"""Everything that can be said about a training before any row is touched and before anything is charged."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cloister_data.errors import InvalidRequestError, UnsupportedModelError
from cloister_data.graph import ModelGraph, NodeRef
from cloister_data.schema import Schema
from cloister_data.training import TrainingPlan
from cloister_guard.encoding import TargetKind, feature_width, target_kind
from cloister_guard.training.facts import PreparedFacts
from cloister_guard.training.interpreter import Program, Weights, dry_run, load_weights, try_sample
from cloister_guard.training.isolate import IsolatedGradients
from cloister_guard.training.losses import check_output

MEMORY_BOUND = 2 << 30
"""Bytes that one microbatch's values and gradients may take."""

MAX_ELEMENTS = MEMORY_BOUND // 16
"""Numbers that all intermediate values of one sample may hold."""

MAX_UNITS = 1 << 25
"""The exact int64 sums hold this many clipped gradients."""

MAX_STEPS = 10_000_000
MAX_SLOTS = 1 << 12
SMALLEST_NORM = 1e-12
_FALLING = "aten.sigmoid.default"
_SHAPES = {"aten.view.default", "aten.reshape.default", "aten.squeeze.default", "aten.squeeze.dim", "aten.select.int"}


@dataclass(frozen=True)
class Prepared:
    """A training that is known to run: its plan, its graph, its starting weights and its public figures."""

    plan: TrainingPlan
    graph: ModelGraph
    weights: Weights
    target: TargetKind
    known: PreparedFacts

    def facts(self) -> PreparedFacts:
        return self.known


def prepare(plan: TrainingPlan, schema: Schema, graph: ModelGraph, weights: bytes, units: int) -> Prepared:
    """Check a training whole. `units` is the public number of units in its sources.

    Raises UnsupportedModelError (naming operation and layer) or InvalidRequestError; nothing here reads a row.
    """
    kind = target_kind(schema, plan.target, plan.loss)
    width = feature_width(schema, plan.features)
    if units < 1:
        raise InvalidRequestError("There are no units to train on.", next_step="Choose another part of the dataset.")
    if units > MAX_UNITS:
        raise InvalidRequestError(f"{units} units are too many for one training.", why=f"The limit is {MAX_UNITS}.")
    if plan.batch_size > units:
        raise InvalidRequestError(
            f"batch_size is {plan.batch_size}, and there are {units} units.",
            why="A batch holds each unit with probability batch_size / units, which can't exceed 1.",
            next_step=f"Use a batch_size of at most {units}.",
        )
    steps = -(-plan.epochs * units // plan.batch_size)
    if steps > MAX_STEPS:
        raise InvalidRequestError(
            f"{plan.epochs} epochs are {steps} steps.",
            why=f"The limit is {MAX_STEPS}.",
            next_step="Use larger batches.",
        )
    if graph.input_shape != (width,):
        raise UnsupportedModelError(
            f"The model takes inputs of shape {list(graph.input_shape)}, and the features encode to {width} numbers.",
            why="A number, a date or a boolean takes one, a category one for each declared value.",
            next_step=f"Begin the model with a layer of {width} inputs.",
        )
    if not graph.trainable:
        raise UnsupportedModelError("No parameter of the model can be trained.", next_step="Set requires_grad.")
    if plan.max_grad_norm < SMALLEST_NORM:
        raise InvalidRequestError(f"max_grad_norm is below {SMALLEST_NORM}.", next_step="Use one near 1.")
    program = Program(graph, training=True)
    output, elements = dry_run(program, graph, MAX_ELEMENTS)
    outputs = check_output(tuple(output.shape), kind.aim, kind.classes, plan.loss)
    loaded = load_weights(graph, weights)
    for name in graph.trainable:
        if loaded.parameters[name].dtype != torch.float32:
            raise UnsupportedModelError(f"The parameter {name!r} isn't float32.")
    slots, bound = _slots(plan.batch_size, units, elements, loaded, graph)
    try_sample(program, graph, loaded)
    _synthetic_step(program, plan, graph, loaded, min(2, slots))
    notes = tuple(_notes(graph, plan))
    facts = PreparedFacts(
        parameters=sum(tensor.numel() for tensor in loaded.parameters.values()),
        trainable=sum(loaded.parameters[name].numel() for name in graph.trainable),
        outputs=outputs,
        units=units,
        steps=steps,
        sample_rate=plan.batch_size / units,
        slots=slots,
        bytes_bound=bound,
        notes=notes,
    )
    return Prepared(plan, graph, loaded, kind, facts)


def slots_within(bytes_per_slot: int, wanted: int) -> int:
    """The number of slots, at most `wanted`, that MEMORY_BOUND holds. Raises UnsupportedModelError if not one fits."""
    fitting = MEMORY_BOUND // max(1, bytes_per_slot)
    if fitting < 1:
        raise UnsupportedModelError(
            f"One sample of the model needs {bytes_per_slot} bytes.",
            why=f"The guard gives a microbatch {MEMORY_BOUND} bytes.",
            next_step="Use a smaller model.",
        )
    return max(1, min(wanted, fitting, MAX_SLOTS))


def _slots(batch_size: int, units: int, elements: int, weights: Weights, graph: ModelGraph) -> tuple[int, int]:
    """(slots, bytes): most batches (expected size and 3 deviations) fit one microbatch, if memory permits.

    Forward values, their tangents and the backward's temporaries: 4 x; gradients twice, and float64 chunks.
    """
    sizes = [weights.parameters[name].numel() for name in graph.trainable]
    per_slot = 4 * (4 * elements + 2 * sum(sizes)) + 16
    wanted = min(units, math.ceil((batch_size + 3 * math.sqrt(batch_size)) / 8) * 8)
    slots = slots_within(per_slot, wanted)
    return slots, per_slot * slots


def _synthetic_step(program: Program, plan: TrainingPlan, graph: ModelGraph, weights: Weights, slots: int) -> None:
    """One backward pass of made-up samples: what can't be differentiated shows here, before the charge."""
    trainable, frozen = split_parameters(graph, weights)
    gradients = IsolatedGradients(program, plan.loss, weights.buffers, frozen)
    target = torch.zeros(slots, dtype=torch.int64 if plan.loss == "cross_entropy" else torch.float32)
    try:
        with torch.random.fork_rng(devices=[]):
            gradients(trainable, torch.zeros(slots, *graph.input_shape), target)
    except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError) as error:
        raise UnsupportedModelError(
            "The model can't be differentiated sample by sample.",
            why=(str(error).splitlines() or [""])[0][:300],
            next_step="Use supported layers (Linear, LayerNorm, GroupNorm, Dropout, activations, arithmetic).",
        ) from error


def split_parameters(graph: ModelGraph, weights: Weights) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(trainable, frozen), in the order of `graph.parameters`."""
    names = set(graph.trainable)
    return (
        {name: tensor for name, tensor in weights.parameters.items() if name in names},
        {name: tensor for name, tensor in weights.parameters.items() if name not in names},
    )


def _notes(graph: ModelGraph, plan: TrainingPlan) -> Iterator[str]:
    last = last_operation(graph)
    if plan.loss == "binary_cross_entropy" and last == _FALLING:
        raise UnsupportedModelError(
            "The model ends with a sigmoid, and binary_cross_entropy takes logits.",
            why="The loss applies the sigmoid itself; a second one flattens the gradients.",
            next_step="Remove the last sigmoid from the model.",
        )
    if plan.loss == "cross_entropy" and last == "aten.softmax.int":
        yield "The model ends with a softmax, and cross_entropy takes logits: without that layer it learns faster."
    if plan.optimizer.weight_decay > 0 and plan.optimizer.name == "adam":
        yield "adam applies weight_decay to the noisy gradients; adamw keeps the two apart."


def last_operation(graph: ModelGraph) -> str:
    """The operation that makes the output, seen through views."""
    at = graph.output
    while isinstance(at, NodeRef):
        node = graph.nodes[at.index]
        if node.op not in _SHAPES or not node.args or not isinstance(node.args[0], NodeRef):
            return node.op
        at = node.args[0]
    return ""
