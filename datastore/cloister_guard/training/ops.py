"""The operations that a graph may hold. What isn't in the table doesn't run.

Every entry is a total, out-of-place function of its tensors: it never indexes outside, reads no memory of its own, and
gives NaN or infinity where mathematics has no value (such a sample is masked later). Names and argument names are those
of torch's ATen operators, before decomposition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)


class Kind(Enum):
    """What an argument must be."""

    TENSOR = "a tensor"
    TENSOR_OR_NONE = "a tensor or None"
    OPERAND = "a tensor or a number"
    TENSORS = "a list of tensors"
    INT = "an integer"
    INT_OR_NONE = "an integer or None"
    INTS = "a list of integers"
    INTS_OR_NONE = "integers or None"
    NUMBER = "a number"
    NUMBER_OR_NONE = "a number or None"
    BOOL = "True or False"
    NONE = "None"
    ANY_BOOL = "True, False or None"
    TEXT = "one of its strings"


class _Required:
    pass


REQUIRED = _Required()
MAX_OUTPUTS = 64
"""As many as `cloister_data.graph.NodeRef` can name."""


@dataclass(frozen=True)
class Parameter:
    """One argument of an operation; `choices` are the strings that it may hold, where it takes strings."""

    name: str
    kind: Kind
    default: Any = REQUIRED
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Operation:
    """`run` takes the arguments in the order of `parameters`.

    `training_flag` is the position of the flag that evaluation sets to False (dropout's), or None. An operation of
    several outputs gives a tuple of at most MAX_OUTPUTS.
    """

    run: Callable[..., Any]
    parameters: tuple[Parameter, ...]
    training_flag: int | None = None


_SELF = Parameter("self", Kind.TENSOR)
_DIM = Parameter("dim", Kind.INT)
_NO_DTYPE = Parameter("dtype", Kind.NONE, None)


def _unary(run: Callable[..., Any], *more: Parameter) -> Operation:
    return Operation(run, (_SELF, *more))


def _binary(run: Callable[..., Any], *more: Parameter) -> Operation:
    return Operation(run, (_SELF, Parameter("other", Kind.OPERAND), *more))


def _gelu(x: torch.Tensor, approximate: str) -> torch.Tensor:
    return F.gelu(x, approximate=approximate)


def _elu(x: torch.Tensor, alpha: float, scale: float, input_scale: float) -> torch.Tensor:
    return scale * torch.where(x > 0, x * 1.0, alpha * torch.expm1(input_scale * torch.clamp(x, max=0.0)))


def _mean(x: torch.Tensor, dim: list[int] | None, keepdim: bool, dtype: None) -> torch.Tensor:
    return torch.mean(x, dim=dim, keepdim=keepdim) if dim is not None else torch.mean(x)


def _sum(x: torch.Tensor, dim: list[int] | None, keepdim: bool, dtype: None) -> torch.Tensor:
    return torch.sum(x, dim=dim, keepdim=keepdim) if dim is not None else torch.sum(x)


def _layer_norm(
    x: torch.Tensor,
    shape: list[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    cudnn: bool | None,
) -> torch.Tensor:
    return F.layer_norm(x, shape, weight, bias, eps)


def _group_norm(
    x: torch.Tensor, groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, cudnn: bool | None
) -> torch.Tensor:
    return F.group_norm(x, groups, weight, bias, eps)


def _slice(x: torch.Tensor, dim: int, start: int | None, end: int | None, step: int) -> torch.Tensor:
    index: list[slice] = [slice(None)] * x.dim()
    index[dim] = slice(start, end, step)
    return x[tuple(index)]


def _split(x: torch.Tensor, size: int, dim: int) -> tuple[torch.Tensor, ...]:
    if size < 1 or x.shape[dim] > size * MAX_OUTPUTS:
        raise ValueError(f"it splits into more than {MAX_OUTPUTS} tensors")
    return tuple(torch.split(x, size, dim))


def _chunk(x: torch.Tensor, chunks: int, dim: int) -> tuple[torch.Tensor, ...]:
    if not 1 <= chunks <= MAX_OUTPUTS:
        raise ValueError(f"it splits into more than {MAX_OUTPUTS} tensors")
    return tuple(torch.chunk(x, chunks, dim))


def _shrink(limit: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: torch.clamp(x, 0.0, limit)


_ALPHA = Parameter("alpha", Kind.NUMBER, 1)
_KEEPDIM = Parameter("keepdim", Kind.BOOL, False)
_WEIGHT = Parameter("weight", Kind.TENSOR_OR_NONE, None)
_BIAS = Parameter("bias", Kind.TENSOR_OR_NONE, None)
_EPS = Parameter("eps", Kind.NUMBER, 1e-5)
_CUDNN = Parameter("cudnn_enabled", Kind.ANY_BOOL, None)
_LIST = (Parameter("tensors", Kind.TENSORS), Parameter("dim", Kind.INT, 0))

OPERATIONS: dict[str, Operation] = {
    # layers
    "aten.linear.default": Operation(
        F.linear, (Parameter("input", Kind.TENSOR), Parameter("weight", Kind.TENSOR), _BIAS)
    ),
    "aten.layer_norm.default": Operation(
        _layer_norm,
        (
            Parameter("input", Kind.TENSOR),
            Parameter("normalized_shape", Kind.INTS),
            _WEIGHT,
            _BIAS,
            _EPS,
            Parameter("cudnn_enable", Kind.ANY_BOOL, None),
        ),
    ),
    "aten.group_norm.default": Operation(
        _group_norm,
        (Parameter("input", Kind.TENSOR), Parameter("num_groups", Kind.INT), _WEIGHT, _BIAS, _EPS, _CUDNN),
    ),
    "aten.rms_norm.default": Operation(
        lambda x, shape, weight, eps: F.rms_norm(x, shape, weight, eps),
        (
            Parameter("input", Kind.TENSOR),
            Parameter("normalized_shape", Kind.INTS),
            _WEIGHT,
            Parameter("eps", Kind.NUMBER_OR_NONE, None),
        ),
    ),
    "aten.dropout.default": Operation(
        lambda x, p, train: F.dropout(x, p, training=train),
        (Parameter("input", Kind.TENSOR), Parameter("p", Kind.NUMBER), Parameter("train", Kind.BOOL)),
        training_flag=2,
    ),
    "aten.matmul.default": Operation(torch.matmul, (_SELF, Parameter("other", Kind.TENSOR))),
    "aten.bmm.default": Operation(torch.bmm, (_SELF, Parameter("mat2", Kind.TENSOR))),
    "aten.mm.default": Operation(torch.mm, (_SELF, Parameter("mat2", Kind.TENSOR))),
    # activations
    "aten.relu.default": _unary(torch.relu),
    "aten.relu6.default": _unary(_shrink(6.0)),
    "aten.gelu.default": _unary(_gelu, Parameter("approximate", Kind.TEXT, "none", ("none", "tanh"))),
    "aten.silu.default": _unary(F.silu),
    "aten.mish.default": _unary(F.mish),
    "aten.tanh.default": _unary(torch.tanh),
    "aten.sigmoid.default": _unary(torch.sigmoid),
    "aten.log_sigmoid.default": _unary(F.logsigmoid),
    "aten.hardtanh.default": _unary(
        torch.clamp, Parameter("min_val", Kind.NUMBER, -1), Parameter("max_val", Kind.NUMBER, 1)
    ),
    "aten.hardswish.default": _unary(F.hardswish),
    "aten.hardsigmoid.default": _unary(F.hardsigmoid),
    "aten.softplus.default": _unary(
        F.softplus, Parameter("beta", Kind.NUMBER, 1), Parameter("threshold", Kind.NUMBER, 20)
    ),
    "aten.elu.default": _unary(
        _elu,
        Parameter("alpha", Kind.NUMBER, 1),
        Parameter("scale", Kind.NUMBER, 1),
        Parameter("input_scale", Kind.NUMBER, 1),
    ),
    "aten.selu.default": _unary(F.selu),
    "aten.leaky_relu.default": _unary(F.leaky_relu, Parameter("negative_slope", Kind.NUMBER, 0.01)),
    "aten.prelu.default": Operation(
        lambda x, weight: torch.where(x > 0, x, weight * x), (_SELF, Parameter("weight", Kind.TENSOR))
    ),
    "aten.softmax.int": _unary(lambda x, dim, dtype: torch.softmax(x, dim), _DIM, _NO_DTYPE),
    "aten.log_softmax.int": _unary(lambda x, dim, dtype: torch.log_softmax(x, dim), _DIM, _NO_DTYPE),
    # arithmetic
    "aten.add.Tensor": _binary(lambda x, y, alpha: torch.add(x, y, alpha=alpha), _ALPHA),
    "aten.sub.Tensor": _binary(lambda x, y, alpha: torch.sub(x, y, alpha=alpha), _ALPHA),
    "aten.rsub.Scalar": _binary(lambda x, y, alpha: y - alpha * x, _ALPHA),
    "aten.mul.Tensor": _binary(torch.mul),
    "aten.div.Tensor": _binary(torch.div),
    "aten.maximum.default": Operation(torch.maximum, (_SELF, Parameter("other", Kind.TENSOR))),
    "aten.minimum.default": Operation(torch.minimum, (_SELF, Parameter("other", Kind.TENSOR))),
    "aten.neg.default": _unary(torch.neg),
    "aten.abs.default": _unary(torch.abs),
    "aten.exp.default": _unary(torch.exp),
    "aten.log.default": _unary(torch.log),
    "aten.log1p.default": _unary(torch.log1p),
    "aten.sqrt.default": _unary(torch.sqrt),
    "aten.rsqrt.default": _unary(torch.rsqrt),
    "aten.reciprocal.default": _unary(torch.reciprocal),
    "aten.square.default": _unary(torch.square),
    "aten.sin.default": _unary(torch.sin),
    "aten.cos.default": _unary(torch.cos),
    "aten.pow.Tensor_Scalar": _unary(torch.pow, Parameter("exponent", Kind.NUMBER)),
    "aten.clamp.default": _unary(
        lambda x, low, high: torch.clamp(x, low, high) if (low, high) != (None, None) else x,
        Parameter("min", Kind.NUMBER_OR_NONE, None),
        Parameter("max", Kind.NUMBER_OR_NONE, None),
    ),
    "aten.mean.dim": _unary(_mean, Parameter("dim", Kind.INTS_OR_NONE), _KEEPDIM, _NO_DTYPE),
    "aten.mean.default": _unary(lambda x, dtype: torch.mean(x), _NO_DTYPE),
    "aten.sum.dim_IntList": _unary(_sum, Parameter("dim", Kind.INTS_OR_NONE), _KEEPDIM, _NO_DTYPE),
    "aten.sum.default": _unary(lambda x, dtype: torch.sum(x), _NO_DTYPE),
    # shapes
    "aten.view.default": _unary(torch.reshape, Parameter("size", Kind.INTS)),
    "aten.reshape.default": _unary(torch.reshape, Parameter("shape", Kind.INTS)),
    "aten.flatten.using_ints": _unary(
        torch.flatten, Parameter("start_dim", Kind.INT, 0), Parameter("end_dim", Kind.INT, -1)
    ),
    "aten.unflatten.int": _unary(torch.unflatten, _DIM, Parameter("sizes", Kind.INTS)),
    "aten.squeeze.default": _unary(torch.squeeze),
    "aten.squeeze.dim": _unary(torch.squeeze, _DIM),
    "aten.squeeze.dims": _unary(lambda x, dim: torch.squeeze(x, tuple(dim)), Parameter("dim", Kind.INTS)),
    "aten.unsqueeze.default": _unary(torch.unsqueeze, _DIM),
    "aten.transpose.int": _unary(torch.transpose, Parameter("dim0", Kind.INT), Parameter("dim1", Kind.INT)),
    "aten.t.default": _unary(torch.t),
    "aten.permute.default": _unary(torch.permute, Parameter("dims", Kind.INTS)),
    "aten.expand.default": _unary(
        lambda x, size, implicit: x.expand(size), Parameter("size", Kind.INTS), Parameter("implicit", Kind.BOOL, False)
    ),
    "aten.slice.Tensor": _unary(
        _slice,
        Parameter("dim", Kind.INT, 0),
        Parameter("start", Kind.INT_OR_NONE, None),
        Parameter("end", Kind.INT_OR_NONE, None),
        Parameter("step", Kind.INT, 1),
    ),
    "aten.select.int": _unary(torch.select, _DIM, Parameter("index", Kind.INT)),
    "aten.cat.default": Operation(lambda tensors, dim: torch.cat(tuple(tensors), dim), _LIST),
    "aten.stack.default": Operation(lambda tensors, dim: torch.stack(tuple(tensors), dim), _LIST),
    "aten.split.Tensor": Operation(
        _split,
        (_SELF, Parameter("split_size", Kind.INT), Parameter("dim", Kind.INT, 0)),
    ),
    "aten.chunk.default": Operation(
        _chunk,
        (_SELF, Parameter("chunks", Kind.INT), Parameter("dim", Kind.INT, 0)),
    ),
    "aten.contiguous.default": _unary(lambda x: x),
    "aten.clone.default": _unary(lambda x: x),
    "aten.alias.default": _unary(lambda x: x),
}
