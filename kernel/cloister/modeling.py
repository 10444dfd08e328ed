"""A torch model on its way to the guard and back: a JSON graph of one sample and safetensors, never a pickle.

torch is imported when a function is called, so that `import cloister` doesn't load it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cloister_data.errors import InvalidRequestError, UnsupportedModelError
from cloister_data.graph import (
    MAX_LITERALS,
    Argument,
    BufferRef,
    DType,
    InputRef,
    Literals,
    ModelGraph,
    Node,
    NodeRef,
    ParameterRef,
    RefList,
    TensorSpec,
    Value,
)

if TYPE_CHECKING:
    import torch
    from torch import fx, nn

_PREFIX = "model."
_FAR = 2**31


def export_model(model: nn.Module, input_width: int) -> tuple[ModelGraph, bytes]:
    """The model as a function of ONE sample of `input_width` numbers, and its weights as safetensors bytes.

    The model is written for batches [N, input_width] as usual; it is traced with one sample, in training mode, and left
    as it was. Raises UnsupportedModelError in the user's terms: which layer, and what to use instead.
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        raise InvalidRequestError(
            f"A model must be a torch.nn.Module, not {type(model).__name__}.", next_step="Pass a model's instance."
        )
    _check_layers(model)
    _check_tensors(model)
    names = _canonical_names(model)
    with _as_for_training(model):
        program = _trace(model, input_width)
    graph = _encode(program, model, names, input_width)
    return graph, _weights(model, graph)


def load_weights(model: nn.Module, data: bytes) -> nn.Module:
    """Put weights (safetensors bytes) into `model`, in place; the same model is returned.

    Raises InvalidRequestError where they are another model's.
    """
    import safetensors.torch
    import torch

    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # the parser's errors have no common class
        raise InvalidRequestError("The weights can't be read.", why="They are no valid safetensors file.") from error
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    persistent = set(own) & set(tensors)
    if set(tensors) - persistent or any(own[name].shape != tensors[name].shape for name in persistent):
        raise InvalidRequestError(
            "These weights belong to another model.",
            why="Names or shapes of its tensors differ.",
            next_step="Build the model as it was when it was trained.",
        )
    missing = [name for name, _ in model.named_parameters() if name not in tensors]
    if missing:
        raise InvalidRequestError(f"These weights belong to another model: {missing[0]!r} is missing.")
    with torch.no_grad():
        for name in persistent:
            own[name].copy_(tensors[name])
    return model


def _check_layers(model: nn.Module) -> None:
    from torch import nn

    refused: list[tuple[tuple[type[nn.Module], ...], str, str]] = [
        (
            (nn.modules.batchnorm._NormBase,),
            "it mixes the samples of a batch, so one person's data would reach another's gradient",
            "Use GroupNorm or LayerNorm instead.",
        ),
        ((nn.RNNBase, nn.RNNCellBase), "recurrent layers aren't supported yet", "Use Linear layers."),
        (
            (nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention),
            "only layers over a vector of features are supported yet",
            "Use Linear layers.",
        ),
    ]
    for name, layer in model.named_modules():
        for kinds, why, next_step in refused:
            instance_norm = isinstance(layer, nn.modules.instancenorm._InstanceNorm)
            if isinstance(layer, kinds) and not instance_norm:
                raise UnsupportedModelError(
                    f"The layer {_shown(name, layer)} can't be trained here.",
                    why=f"Of this layer: {why}.",
                    next_step=next_step,
                )
        if any(isinstance(tensor, nn.UninitializedParameter) for tensor in layer.parameters(recurse=False)):
            raise UnsupportedModelError(
                f"The layer {_shown(name, layer)} has no weights yet.", next_step="Call the model once on an example."
            )


def _shown(name: str, layer: nn.Module) -> str:
    return f"{name!r} ({type(layer).__name__})" if name else type(layer).__name__


def _check_tensors(model: nn.Module) -> None:
    import torch

    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.dtype.is_floating_point and tensor.dtype != torch.float32:
            raise UnsupportedModelError(
                f"The tensor {name!r} is {str(tensor.dtype).removeprefix('torch.')}.",
                why="Models are trained in float32.",
                next_step="Call model.float() first.",
            )
        if tensor.dtype not in (torch.float32, torch.int64, torch.bool):
            raise UnsupportedModelError(f"The tensor {name!r} is {str(tensor.dtype).removeprefix('torch.')}.")
        if tensor.dtype.is_floating_point and not bool(torch.isfinite(tensor).all()):
            raise UnsupportedModelError(
                f"The tensor {name!r} holds NaN or infinity.",
                why="The model was set so, or its training diverged.",
                next_step="Start from finite weights; after a divergence train again with a smaller lr.",
            )


def _canonical_names(model: nn.Module) -> dict[int, str]:
    """The one name of each tensor, by identity: tied weights have the first of their names."""
    return {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}


@contextmanager
def _as_for_training(model: nn.Module) -> Iterator[None]:
    """Training mode, and activations that return new tensors; every layer is put back as it was."""
    modes = [(layer, layer.training) for layer in model.modules()]
    in_place = [layer for layer in model.modules() if getattr(layer, "inplace", False) is True]
    try:
        model.train()
        for layer in in_place:
            layer.inplace = False  # type: ignore[assignment]
        yield
    finally:
        for layer in in_place:
            layer.inplace = True  # type: ignore[assignment]
        for layer, mode in modes:
            layer.training = mode


