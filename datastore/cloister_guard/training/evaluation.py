"""A metric's integer aggregate over private rows: exact, of known sensitivity, for the guard to add noise to."""

from __future__ import annotations

import numpy as np
import torch
from torch.func import vmap

from cloister_data.errors import InternalError, InvalidRequestError, UnsupportedModelError
from cloister_data.graph import ModelGraph
from cloister_data.schema import Schema
from cloister_data.training import EvaluationPlan
from cloister_guard.encoding import Floats, TargetKind, Targets, feature_width, target_kind
from cloister_guard.training.facts import EvaluationFacts
from cloister_guard.training.interpreter import Program, dry_run, load_weights, try_sample
from cloister_guard.training.loop import numerics
from cloister_guard.training.losses import check_output
from cloister_guard.training.planning import MAX_ELEMENTS, MAX_UNITS, slots_within

_ERROR_STEPS = 1 << 20
"""A unit's squared error, clipped to [0, 4] on the [-1, 1] scale, is counted in this many steps."""

_ERROR_BOUND = 4.0
_SLOTS = 256


def evaluation_facts(
    plan: EvaluationPlan, schema: Schema, graph: ModelGraph, weights: bytes, units: int
) -> EvaluationFacts:
    """What is public of an evaluation: sensitivity, step, outputs. Graph and weights are checked whole; no data needed.

    Raises InvalidRequestError or UnsupportedModelError.
    """
    if not 1 <= units <= MAX_UNITS:
        raise InvalidRequestError("There are no units to evaluate on.", next_step="Choose another part of the dataset.")
    program, kind, outputs, elements = _checked(plan, schema, graph)
    loaded = load_weights(graph, weights)
    slots_within(_bytes_per_slot(elements), _SLOTS)
    try_sample(program, graph, loaded)
    if plan.metric == "accuracy":
        return EvaluationFacts(sensitivity=1, step=1.0 / units, units=units, outputs=outputs)
    step = _ERROR_BOUND * kind.half_range**2 / (_ERROR_STEPS * units)
    return EvaluationFacts(sensitivity=_ERROR_STEPS, step=step, units=units, outputs=outputs)


def evaluate(
    plan: EvaluationPlan, schema: Schema, graph: ModelGraph, weights: bytes, features: Floats, targets: Targets
) -> int:
    """The exact aggregate over all units, of which `evaluation_facts` tells sensitivity and meaning. It is PRIVATE.

    accuracy: how many units are predicted right (a unit without a target is not). mse: the sum of the units' squared
    errors in steps, each clipped; a unit without a target adds nothing, one without a finite prediction the most.
    """
    program, kind, outputs, elements = _checked(plan, schema, graph)
    loaded = load_weights(graph, weights)
    if not len(features) == len(targets.values) == len(targets.present):
        raise InternalError("The rows don't match.")
    slots = slots_within(_bytes_per_slot(elements), _SLOTS)
    predict = vmap(lambda sample: program(loaded.parameters, loaded.buffers, sample), randomness="different")
    total = 0
    # Without subnormals, which are a hundred times as slow: a hostile graph would let one row tell itself by the time.
    with torch.no_grad(), numerics():
        for start in range(0, len(features), slots):
            # The last microbatch is filled with zeros: every one has the same shape, so no row disturbs another.
            samples = torch.zeros(slots, features.shape[1])
            block = features[start : start + slots]
            samples[: len(block)] = torch.from_numpy(np.ascontiguousarray(block, dtype=np.float32))
            output = predict(samples).reshape(slots, -1)[: len(block)].to(torch.float64).numpy()
            here = slice(start, start + len(block))
            total += _score(kind, outputs, output, targets.values[here], targets.present[here])
    return total


def _bytes_per_slot(elements: int) -> int:
    """Every value of one sample in float32, twice."""
    return 8 * elements + 16


def _score(
    kind: TargetKind,
    outputs: int,
    output: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    values: np.ndarray[tuple[int, ...], np.dtype[np.int64]] | Floats,
    present: np.ndarray[tuple[int, ...], np.dtype[np.bool_]],
) -> int:
    finite = np.isfinite(output).all(axis=1)
    if kind.aim == "number":
        prediction = np.where(finite, np.clip(output[:, 0], -1.0, 1.0), 0.0)
        error = np.where(finite, np.square(prediction - values), _ERROR_BOUND)
        counted = np.rint(np.clip(error, 0.0, _ERROR_BOUND) * (_ERROR_STEPS / _ERROR_BOUND)).astype(np.int64)
        return int(counted[present].sum())
    guess = (output[:, 0] > 0).astype(np.int64) if outputs == 1 else np.argmax(output, axis=1)
    return int(((guess == values) & finite & present).sum())


def _checked(plan: EvaluationPlan, schema: Schema, graph: ModelGraph) -> tuple[Program, TargetKind, int, int]:
    if plan.target in plan.features:
        raise InvalidRequestError("The target is among the features.", next_step="Leave it out of the features.")
    kind = target_kind(schema, plan.target, plan.metric)
    width = feature_width(schema, plan.features)
    if graph.input_shape != (width,):
        raise UnsupportedModelError(
            f"The model takes inputs of shape {list(graph.input_shape)}, and the features encode to {width} numbers.",
            next_step="Name the features that the model was trained on, in their order.",
        )
    program = Program(graph, training=False)
    output, elements = dry_run(program, graph, MAX_ELEMENTS)
    shape = tuple(output.shape)
    if kind.aim == "classes" and kind.classes == 2 and shape in ((), (1,)):
        return program, kind, 1, elements  # a logit of the second class
    return program, kind, check_output(shape, kind.aim, kind.classes, plan.metric), elements
