"""Clipped sums: exact, bounded by C whatever a sample or a graph does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_guard.training.interpreter import Program, load_weights
from cloister_guard.training.isolate import IsolatedGradients, clipped_sum
from cloister_guard.training.noise import fine_spacing
from tests.fakes.training import amplifier, exported, mlp

C = 1.0


def _machine(graph: Any, weights: bytes) -> Any:
    loaded = load_weights(graph, weights)
    gradients = IsolatedGradients(Program(graph, training=True), "cross_entropy", loaded.buffers, {})

    def run(samples: torch.Tensor, targets: torch.Tensor, present: torch.Tensor, clip: float = C) -> torch.Tensor:
        found = gradients(loaded.parameters, samples, targets)
        spacing = fine_spacing(clip)
        sums = clipped_sum(list(found.values()), present, clip, spacing)
        return torch.cat([value.to(torch.float64).flatten() * spacing for value in sums])

    return run


def _batch(slots: int, width: int, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    samples = torch.rand(slots, width, generator=source) * 2 - 1
    return samples, torch.randint(0, 2, (slots,), generator=source)


def test_the_sum_is_that_of_clipping_one_by_one() -> None:
    graph, weights = exported(mlp(6), 6)
    samples, targets = _batch(9, 6)
    loaded = load_weights(graph, weights)
    model = mlp(6)
    model.load_state_dict(loaded.parameters)
    clip, expected = 0.3, torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for sample, target in zip(samples, targets, strict=True):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(sample[None]), target[None]).backward()
        whole = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).to(torch.float64)
        expected += whole * min(1.0, clip / float(whole.norm()))
    run = _machine(graph, weights)
    torch.testing.assert_close(
        run(samples, targets, torch.ones(9, dtype=torch.bool), clip), expected, rtol=1e-5, atol=1e-6
    )


def test_a_graph_that_amplifies_last_bits_moves_nothing_but_its_own_slot() -> None:
    worst_open, worst_fixed = 0.0, 0.0
    for width in (30, 64):
        run = _machine(*amplifier(width))
        for slots in (8, 12, 16, 20, 28):
            samples, targets = _batch(slots, width)
            everyone = torch.ones(slots, dtype=torch.bool)
            whole = run(samples, targets, everyone)
            # Positive control: where the batch shrinks with the sample, others' last bits move, and the graph shows it.
            shrunk = run(samples[:-1], targets[:-1], everyone[:-1])
            worst_open = max(worst_open, float((whole - shrunk).norm()))
            # The product: the shape stays, the unit's slot becomes a masked null.
            present = everyone.clone()
            present[-1] = False
            emptied = samples.clone()
            emptied[-1] = 0
            worst_fixed = max(worst_fixed, float((whole - run(emptied, targets, present)).norm()))
    assert worst_fixed <= C
    assert worst_open > 1.2 * C


def test_a_sample_without_a_finite_gradient_adds_exactly_nothing() -> None:
    run = _machine(*exported(mlp(6), 6))
    samples, targets = _batch(8, 6)
    present = torch.ones(8, dtype=torch.bool)
    without = present.clone()
    without[3] = False
    expected = run(samples, targets, without)
    for bad in (math.nan, math.inf, -math.inf, 3e38):
        hostile = samples.clone()
        hostile[3] = bad
        assert torch.equal(run(hostile, targets, present), expected)
    assert not torch.equal(run(samples, targets, present), expected)


def test_large_and_tiny_gradients_have_a_norm() -> None:
    gradients = torch.tensor([[3e38, 3e38], [1e-30, 0.0], [1e-45, 0.0], [0.0, 2.0]])
    spacing = fine_spacing(1e-32)
    total = clipped_sum([gradients], torch.tensor([True, False, False, False]), 1e-32, spacing)[0] * spacing
    torch.testing.assert_close(total.norm(), torch.tensor(1e-32), check_dtype=False)
    total = clipped_sum([gradients], torch.tensor([False, True, False, False]), 1e-32, spacing)[0] * spacing
    torch.testing.assert_close(total.norm(), torch.tensor(1e-32), check_dtype=False)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=6, max_size=6),
        min_size=1,
        max_size=9,
    ),
    clip=st.sampled_from([1e-3, 0.7, 1.0, 123.0]),
    slot=st.integers(0, 8),
)
def test_one_slot_moves_the_sum_by_at_most_the_clip(values: list[list[float]], clip: float, slot: int) -> None:
    slot %= len(values)
    gradients = torch.tensor(values, dtype=torch.float32)
    parts = [gradients[:, :1], gradients[:, 1:].reshape(-1, 5, 1)]
    everyone = torch.ones(len(values), dtype=torch.bool)
    without = everyone.clone()
    without[slot] = False
    spacing = fine_spacing(clip)
    with_it = torch.cat([part.flatten() for part in clipped_sum(parts, everyone, clip, spacing)])
    without_it = torch.cat([part.flatten() for part in clipped_sum(parts, without, clip, spacing)])
    moved = math.sqrt(sum(int(step) ** 2 for step in (with_it - without_it)))
    assert moved * spacing <= clip


def test_a_model_of_hostile_weights_stays_within_the_clip() -> None:
    import safetensors.torch

    graph, _ = exported(mlp(6), 6)
    for scale in (1e-20, 1e10, 1e19, 3e38):
        source = torch.Generator().manual_seed(2)
        tensors = {
            spec.name: torch.randn(spec.shape, generator=source).clamp(-1, 1) * scale for spec in graph.parameters
        }
        run = _machine(graph, safetensors.torch.save(tensors))
        samples, targets = _batch(8, 6)
        present = torch.ones(8, dtype=torch.bool)
        whole = run(samples, targets, present)
        for slot in range(8):
            without = present.clone()
            without[slot] = False
            assert float((whole - run(samples, targets, without)).norm()) <= C


def test_more_slots_than_a_chunk_add_up_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = torch.randn(16, 100, generator=torch.Generator().manual_seed(1))
    present, spacing = torch.ones(16, dtype=torch.bool), fine_spacing(C)
    whole = clipped_sum([gradients], present, C, spacing)[0]
    monkeypatch.setattr("cloister_guard.training.isolate._CHUNK", 16 * 7)
    assert torch.equal(clipped_sum([gradients], present, C, spacing)[0], whole)
