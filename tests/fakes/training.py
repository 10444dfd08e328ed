"""Plans, schemas, rows and graphs for the tests of training. The rows are made up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch

from cloister.modeling import export_model
from cloister_data.datasets import SplitRef
from cloister_data.graph import InputRef, Literals, ModelGraph, Node, NodeRef, ParameterRef, RefList, TensorSpec, Value
from cloister_data.schema import CategoryColumn, RealColumn, Schema
from cloister_data.training import EvaluationPlan, Optimizer, TrainingPlan
from cloister_guard.encoding import Targets

SOURCES = (SplitRef(dataset="hospital-a/records"),)


def schema(width: int, *, classes: int = 2) -> Schema:
    """Real columns x0, x1 ... in [-1, 1], the category `kind` and the number `amount` in [0, 10]."""
    return Schema(
        columns=(
            *(RealColumn(name=f"x{at}", low=-1, high=1) for at in range(width)),
            CategoryColumn(name="kind", categories=tuple(f"k{at}" for at in range(classes))),
            RealColumn(name="amount", low=0, high=10),
        )
    )


def rows(units: int, width: int, *, seed: int = 0) -> pa.Table:
    """Two classes that a line parts, and an amount that follows the features."""
    source = np.random.default_rng(seed)
    features = source.uniform(-1, 1, (units, width))
    side = features[:, : width // 2].sum(1) - features[:, width // 2 :].sum(1)
    columns: dict[str, Any] = {f"x{at}": features[:, at] for at in range(width)}
    columns["kind"] = [f"k{int(value > 0)}" for value in side]
    columns["amount"] = np.clip(5 + 2 * side, 0, 10)
    return pa.table(columns)


def features(width: int) -> tuple[str, ...]:
    return tuple(f"x{at}" for at in range(width))


def plan(width: int, **changes: Any) -> TrainingPlan:
    values: dict[str, Any] = {
        "sources": SOURCES,
        "model": "0" * 64,
        "features": features(width),
        "target": "kind",
        "loss": "cross_entropy",
        "optimizer": Optimizer(name="sgd", lr=0.5),
        "epochs": 1,
        "batch_size": 32,
        "max_grad_norm": 1.0,
        "noise_multiplier": 1.0,
    }
    return TrainingPlan(**(values | changes))


def evaluation(width: int, **changes: Any) -> EvaluationPlan:
    values: dict[str, Any] = {
        "sources": SOURCES,
        "model": "0" * 64,
        "features": features(width),
        "target": "kind",
        "metric": "accuracy",
        "epsilon": 1.0,
    }
    return EvaluationPlan(**(values | changes))


def mlp(width: int, outputs: int = 2) -> torch.nn.Module:
    torch.manual_seed(1)
    nn = torch.nn
    return nn.Sequential(nn.Linear(width, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, outputs))


def exported(model: torch.nn.Module, width: int) -> tuple[ModelGraph, bytes]:
    return export_model(model, width)


def targets(values: Sequence[float] | np.ndarray[Any, Any], *, classes: bool = True) -> Targets:
    kind = np.int64 if classes else np.float32
    return Targets(np.asarray(values, dtype=kind), np.ones(len(values), dtype=np.bool_))


def amplifier(width: int) -> tuple[ModelGraph, bytes]:
    """A hostile graph: one linear number, times 1e9, then its sine and cosine as two logits.

    The last bit of the linear number decides the gradient's direction.
    """
    torch.manual_seed(3)
    nodes = (
        Node(op="aten.unsqueeze.default", args=(InputRef(), literal(0))),
        Node(
            op="aten.linear.default",
            args=(NodeRef(index=0), ParameterRef(name="weight"), ParameterRef(name="bias")),
        ),
        Node(op="aten.mul.Tensor", args=(NodeRef(index=1), literal(1e9))),
        Node(op="aten.sin.default", args=(NodeRef(index=2),)),
        Node(op="aten.cos.default", args=(NodeRef(index=2),)),
        Node(op="aten.cat.default", args=(_refs(3, 4), literal(1))),
        Node(op="aten.squeeze.dim", args=(NodeRef(index=5), literal(0))),
    )
    graph = ModelGraph(
        input_shape=(width,),
        parameters=(
            TensorSpec(name="weight", shape=(1, width), dtype="float32"),
            TensorSpec(name="bias", shape=(1,), dtype="float32"),
        ),
        trainable=("weight", "bias"),
        nodes=nodes,
        output=NodeRef(index=6),
    )
    weights = {"weight": torch.randn(1, width), "bias": torch.zeros(1)}
    return graph, safetensors.torch.save(weights)


def _refs(*indices: int) -> RefList:
    return RefList(items=tuple(NodeRef(index=index) for index in indices))


def one_layer(op: str, *more: Any, width: int, shape: Sequence[int]) -> ModelGraph:
    """x [width], viewed as `shape`, through `op` (with the further arguments), flattened; then a sum of squares.

    Parameters: `scale` [width], so that gradients flow through the operation's input, and `p0`, `p1` ... where `more`
    holds tensors. The output is one number.
    """
    tensors = [value for value in more if isinstance(value, torch.Tensor)]
    names = iter(f"p{at}" for at in range(len(tensors)))
    arguments = [
        ParameterRef(name=next(names)) if isinstance(value, torch.Tensor) else literal(value) for value in more
    ]
    head: Any = NodeRef(index=1)
    if op in ("aten.cat.default", "aten.stack.default"):
        head = _refs(1, 1)
    nodes = [
        Node(op="aten.mul.Tensor", args=(InputRef(), ParameterRef(name="scale"))),
        Node(op="aten.reshape.default", args=(NodeRef(index=0), literal(list(shape)))),
        Node(op=op, args=(head, *arguments)),
        Node(op="aten.square.default", args=(NodeRef(index=2),)),
        Node(op="aten.sum.default", args=(NodeRef(index=3),)),
    ]
    return ModelGraph(
        input_shape=(width,),
        parameters=(
            TensorSpec(name="scale", shape=(width,), dtype="float32"),
            *(
                TensorSpec(name=f"p{at}", shape=tuple(tensor.shape), dtype="float32")
                for at, tensor in enumerate(tensors)
            ),
        ),
        trainable=("scale", *(f"p{at}" for at in range(len(tensors)))),
        nodes=tuple(nodes),
        output=NodeRef(index=4),
    )


def literal(value: Any) -> Any:
    return Literals(values=tuple(value)) if isinstance(value, list) else Value(value=value)
