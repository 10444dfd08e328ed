"""Graphs and weights from strangers: what can't run is refused by name, and nothing is ever executed from a file."""

from __future__ import annotations

import json
import pickle
import struct
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_data.errors import CloisterError, InvalidRequestError, TooLargeError, UnsupportedModelError
from cloister_data.graph import InputRef, ModelGraph, Node, NodeRef, RefList, TensorSpec
from cloister_guard.training.interpreter import Program, dry_run, load_weights, try_sample
from tests.fakes.training import exported, literal, mlp, one_layer

WIDTH = 6


def _graph(*nodes: Node, output: int | None = None, specs: tuple[TensorSpec, ...] = ()) -> ModelGraph:
    return ModelGraph(
        input_shape=(WIDTH,),
        parameters=specs,
        trainable=(),
        nodes=nodes,
        output=NodeRef(index=len(nodes) - 1 if output is None else output),
    )


def _node(op: str, *args: Any, where: str = "head.1 (Layer)", **kwargs: Any) -> Node:
    return Node(op=op, args=args, kwargs=kwargs, where=where)


@pytest.mark.parametrize(
    ("op", "says"),
    [
        ("aten.from_file.default", "aten.from_file.default in layer 'head.1 (Layer)'"),
        ("aten.relu_.default", "in place"),
        ("aten.nonzero.default", "doesn't run"),
        ("aten.native_batch_norm.default", "GroupNorm"),
        ("os.system", "doesn't run"),
        ("builtins.eval", "doesn't run"),
    ],
)
def test_an_operation_outside_the_table_is_refused_by_name(op: str, says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"layer 'head\.1") as raised:
        Program(_graph(_node(op, InputRef())), training=True)
    assert says in str(raised.value)


X = InputRef()