def _trace(model: nn.Module, input_width: int) -> torch.export.ExportedProgram:
    import torch

    class OneSample(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            output = self.model(sample.unsqueeze(0))
            if not isinstance(output, torch.Tensor):
                raise UnsupportedModelError(
                    f"The model returns {type(output).__name__}.", next_step="Return one tensor from forward()."
                )
            return output.squeeze(0) if output.dim() else output

    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    try:
        with torch.random.fork_rng(devices=[]):
            return torch.export.export(OneSample(), (torch.zeros(input_width, device=device),), strict=False)
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever the user's forward() raises
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UnsupportedModelError(
            f"The model can't be traced with a batch of shape [1, {input_width}].",
            why=first_line,
            next_step="Its first layer must take that many inputs, and forward() must not branch on the data.",
        ) from error


def _encode(
    program: torch.export.ExportedProgram, model: nn.Module, names: dict[int, str], input_width: int
) -> ModelGraph:
    import torch
    from torch.export.graph_signature import InputKind

    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    everything = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    references: dict[fx.Node, Argument] = {}
    placeholders = iter([node for node in program.graph.nodes if node.op == "placeholder"])
    for spec, node in zip(program.graph_signature.input_specs, placeholders, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            references[node] = InputRef()
            continue
        own = (spec.target or "").removeprefix(_PREFIX)
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER) or own not in everything:
            raise UnsupportedModelError(
                "The model holds a tensor that is neither a parameter nor a buffer.",
                why=f"It is the constant {own!r}.",
                next_step="Register it with register_buffer().",
            )
        name = names[id(everything[own])]
        references[node] = ParameterRef(name=name) if name in parameters else BufferRef(name=name)

    nodes: list[Node] = []
    output: Argument | None = None
    for node in program.graph.nodes:
        if node.op == "output":
            output = references.get(node.args[0][0])
        elif node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem":
            source, index = node.args
            base = references.get(source)
            if not isinstance(base, NodeRef) or not isinstance(index, int):
                raise UnsupportedModelError(f"An output can't be picked in {_where(node, model)!r}.")
            references[node] = NodeRef(index=base.index, output=index)
        elif node.op == "call_function":
            references[node] = NodeRef(index=len(nodes))
            nodes.append(_node(node, references, model))
        elif node.op != "placeholder":
            raise UnsupportedModelError(f"The model holds a step of kind {node.op!r}.")
    if not isinstance(output, NodeRef | InputRef):
        raise UnsupportedModelError("The model's output depends on no input.")
    dtypes: dict[torch.dtype, DType] = {torch.float32: "float32", torch.int64: "int64", torch.bool: "bool"}

    def specs(tensors: dict[str, Any]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(name=name, shape=tuple(tensor.shape), dtype=dtypes[tensor.dtype])
            for name, tensor in tensors.items()
        )

    return ModelGraph(
        input_shape=(input_width,),
        parameters=specs(parameters),
        buffers=specs(buffers),
        trainable=tuple(name for name, tensor in parameters.items() if tensor.requires_grad),
        nodes=tuple(nodes),
        output=output,
    )


def _node(node: fx.Node, references: dict[fx.Node, Argument], model: nn.Module) -> Node:
    where = _where(node, model)
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        raise UnsupportedModelError(f"{node.target} in {where!r} is no tensor operation.")
    op = str(node.target)
    if op.split(".")[1].endswith("_"):
        raise UnsupportedModelError(
            f"{op} in {where!r} changes a tensor in place.", next_step="Write it so that it returns a new tensor."
        )
    return Node(
        op=op,
        args=tuple(_argument(value, references, op, where) for value in node.args),
        kwargs={name: _argument(value, references, op, where) for name, value in node.kwargs.items()},
        where=where,
    )


def _argument(value: Any, references: dict[fx.Node, Argument], op: str, where: str) -> Argument:
    from torch import fx

    if isinstance(value, fx.Node):
        return references[value]
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return Value(value=value)
    if isinstance(value, int):
        return Value(value=max(-_FAR, min(_FAR, value)))
    if isinstance(value, float) and value == value and abs(value) != float("inf"):
        return Value(value=value)
    if isinstance(value, list | tuple) and len(value) <= MAX_LITERALS:
        if value and all(isinstance(item, fx.Node) for item in value):
            items = [references[item] for item in value]
            return RefList(
                items=tuple(item for item in items if isinstance(item, InputRef | ParameterRef | BufferRef | NodeRef))
            )
        if all(item is None or isinstance(item, bool | int | float) for item in value):
            return Literals(values=tuple(value))
    raise UnsupportedModelError(
        f"An argument of {op} in {where!r} can't be sent: {type(value).__name__}.",
        next_step="Use plain numbers, and tensors that are parameters or buffers.",
    )


def _where(node: fx.Node, model: nn.Module) -> str:
    """The user's layer that the operation comes from, for example `head.0 (Linear)`."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    path = path.removeprefix("model").removeprefix(".")
    layers = dict(model.named_modules())
    layer = layers.get(path, model)
    return f"{path} ({type(layer).__name__})"[:256] if path else type(layer).__name__[:256]


def _weights(model: nn.Module, graph: ModelGraph) -> bytes:
    import safetensors.torch

    own: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors = {
        spec.name: own[spec.name].detach().cpu().clone().contiguous() for spec in (*graph.parameters, *graph.buffers)
    }
    data: bytes = safetensors.torch.save(tensors)
    return data
