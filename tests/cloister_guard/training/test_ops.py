"""Every operation of the table: its value, its per-sample gradients, and the isolation of the slots, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cloister_guard.training.interpreter import Program, dry_run
from cloister_guard.training.isolate import IsolatedGradients
from cloister_guard.training.ops import OPERATIONS, REQUIRED
from tests.fakes.training import one_layer

WIDTH = 24
SLOTS = 13
_SOURCE = torch.Generator().manual_seed(11)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=_SOURCE)


# operation: (shape of its first argument, further arguments)
CASES: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "aten.linear.default": ((24,), (_random(5, 24), _random(5))),
    "aten.layer_norm.default": ((4, 6), ([6], _random(6), _random(6), 1e-5, True)),
    "aten.group_norm.default": ((1, 24), (4, _random(24), _random(24), 1e-5, True)),
    "aten.rms_norm.default": ((4, 6), ([6], _random(6), None)),
    "aten.dropout.default": ((24,), (0.0, True)),
    "aten.matmul.default": ((4, 6), (_random(6, 3),)),
    "aten.mm.default": ((4, 6), (_random(6, 3),)),
    "aten.bmm.default": ((2, 3, 4), (_random(2, 4, 5),)),
    "aten.gelu.default": ((24,), ("tanh",)),
    "aten.hardtanh.default": ((24,), (-0.5, 0.5)),
    "aten.softplus.default": ((24,), (2.0, 20.0)),
    "aten.elu.default": ((24,), (1.5,)),
    "aten.leaky_relu.default": ((24,), (0.2,)),
    "aten.prelu.default": ((1, 24), (_random(24),)),
    "aten.softmax.int": ((4, 6), (1,)),
    "aten.log_softmax.int": ((4, 6), (0,)),
    "aten.add.Tensor": ((4, 6), (_random(6),)),
    "aten.sub.Tensor": ((24,), (3,)),
    "aten.rsub.Scalar": ((24,), (1.0,)),
    "aten.mul.Tensor": ((24,), (2.5,)),
    "aten.div.Tensor": ((24,), (_random(24),)),
    "aten.maximum.default": ((24,), (_random(24),)),
    "aten.minimum.default": ((24,), (_random(24),)),
    "aten.pow.Tensor_Scalar": ((24,), (3,)),
    "aten.clamp.default": ((24,), (-0.7, None)),
    "aten.mean.dim": ((4, 6), ([1], True)),
    "aten.sum.dim_IntList": ((4, 6), ([0],)),
    "aten.view.default": ((4, 6), ([3, -1],)),
    "aten.reshape.default": ((4, 6), ([24],)),
    "aten.flatten.using_ints": ((2, 3, 4), (1,)),
    "aten.unflatten.int": ((24,), (0, [4, 6])),
    "aten.squeeze.dim": ((1, 24), (0,)),
    "aten.squeeze.dims": ((1, 24, 1), ([0, 2],)),
    "aten.unsqueeze.default": ((24,), (0,)),
    "aten.transpose.int": ((4, 6), (0, 1)),
    "aten.permute.default": ((2, 3, 4), ([2, 0, 1],)),
    "aten.expand.default": ((1, 24), ([3, 24],)),
    "aten.slice.Tensor": ((4, 6), (1, 1, 2**31, 2)),
    "aten.select.int": ((4, 6), (0, -1)),
    "aten.cat.default": ((4, 6), (1,)),
    "aten.stack.default": ((4, 6), (1,)),
    "aten.split.Tensor": ((4, 6), (2, 1)),
    "aten.chunk.default": ((4, 6), (2, 0)),
    "aten.t.default": ((4, 6), ()),
}
CASES |= {name: ((24,), ()) for name in OPERATIONS if name not in CASES}
POSITIVE = {"aten.log.default", "aten.sqrt.default", "aten.rsqrt.default", "aten.log1p.default"}
HOSTILE = (0.0, 1e30, -3e38, float("inf"), float("nan"), 1e-42, 4e4)


def _prepared(op: str) -> tuple[Any, dict[str, torch.Tensor], Any]:
    shape, more = CASES[op]
    graph = one_layer(op, *more, width=WIDTH, shape=shape)
    parameters = {"scale": torch.ones(WIDTH)}
    parameters |= {f"p{at}": value for at, value in enumerate(v for v in more if isinstance(v, torch.Tensor))}
    program = Program(graph, training=True)
    dry_run(program, graph, 10_000)
    return program, parameters, IsolatedGradients(program, "mse", {}, {})


def _samples(op: str) -> tuple[torch.Tensor, torch.Tensor]:
    samples = _random(SLOTS, WIDTH)
    return (samples.abs() + 0.1 if op in POSITIVE else samples), _random(SLOTS)


def _oracle(op: str) -> Any:
    namespace, name, overload = op.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


@pytest.mark.parametrize("op", sorted(OPERATIONS))
def test_arguments_are_torchs_own(op: str) -> None:
    ours, theirs = OPERATIONS[op].parameters, _oracle(op)._schema.arguments
    assert [p.name for p in ours] == [argument.name for argument in theirs][: len(ours)]
    for parameter, argument in zip(ours, theirs, strict=False):
        if argument.has_default_value() and parameter.default is not REQUIRED and "cudnn" not in parameter.name:
            assert parameter.default == argument.default_value
    # What the table leaves out is left out by torch.export too, as it has its default.
    assert all(argument.has_default_value() for argument in theirs[len(ours) :])


def test_every_operation_has_a_case() -> None:
    assert set(CASES) == set(OPERATIONS)


@pytest.mark.parametrize("op", sorted(OPERATIONS))
def test_it_computes_what_torch_computes(op: str) -> None:
    shape, more = CASES[op]
    program, parameters, _ = _prepared(op)
    sample = _samples(op)[0][0]
    name = op.split(".")[1]
    first: Any = sample.reshape(shape)
    if name in ("cat", "stack"):
        first = [first, first]
    oracle = _oracle(op)
    taken = list(zip(oracle._schema.arguments, [first, *more], strict=False))
    positional = [value for argument, value in taken if not argument.kwarg_only]
    expected = oracle(*positional, **{argument.name: value for argument, value in taken if argument.kwarg_only})
    wanted = (expected[0] if isinstance(expected, list | tuple) else expected).square().sum()
    torch.testing.assert_close(program(parameters, {}, sample), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", sorted(OPERATIONS))
def test_gradients_are_those_of_one_sample_at_a_time(op: str) -> None:
    program, parameters, gradients = _prepared(op)
    samples, targets = _samples(op)
    together = gradients(parameters, samples, targets)
    for slot in range(SLOTS):
        own = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        loss = torch.square(program(own, {}, samples[slot]) - targets[slot])
        alone = torch.autograd.grad(loss, list(own.values()), allow_unused=True, materialize_grads=True)
        for name, expected in zip(own, alone, strict=True):
            assert float((together[name][slot] - expected).norm()) <= 1e-5 * max(1.0, float(expected.norm()))


@pytest.mark.parametrize("threads", [1, 2])
def test_no_slot_moves_another_by_a_bit(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for op in OPERATIONS:
            _, parameters, gradients = _prepared(op)
            samples, targets = _samples(op)
            base = gradients(parameters, samples, targets)
            for number, value in enumerate(HOSTILE):
                slot = (5 * number) % SLOTS
                changed = samples.clone()
                changed[slot] = value
                others = torch.arange(SLOTS) != slot
                for name, after in gradients(parameters, changed, targets).items():
                    same = after[others].view(torch.int32) == base[name][others].view(torch.int32)
                    assert bool(same.all()), (op, name, value)
    finally:
        torch.set_num_threads(before)


def test_dropout_draws_for_each_slot_whatever_the_samples_are() -> None:
    graph = one_layer("aten.dropout.default", 0.5, True, width=WIDTH, shape=(WIDTH,))
    gradients = IsolatedGradients(Program(graph, training=True), "mse", {}, {})
    samples, targets = torch.ones(SLOTS, WIDTH), torch.zeros(SLOTS)
    found = []
    for value in (1.0, float("nan"), 1e30):
        changed = samples.clone()
        changed[4] = value
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(17)
            found.append(gradients({"scale": torch.ones(WIDTH)}, changed, targets)["scale"])
    others = torch.arange(SLOTS) != 4
    assert all(torch.equal(found[0][others], other[others]) for other in found[1:])
    # The slots' masks differ, though their samples are the same.
    assert len({tuple((row == 0).tolist()) for row in found[0][others]}) > 5
