"""A model on its way to the guard: a JSON graph of one sample's forward pass, beside safetensors weights.

The graph is a straight line of nodes. A node names an operation of the guard's fixed table and refers back to
inputs, parameters, buffers or earlier nodes; there is no code, no name lookup and no forward reference.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cloister_data.base import Wire

MAX_NODES = 20_000
MAX_TENSORS = 10_000
MAX_LITERALS = 64

TensorName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.]{0,255}$")]
DType = Literal["float32", "int64", "bool"]
Shape = Annotated[tuple[Annotated[int, Field(ge=0, le=1 << 31)], ...], Field(max_length=8)]


class InputRef(Wire):
    """The sample: float32 features."""

    ref: Literal["input"] = "input"


class ParameterRef(Wire):
    ref: Literal["parameter"] = "parameter"
    name: TensorName


class BufferRef(Wire):
    ref: Literal["buffer"] = "buffer"
    name: TensorName


class NodeRef(Wire):
    """The output number `output` of an earlier node."""

    ref: Literal["node"] = "node"
    index: int = Field(ge=0, lt=MAX_NODES)
    output: int = Field(default=0, ge=0, lt=64)


class Literals(Wire):
    """A list of plain values, such as a shape."""

    ref: Literal["list"] = "list"
    values: tuple[Annotated[int | float | bool | None, Field()], ...] = Field(max_length=MAX_LITERALS)


class Value(Wire):
    """One plain value. Strings are only those that an operation's table entry lists."""

    ref: Literal["value"] = "value"
    value: bool | int | float | Annotated[str, Field(max_length=32)] | None = None


class RefList(Wire):
    """Several tensors, as `cat` takes them."""

    ref: Literal["refs"] = "refs"
    items: tuple[Annotated[InputRef | ParameterRef | BufferRef | NodeRef, Field(discriminator="ref")], ...] = Field(
        max_length=MAX_LITERALS
    )


Argument = Annotated[
    InputRef | ParameterRef | BufferRef | NodeRef | Literals | Value | RefList, Field(discriminator="ref")
]


class Node(Wire):
    """`op` is an operator's name and overload, for example `aten.linear.default`. `where` names the user's layer."""

    op: Annotated[str, Field(pattern=r"^[a-z_][A-Za-z0-9_.]{0,95}$")]
    args: tuple[Argument, ...] = Field(default=(), max_length=32)
    kwargs: dict[Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_]{0,31}$")], Argument] = Field(default={}, max_length=16)
    where: Annotated[str, Field(max_length=256)] = ""


class TensorSpec(Wire):
    name: TensorName
    shape: Shape
    dtype: DType


class ModelGraph(Wire):
    """A function of ONE sample of shape `input_shape` (no batch dimension) to one output tensor.

    Tied weights appear once in `parameters` and are referred to several times. `trainable` lists the parameters that
    receive gradients; the others are frozen.
    """

    version: Literal[1] = 1
    input_shape: Shape
    parameters: tuple[TensorSpec, ...] = Field(max_length=MAX_TENSORS)
    buffers: tuple[TensorSpec, ...] = Field(default=(), max_length=MAX_TENSORS)
    trainable: tuple[TensorName, ...] = Field(max_length=MAX_TENSORS)
    nodes: tuple[Node, ...] = Field(max_length=MAX_NODES)
    output: Annotated[NodeRef | InputRef, Field(discriminator="ref")]

    @model_validator(mode="after")
    def _backwards_only(self) -> Self:
        names = [spec.name for spec in (*self.parameters, *self.buffers)]
        parameters = {spec.name for spec in self.parameters}
        buffers = {spec.name for spec in self.buffers}
        if len(set(names)) != len(names):
            raise ValueError("two tensors have the same name")
        if not set(self.trainable) <= parameters:
            raise ValueError("trainable names an unknown parameter")

        def check(argument: Argument, position: int) -> None:
            match argument:
                case NodeRef(index=index) if index >= position:
                    raise ValueError("a node refers forward")
                case ParameterRef(name=name) if name not in parameters:
                    raise ValueError("a node refers to an unknown parameter")
                case BufferRef(name=name) if name not in buffers:
                    raise ValueError("a node refers to an unknown buffer")
                case RefList(items=items):
                    for item in items:
                        check(item, position)
                case _:
                    pass

        for position, node in enumerate(self.nodes):
            for argument in (*node.args, *node.kwargs.values()):
                check(argument, position)
        check(self.output, len(self.nodes))
        return self