@pytest.mark.parametrize(
    "node",
    [
        _node("aten.relu.default"),
        _node("aten.relu.default", X, X),
        _node("aten.relu.default", literal(1.0)),
        _node("aten.relu.default", X, inplace=literal(True)),
        _node("aten.softmax.int", X),
        _node("aten.softmax.int", X, literal(0.5)),
        _node("aten.softmax.int", X, literal(True)),
        _node("aten.softmax.int", X, literal(0), dim=literal(0)),
        _node("aten.softmax.int", X, literal(0), dtype=literal("float64")),
        _node("aten.gelu.default", X, literal("exec")),
        _node("aten.gelu.default", X, literal(None)),
        _node("aten.view.default", X, literal([1.5, 4])),
        _node("aten.view.default", X, literal([True, 6])),
        _node("aten.view.default", X, literal(6)),
        _node("aten.cat.default", X),
        _node("aten.cat.default", RefList(items=())),
        _node("aten.add.Tensor", X, literal(None)),
        _node("aten.add.Tensor", X, literal("1")),
        _node("aten.mul.Tensor", X, literal(1e301)),
        _node("aten.dropout.default", X, literal(0.5), literal(1)),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(node: Node) -> None:
    with pytest.raises(UnsupportedModelError, match=r"head\.1"):
        Program(_graph(node), training=True)


@pytest.mark.parametrize(
    "node",
    [
        _node("aten.view.default", X, literal([5])),
        _node("aten.select.int", X, literal(0), literal(6)),
        _node("aten.slice.Tensor", X, literal(0), literal(0), literal(6), literal(0)),
        _node("aten.slice.Tensor", X, literal(4), literal(0), literal(6)),
        _node("aten.mm.default", X, X),
        _node("aten.matmul.default", X, X, where="head.1"),
        _node("aten.dropout.default", X, literal(1.5), literal(True)),
        _node("aten.split.Tensor", X, literal(0)),
        _node("aten.chunk.default", X, literal(65)),
        _node("aten.expand.default", X, literal([2**31, 2**31, 6])),
        _node("aten.expand.default", X, literal([2**31, 2**31, 2**31, 2**31, 6])),
    ],
    ids=str,
)
def test_what_can_not_be_computed_shows_in_the_dry_run(node: Node) -> None:
    if node.op == "aten.matmul.default":  # x . x is a number: fine
        output, _ = dry_run(Program(_graph(node), training=True), _graph(node), 100)
        assert output.shape == ()
        return
    with pytest.raises(UnsupportedModelError, match=r"head\.1"):
        dry_run(Program(_graph(node), training=True), _graph(node), 10_000)


def test_what_shapes_do_not_show_shows_on_one_sample() -> None:
    graph = one_layer("aten.softmax.int", 3, width=WIDTH, shape=(WIDTH,))
    weights = load_weights(graph, safetensors.torch.save({"scale": torch.ones(WIDTH)}))
    with pytest.raises(UnsupportedModelError, match=r"aten\.softmax\.int"):
        try_sample(Program(graph, training=True), graph, weights)


def test_growth_is_stopped_on_shapes_alone() -> None:
    """cat doubles sixty times: only the first doublings are ever shaped."""
    nodes = [_node("aten.neg.default", X)]
    nodes += [
        _node("aten.cat.default", RefList(items=(NodeRef(index=at), NodeRef(index=at))), where=f"step{at}")
        for at in range(60)
    ]
    graph = _graph(*nodes)
    with pytest.raises(UnsupportedModelError, match=r"step1[0-9]'") as raised:
        dry_run(Program(graph, training=True), graph, 1_000_000)
    assert "intermediate" in str(raised.value)


def test_splitting_into_countless_pieces_is_refused() -> None:
    graph = _graph(
        _node("aten.expand.default", X, literal([100_000, 6])), _node("aten.split.Tensor", NodeRef(index=0), literal(1))
    )
    with pytest.raises(UnsupportedModelError, match="64 tensors"):
        dry_run(Program(graph, training=True), graph, 10_000_000)


def test_an_output_that_does_not_exist_is_refused() -> None:
    graph = _graph(_node("aten.chunk.default", X, literal(2)), _node("aten.neg.default", NodeRef(index=0, output=2)))
    with pytest.raises(UnsupportedModelError):
        dry_run(Program(graph, training=True), graph, 1000)


def test_other_types_than_float32_are_refused() -> None:
    spec = TensorSpec(name="counts", shape=(6,), dtype="int64")
    from cloister_data.graph import ParameterRef

    graph = _graph(_node("aten.neg.default", ParameterRef(name="counts")), specs=(spec,))
    with pytest.raises(UnsupportedModelError, match="int64"):
        dry_run(Program(graph, training=True), graph, 1000)


def test_dropout_follows_the_mode() -> None:
    graph = one_layer("aten.dropout.default", 0.5, True, width=WIDTH, shape=(WIDTH,))
    sample, parameters = torch.ones(WIDTH), {"scale": torch.ones(WIDTH)}
    assert float(Program(graph, training=False)(parameters, {}, sample)) == WIDTH
    seen = {float(Program(graph, training=True)(parameters, {}, sample)) for _ in range(30)}
    assert len(seen) > 1


def test_the_interpreter_agrees_with_the_module() -> None:
    model = mlp(WIDTH)
    graph, weights = exported(model, WIDTH)
    loaded = load_weights(graph, weights)
    samples = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    program = Program(graph, training=False)
    for sample in samples:
        torch.testing.assert_close(program(loaded.parameters, loaded.buffers, sample), model(sample[None])[0])


# --- weights


class _Bomb:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('the file was executed')",))


def _weights_cases() -> dict[str, bytes]:
    graph, weights = exported(mlp(WIDTH), WIDTH)
    tensors = safetensors.torch.load(weights)
    first = graph.parameters[0].name
    header = json.dumps({first: {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}).encode()
    return {
        "empty": b"",
        "pickle": pickle.dumps(_Bomb()),
        "zip": b"PK\x03\x04" + bytes(100),
        "header too long": struct.pack("<Q", 2**60) + b"{}",
        "header no json": struct.pack("<Q", 4) + b"\xff\xff\xff\xff",
        "shape overflows": struct.pack("<Q", len(header)) + header + bytes(4),
        "cut": weights[:-1],
        "longer": weights + b"x",
        "one missing": safetensors.torch.save({k: v for k, v in tensors.items() if k != first}),
        "one more": safetensors.torch.save(tensors | {"extra": torch.zeros(1)}),
        "other shape": safetensors.torch.save(tensors | {first: torch.zeros(2, 2)}),
        "other type": safetensors.torch.save(tensors | {first: tensors[first].to(torch.float64)}),
        "NaN": safetensors.torch.save(tensors | {first: tensors[first] * float("nan")}),
        "infinite": safetensors.torch.save(tensors | {first: tensors[first] / 0}),
    }


@pytest.mark.parametrize("case", sorted(_weights_cases()))
def test_weights_that_do_not_fit_are_refused(case: str) -> None:
    graph, weights = exported(mlp(WIDTH), WIDTH)
    load_weights(graph, weights)
    with pytest.raises((InvalidRequestError, TooLargeError)):
        load_weights(graph, _weights_cases()[case])


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_damaged_weights_are_refused_or_harmless(data: st.DataObject) -> None:
    graph, weights = exported_once()
    at = data.draw(st.integers(0, len(weights) - 1))
    damaged = bytearray(weights)
    damaged[at] = data.draw(st.integers(0, 255))
    try:
        loaded = load_weights(graph, bytes(damaged))
    except CloisterError:
        return
    assert [tuple(t.shape) for t in loaded.parameters.values()] == [spec.shape for spec in graph.parameters]


_ONCE: list[tuple[ModelGraph, bytes]] = []


def exported_once() -> tuple[ModelGraph, bytes]:
    if not _ONCE:
        _ONCE.append(exported(mlp(WIDTH), WIDTH))
    return _ONCE[0]


def test_a_graph_that_declares_too_much_is_refused() -> None:
    huge = TensorSpec(name="w", shape=(2**31, 2**31), dtype="float32")
    graph = _graph(_node("aten.neg.default", X), specs=(huge,))
    with pytest.raises(TooLargeError):
        load_weights(graph, b"")
    with pytest.raises(TooLargeError):
        dry_run(Program(graph, training=True), graph, 1000)
    empty = _graph(_node("aten.neg.default", X), specs=(TensorSpec(name="w", shape=(0, 3), dtype="float32"),))
    with pytest.raises(UnsupportedModelError, match="no elements"):
        dry_run(Program(empty, training=True), empty, 1000)
