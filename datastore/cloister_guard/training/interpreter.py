"""Runs a model's graph on ONE sample. No code is generated, compiled or looked up by name outside `ops.OPERATIONS`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from cloister_data.errors import InvalidRequestError, TooLargeError, UnsupportedModelError
from cloister_data.graph import (
    Argument,
    BufferRef,
    InputRef,
    Literals,
    ModelGraph,
    Node,
    NodeRef,
    ParameterRef,
    RefList,
    Value,
)
from cloister_data.training import MAX_MODEL_BYTES
from cloister_guard.training.ops import OPERATIONS, REQUIRED, Kind, Operation, Parameter

DTYPES = {"float32": torch.float32, "int64": torch.int64, "bool": torch.bool}
_BYTES = {"float32": 4, "int64": 8, "bool": 1}
_FAR = 2**31
_KINDS_OF_TENSORS = {Kind.TENSOR, Kind.TENSOR_OR_NONE, Kind.OPERAND}
_Read = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class Weights:
    """A model's tensors by name, each of the dtype and shape that its graph declares, all finite."""

    parameters: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]


def load_weights(graph: ModelGraph, data: bytes) -> Weights:
    """Read safetensors bytes against the graph's declarations. Raises InvalidRequestError or TooLargeError."""
    if len(data) > MAX_MODEL_BYTES:
        raise TooLargeError(f"The weights take {len(data)} bytes.", why=f"The limit is {MAX_MODEL_BYTES} bytes.")
    check_declared(graph)
    specs = {spec.name: spec for spec in (*graph.parameters, *graph.buffers)}
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise InvalidRequestError(
            "The weights can't be read.", why="They are no valid safetensors file.", next_step="Export the model again."
        ) from error
    if set(tensors) != set(specs):
        odd = sorted(set(tensors) ^ set(specs))[0]
        raise InvalidRequestError(f"Weights and graph don't name the same tensors: {odd[:128]!r} is in one of them.")
    for name, spec in specs.items():
        tensor = tensors[name]
        if tensor.dtype != DTYPES[spec.dtype] or tuple(tensor.shape) != spec.shape:
            raise InvalidRequestError(f"The tensor {name!r} isn't of the shape and type that the graph declares.")
        if tensor.dtype.is_floating_point and not bool(torch.isfinite(tensor).all()):
            raise InvalidRequestError(
                f"The tensor {name!r} holds NaN or infinity.",
                next_step="Start from finite weights; a training that diverged needs a smaller lr.",
            )
    return Weights(
        {spec.name: tensors[spec.name] for spec in graph.parameters},
        {spec.name: tensors[spec.name] for spec in graph.buffers},
    )


def check_declared(graph: ModelGraph) -> None:
    """Every declared tensor holds something, and all fit a model. Raises UnsupportedModelError or TooLargeError."""
    declared = 0
    for spec in (*graph.parameters, *graph.buffers):
        size = math.prod(spec.shape)
        if size == 0:
            raise UnsupportedModelError(
                f"The tensor {spec.name!r} has no elements.", next_step="Remove its layer from the model."
            )
        declared += size * _BYTES[spec.dtype]
    if declared > MAX_MODEL_BYTES:
        raise TooLargeError(f"The graph declares {declared} bytes of weights.", why=f"At most {MAX_MODEL_BYTES}.")


