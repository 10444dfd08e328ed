"""Models on their way to the guard: exported as a graph, or refused in words that name the layer and the mend."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from cloister.modeling import export_model, load_weights
from cloister_data.errors import CloisterError, InvalidRequestError, UnsupportedModelError
from cloister_data.graph import ModelGraph

WIDTH = 6


class Everything(nn.Module):
    """The layers and the arithmetic that a table of numbers needs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 8), nn.Linear(8, 8)
        self.norm, self.group = nn.LayerNorm(8), nn.GroupNorm(2, 8)
        self.drop, self.act = nn.Dropout(0.2), nn.ReLU(inplace=True)
        self.head = nn.Linear(16, 3)
        self.register_buffer("scale", torch.full((8,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.act(self.norm(self.first(x)))
        hidden = nn.functional.gelu(self.second(hidden)) + hidden * 2 - 1
        hidden = self.drop(self.group(hidden)).view(x.shape[0], -1) * self.scale
        first, second = hidden.chunk(2, dim=1)
        hidden = torch.cat([first.tanh(), nn.functional.silu(second), -hidden.sigmoid()], dim=-1)
        return nn.functional.log_softmax(self.head(hidden.flatten(1).unsqueeze(1).squeeze(1)), dim=1)


def test_the_graph_is_a_function_of_one_sample_and_survives_its_json() -> None:
    from cloister_guard.training.interpreter import Program
    from cloister_guard.training.interpreter import load_weights as guard_reads

    model = Everything()
    graph, data = export_model(model, WIDTH)
    graph = ModelGraph.from_json(graph.to_json())
    assert graph.input_shape == (WIDTH,)
    assert [spec.name for spec in graph.buffers] == ["scale"]
    assert "first (Linear)" in {node.where for node in graph.nodes}
    loaded = guard_reads(graph, data)
    program = Program(graph, training=False)
    model.eval()
    for sample in torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0)):
        torch.testing.assert_close(program(loaded.parameters, loaded.buffers, sample), model(sample[None])[0])


def test_the_model_is_left_as_it_was() -> None:
    model = Everything()
    model.drop.eval()
    model.eval()
    model.first.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    graph, _ = export_model(model, WIDTH)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(layer.training for layer in model.modules())
    assert model.act.inplace
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "first.weight" not in graph.trainable
    assert "first.bias" in graph.trainable


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if x.sum() > 0 else -self.layer(x)


class Constant(Branching):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))


class Two(Branching):
    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x), x


class InPlace(Branching):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).relu_()


def _broken() -> nn.Module:
    model = nn.Linear(WIDTH, 2)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Sequential(nn.Linear(WIDTH, 4), nn.BatchNorm1d(4)), r"'1' \(BatchNorm1d\).*GroupNorm or LayerNorm"),
        (nn.Sequential(nn.Linear(WIDTH, 4), nn.LSTM(4, 4)), r"'1' \(LSTM\).*Linear"),
        (nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3)), r"'1' \(Conv1d\)"),
        (nn.Embedding(3, 3), "Embedding"),
        (nn.LazyLinear(3), "LazyLinear.*once"),
        (nn.Linear(WIDTH, 2).double(), r"float64.*model\.float"),
        (nn.Linear(WIDTH, 2).half(), "float16"),
        (_broken(), "NaN.*lr"),
        (nn.Linear(WIDTH + 1, 2), r"\[1, 6\]"),
        (Branching(), "branch"),
        (Constant(), "register_buffer"),
        (Two(), "returns tuple"),
        (InPlace(), r"aten\.relu_\.default.*in place"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_refusals_name_the_layer_and_the_mend(model: nn.Module, says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        export_model(model, WIDTH)


def test_something_else_than_a_model_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"torch\.nn\.Module"):
        export_model("model.pt", WIDTH)  # type: ignore[arg-type]


def test_tied_weights_travel_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x))

    model = Tied()
    graph, data = export_model(model, WIDTH)
    assert [spec.name for spec in graph.parameters] == ["one.weight", "one.bias", "two.bias"]
    tensors = safetensors.torch.load(data)
    tensors["one.weight"] += 1
    load_weights(model, safetensors.torch.save(tensors))
    assert model.two.weight is model.one.weight
    assert torch.equal(model.two.weight, tensors["one.weight"])


def test_weights_come_back_into_the_same_model() -> None:
    model, other = Everything(), Everything()
    _, data = export_model(other, WIDTH)
    assert load_weights(model, data) is model
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("other", [nn.Linear(WIDTH, 2), nn.Linear(3, 3)])
def test_weights_of_another_model_are_refused(other: nn.Module) -> None:
    model = Everything()
    before = model.first.weight.clone()
    with pytest.raises(InvalidRequestError, match="another model"):
        load_weights(model, safetensors.torch.save(dict(other.state_dict())))
    with pytest.raises(CloisterError):
        load_weights(model, b"\x80\x04no safetensors")
    assert torch.equal(model.first.weight, before)


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, cloister.modeling; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