class Program:
    """A graph made ready to run. Raises UnsupportedModelError, naming operation and layer, for what can't run."""

    def __init__(self, graph: ModelGraph, *, training: bool) -> None:
        tensors = {spec.name: 1 + at for at, spec in enumerate((*graph.parameters, *graph.buffers))}
        self._parameters = [spec.name for spec in graph.parameters]
        self._buffers = [spec.name for spec in graph.buffers]
        first = 1 + len(tensors)
        self._nodes = graph.nodes
        self._steps = [_compile(node, tensors, first, training) for node in graph.nodes]
        self._output = _tensor(graph.output, tensors, first)

    def __call__(
        self, parameters: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor], sample: torch.Tensor
    ) -> torch.Tensor:
        """The output for `sample` (the graph's input shape)."""
        values = self._start(parameters, buffers, sample)
        for run, reads in self._steps:
            values.append(run(*[read(values) for read in reads]))
        output = self._output(values)
        if not isinstance(output, torch.Tensor):
            raise UnsupportedModelError("The model's output isn't one tensor.")
        return output

    def trace(
        self, parameters: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor], sample: torch.Tensor
    ) -> Iterator[tuple[Node | None, Any]]:
        """Each node with its value, as they are computed, and (None, the output) at last: for the dry run."""
        values = self._start(parameters, buffers, sample)
        for node, (run, reads) in zip(self._nodes, self._steps, strict=True):
            try:
                values.append(run(*[read(values) for read in reads]))
            except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError, OverflowError) as error:
                first_line = (str(error).splitlines() or [""])[0][:300]
                raise UnsupportedModelError(
                    f"{described(node)} can't be computed.", why=first_line, next_step="Check the shapes of this layer."
                ) from error
            yield node, values[-1]
        yield None, self._output(values)

    def _start(
        self, parameters: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor], sample: torch.Tensor
    ) -> list[Any]:
        return [sample, *(parameters[name] for name in self._parameters), *(buffers[name] for name in self._buffers)]


def described(node: Node) -> str:
    """`aten.add.Tensor in layer 'head (Linear)'`."""
    return f"{node.op} in layer {node.where!r}" if node.where else node.op


def _compile(
    node: Node, tensors: Mapping[str, int], first: int, training: bool
) -> tuple[Callable[..., Any], list[_Read]]:
    operation = OPERATIONS.get(node.op)
    if operation is None:
        in_place = node.op.split(".")[1].endswith("_") if node.op.count(".") == 2 else False
        raise UnsupportedModelError(
            f"The model holds an operation that the guard doesn't run: {described(node)}.",
            why="It changes a tensor in place." if in_place else "Only operations of a fixed table are run.",
            next_step="Use its form that returns a new tensor (inplace=False)."
            if in_place
            else "Replace it by supported layers (Linear, LayerNorm, GroupNorm, Dropout, activations, arithmetic).",
        )
    bound = _bind(node, operation)
    reads = []
    for position, (parameter, argument) in enumerate(zip(operation.parameters, bound, strict=True)):
        if isinstance(argument, Parameter):
            read = _constant(argument.default)
        else:
            read = _argument(node, parameter, argument, tensors, first)
        if position == operation.training_flag and not training:
            read = _constant(False)
        reads.append(read)
    return operation.run, reads


def _bind(node: Node, operation: Operation) -> list[Argument | Parameter]:
    """Arguments in the order of the operation's parameters; a missing one is its parameter, for the default."""
    if len(node.args) > len(operation.parameters):
        raise _wrong(node, "it has too many arguments")
    bound: list[Argument | Parameter] = [*node.args, *operation.parameters[len(node.args) :]]
    places = {parameter.name: at for at, parameter in enumerate(operation.parameters)}
    for name, argument in node.kwargs.items():
        at = places.get(name)
        if at is None or at < len(node.args):
            raise _wrong(node, f"the argument {name!r} is unknown or given twice")
        bound[at] = argument
    for found in bound:
        if isinstance(found, Parameter) and found.default is REQUIRED:
            raise _wrong(node, f"the argument {found.name!r} is missing")
    return bound


def _wrong(node: Node, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{described(node)} can't be run: {why}.")


def _constant(value: Any) -> _Read:
    return lambda values: value


def _tensor(argument: Argument, tensors: Mapping[str, int], first: int) -> _Read:
    match argument:
        case InputRef():
            return lambda values: values[0]
        case ParameterRef(name=name) | BufferRef(name=name):
            at = tensors[name]
            return lambda values: values[at]
        case NodeRef(index=index, output=output):
            return lambda values: _output_of(values[first + index], output)
    raise UnsupportedModelError("A graph refers to something that isn't a tensor.")


def _output_of(value: Any, output: int) -> torch.Tensor:
    outputs = value if isinstance(value, tuple) else (value,)
    if output >= len(outputs):
        raise UnsupportedModelError("A graph refers to an output that its operation doesn't have.")
    found: torch.Tensor = outputs[output]
    return found


def _argument(node: Node, parameter: Parameter, argument: Argument, tensors: Mapping[str, int], first: int) -> _Read:
    kind = parameter.kind
    match argument:
        case InputRef() | ParameterRef() | BufferRef() | NodeRef() if kind in _KINDS_OF_TENSORS:
            return _tensor(argument, tensors, first)
        case RefList(items=items) if kind is Kind.TENSORS and items:
            reads = [_tensor(item, tensors, first) for item in items]
            return lambda values: [read(values) for read in reads]
        case Literals(values=literals) if kind in (Kind.INTS, Kind.INTS_OR_NONE):
            return _constant([_integer(node, parameter, literal) for literal in literals])
        case Value(value=value):
            return _constant(_plain(node, parameter, value))
    raise _wrong(node, f"the argument {parameter.name!r} must be {kind.value}")


def _integer(node: Node, parameter: Parameter, value: Any) -> int:
    if type(value) is not int:
        raise _wrong(node, f"the argument {parameter.name!r} must hold integers")
    return max(-_FAR, min(_FAR, value))


def _plain(node: Node, parameter: Parameter, value: Any) -> Any:
    """A literal of the kind that the parameter takes; an integer is clamped to +-2**31, as 2**63-1 ends slices."""
    kind = parameter.kind
    if parameter.choices:
        if value in parameter.choices and isinstance(value, str):
            return value
    elif value is None:
        if kind in (
            Kind.TENSOR_OR_NONE,
            Kind.INT_OR_NONE,
            Kind.INTS_OR_NONE,
            Kind.NUMBER_OR_NONE,
            Kind.NONE,
            Kind.ANY_BOOL,
        ):
            return None
    elif isinstance(value, bool):
        if kind in (Kind.BOOL, Kind.ANY_BOOL):
            return value
    elif isinstance(value, int) and kind in (Kind.INT, Kind.INT_OR_NONE):
        return _integer(node, parameter, value)
    elif isinstance(value, int | float) and kind in (Kind.NUMBER, Kind.NUMBER_OR_NONE, Kind.OPERAND):
        if abs(value) > 1e300:
            raise _wrong(node, f"the argument {parameter.name!r} is out of range")
        return value
    raise _wrong(node, f"the argument {parameter.name!r} must be {kind.value}")


def try_sample(program: Program, graph: ModelGraph, weights: Weights) -> None:
    """Run one made-up sample for real: some mistakes don't show on shapes alone. Raises UnsupportedModelError."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for _ in program.trace(weights.parameters, weights.buffers, torch.zeros(graph.input_shape)):
            pass


def dry_run(program: Program, graph: ModelGraph, limit: int) -> tuple[torch.Tensor, int]:
    """Shapes alone, on the meta device: (the output, the number of elements of all values of one sample).

    Raises UnsupportedModelError as soon as the values of one sample hold more than `limit` elements, or where a node
    can't be computed or isn't float32.
    """
    check_declared(graph)
    parameters = {
        spec.name: torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device="meta") for spec in graph.parameters
    }
    buffers = {spec.name: torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device="meta") for spec in graph.buffers}
    sample = torch.empty(graph.input_shape, dtype=torch.float32, device="meta")
    elements = 0
    output: torch.Tensor | None = None
    for node, value in program.trace(parameters, buffers, sample):
        found: Sequence[torch.Tensor] = value if isinstance(value, tuple) else (value,)
        if node is None:
            output = found[0]
            break
        for tensor in found:
            if tensor.dtype != torch.float32:
                raise UnsupportedModelError(f"{described(node)} gives {tensor.dtype}, not float32.")
            elements += math.prod(tensor.shape)  # numel() would wrap around
        if elements > limit:
            raise UnsupportedModelError(
                f"One sample of the model needs more than {limit} intermediate numbers, at {described(node)}.",
                next_step="Use a smaller model.",
            )
    if output is None or output.dtype != torch.float32:
        raise UnsupportedModelError("The model's output isn't a float32 tensor.")
    return output, elements
