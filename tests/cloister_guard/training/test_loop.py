"""The loop: steps are marked before they are sampled, the model learns, and nothing but weights comes out."""

from __future__ import annotations

from typing import Any

import dp_accounting
import numpy as np
import pytest
import safetensors.torch
import torch
from dp_accounting.rdp import RdpAccountant

from cloister.modeling import load_weights
from cloister_data.errors import InternalError
from cloister_data.training import Optimizer
from cloister_guard.encoding import Targets, encode_features, encode_target
from cloister_guard.training import loop
from cloister_guard.training.loop import Engine, block_size, train
from cloister_guard.training.planning import Prepared, prepare
from cloister_guard.training.rehearsal import rehearse
from cloister_guard.training.sampler import PoissonSampler
from tests.fakes.training import exported, features, mlp, plan, rows, schema

WIDTH, UNITS = 4, 400


def _job(model: torch.nn.Module | None = None, **changes: Any) -> tuple[Prepared, Any, Targets]:
    graph, weights = exported(model or mlp(WIDTH), WIDTH)
    asked = plan(WIDTH, **changes)
    table, declared = rows(UNITS, WIDTH), schema(WIDTH)
    prepared = prepare(asked, declared, graph, weights, UNITS)
    encoded = encode_features(table, declared, features(WIDTH))
    return prepared, encoded, encode_target(table, declared, asked.target, asked.loss)


def _train(job: tuple[Prepared, Any, Targets], noise: float = 0.3, mark: Any = None, progress: Any = None) -> bytes:
    prepared, encoded, targets = job
    return train(
        prepared,
        encoded,
        targets,
        noise_multiplier=noise,
        mark=mark or (lambda steps: None),
        progress=progress or (lambda steps: None),
    )


def test_a_model_learns() -> None:
    model = mlp(WIDTH)
    job = _job(model, epochs=4, batch_size=64)
    load_weights(model, _train(job))
    guess = model(torch.from_numpy(job[1])).argmax(1).numpy()
    assert (guess == job[2].values).mean() > 0.9


@pytest.mark.parametrize(
    ("loss", "target", "outputs"),
    [
        ("binary_cross_entropy", "kind", 1),
        ("mse", "amount", 1),
        ("l1", "amount", 1),
        ("huber", "amount", 1),
    ],
)
@pytest.mark.parametrize("optimizer", ["adam"])
def test_every_loss_is_lowered(loss: Any, target: str, outputs: int, optimizer: Any) -> None:
    from cloister_guard.training.losses import sample_loss

    model = mlp(WIDTH, outputs)
    job = _job(model, loss=loss, target=target, optimizer=Optimizer(name=optimizer, lr=0.02), epochs=5, batch_size=80)

    def mean() -> float:
        predicted = model(torch.from_numpy(job[1])).detach()
        values = torch.from_numpy(job[2].values)
        return float(sum(sample_loss(loss, p, v) for p, v in zip(predicted, values, strict=True))) / UNITS

    before = mean()
    load_weights(model, _train(job, noise=0.05))
    assert mean() < 0.8 * before


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_optimizer_is_torchs_own(optimizer: Any) -> None:
    prepared, encoded, targets = _job(optimizer=Optimizer(name=optimizer, lr=0.1, momentum=0.5, weight_decay=0.1))
    engine = Engine(prepared, encoded, targets, noise_multiplier=1.0, steps=1)
    assert type(engine.optimizer.original_optimizer).__name__.lower() == optimizer
    assert engine.optimizer.param_groups[0]["weight_decay"] == 0.1


def test_steps_are_marked_before_their_batch_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, int]] = []

    class Watched(PoissonSampler):
        def __iter__(self) -> Any:
            for at, batch in enumerate(super().__iter__(), start=1):
                events.append(("sampled", at))
                yield batch

    monkeypatch.setattr(loop, "PoissonSampler", Watched)
    job = _job(epochs=5, batch_size=16)
    _train(job, mark=lambda steps: events.append(("marked", steps)))
    marked = 0
    for kind, number in events:
        if kind == "marked":
            assert number > marked
            marked = number
        else:
            assert number <= marked
    assert marked == job[0].facts().steps == sum(kind == "sampled" for kind, _ in events)
    assert len([kind for kind, _ in events if kind == "marked"]) <= 25


def test_a_mark_that_fails_ends_the_training_before_the_next_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = []
    words = PoissonSampler.__iter__

    def watched(self: Any) -> Any:
        for batch in words(self):
            sampled.append(batch)
            yield batch

    monkeypatch.setattr(PoissonSampler, "__iter__", watched)

    def mark(steps: int) -> None:
        if steps > 10:
            raise ConnectionError

    job = _job(epochs=8, batch_size=16)
    with pytest.raises(ConnectionError):
        _train(job, mark=mark)
    assert len(sampled) == block_size(job[0].facts().steps)


@pytest.mark.parametrize(("steps", "block"), [(1, 1), (20, 1), (21, 2), (100, 5), (1000, 50), (10**6, 50)])
def test_blocks_are_a_twentieth_or_fifty(steps: int, block: int) -> None:
    assert block_size(steps) == block


def test_progress_is_coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    job = _job(epochs=4, batch_size=16)
    seen: list[int] = []
    _train(job, progress=seen.append)
    assert seen == [job[0].facts().steps]  # done within one tick
    monkeypatch.setattr(loop, "TICK_SECONDS", 0.0)
    seen.clear()
    _train(job, progress=seen.append)
    assert all(step % block_size(100) == 0 for step in seen[:-1])
    assert seen == sorted(seen)
    assert len(seen) <= 21


def test_opacus_accountant_agrees_with_what_was_run() -> None:
    prepared, encoded, targets = _job(epochs=2, batch_size=40)
    facts = prepared.facts()
    engine = Engine(prepared, encoded, targets, noise_multiplier=1.1, steps=facts.steps)
    for _ in range(facts.steps):
        engine.step()
    assert engine.accountant.history == [(1.1, facts.sample_rate, facts.steps)]
    other = RdpAccountant()
    event = dp_accounting.PoissonSampledDpEvent(facts.sample_rate, dp_accounting.GaussianDpEvent(1.1))
    other.compose(dp_accounting.SelfComposedDpEvent(event, facts.steps))
    assert engine.accountant.get_epsilon(1e-5) == pytest.approx(other.get_epsilon(1e-5), rel=0.03)


def test_a_step_is_the_noisy_clipped_mean_over_the_expected_size() -> None:
    """With tiny noise and everybody sampled, plain SGD moves by lr * (clipped sum) / batch_size."""
    model = torch.nn.Linear(WIDTH, 2)
    prepared, encoded, targets = _job(
        model, batch_size=UNITS, max_grad_norm=0.2, optimizer=Optimizer(name="sgd", lr=0.5)
    )
    before = model.weight.detach().clone()
    total = torch.zeros_like(before)
    for sample, target in zip(torch.from_numpy(encoded), torch.from_numpy(targets.values), strict=True):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(sample[None]), target[None]).backward()
        assert model.weight.grad is not None
        assert model.bias.grad is not None
        norm = float(torch.cat([model.weight.grad.flatten(), model.bias.grad]).norm())
        total += model.weight.grad * min(1.0, 0.2 / norm)
    engine = Engine(prepared, encoded, targets, noise_multiplier=1e-6, steps=1)
    engine.step()
    after = safetensors.torch.load(engine.weights())["weight"]
    torch.testing.assert_close(after, before - 0.5 * total / UNITS, rtol=1e-4, atol=1e-6)


def test_batches_larger_than_the_slots_lose_nobody() -> None:
    prepared, encoded, targets = _job(batch_size=UNITS)
    small = Prepared(
        prepared.plan, prepared.graph, prepared.weights, prepared.target, prepared.known.model_copy(update={"slots": 7})
    )
    ends = []
    for job in (prepared, small):
        engine = Engine(job, encoded, targets, noise_multiplier=1e-6, steps=1)
        engine.step()
        ends.append(safetensors.torch.load(engine.weights()))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=1e-4, atol=1e-5)
    rows_seen = np.concatenate(list(engine._microbatches(np.arange(UNITS))))
    assert sorted(rows_seen[rows_seen >= 0]) == list(range(UNITS))
    assert len(rows_seen) % 7 == 0


def test_an_empty_batch_is_a_step_of_pure_noise() -> None:
    prepared, encoded, targets = _job()
    engine = Engine(prepared, encoded, targets, noise_multiplier=1.0, steps=1)
    engine._batches = iter([[]])
    before = safetensors.torch.load(engine.weights())
    engine.step()
    after = safetensors.torch.load(engine.weights())
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert engine.accountant.history[0][2] == 1


def test_a_null_target_is_sampled_and_adds_nothing() -> None:
    prepared, encoded, targets = _job(batch_size=UNITS)
    nobody = Targets(targets.values, np.zeros(UNITS, dtype=np.bool_))
    engine = Engine(prepared, encoded, nobody, noise_multiplier=1e-9, steps=1)
    before = safetensors.torch.load(engine.weights())
    engine.step()
    for name, tensor in safetensors.torch.load(engine.weights()).items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-6)


def test_frozen_parameters_and_buffers_come_back_as_they_were() -> None:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(WIDTH, 4), torch.nn.Linear(4, 2)
            self.first.weight.requires_grad_(False)
            self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0, 4.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x) * self.scale)

    model = Scaled()
    weights = safetensors.torch.load(_train(_job(model)))
    assert torch.equal(weights["scale"], torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert torch.equal(weights["first.weight"], model.first.weight)
    assert not torch.equal(weights["second.weight"], model.second.weight)


def test_no_two_attempts_are_alike_and_the_global_generator_is_left_alone() -> None:
    job = _job()
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    first = _train(job)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(7)
    assert _train(job) != first


def test_rows_that_do_not_match_the_plan_are_refused() -> None:
    prepared, encoded, targets = _job()
    with pytest.raises(InternalError):
        Engine(prepared, encoded[:-1], targets, noise_multiplier=1.0, steps=1)


def test_a_rehearsal_measures_and_keeps_nothing() -> None:
    prepared, encoded, targets = _job(epochs=3)
    figures = rehearse(prepared, encoded, targets, steps=5)
    assert figures.steps_run == 5
    assert 0 < figures.seconds < 600
    assert figures.memory_bytes > 50 << 20
    assert "seconds" in figures.model_dump()


def test_mean_canary_contribution_is_what_sampling_and_clipping_say() -> None:
    """A unit whose gradient is huge adds q * T * C along its direction, no more: clipping and rate hold together."""
    model = torch.nn.Linear(WIDTH, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    steps, clip = 400, 0.5
    prepared, encoded, targets = _job(
        model, loss="mse", target="amount", batch_size=40, max_grad_norm=clip, optimizer=Optimizer(name="sgd", lr=1e-12)
    )
    encoded = np.zeros_like(encoded)
    encoded[0, 0] = 1e6
    engine = Engine(
        prepared, encoded, Targets(np.full(UNITS, -1, np.float32), targets.present), noise_multiplier=0.1, steps=steps
    )
    grads: list[float] = []
    engine.optimizer.attach_step_hook(lambda optimizer: grads.append(float(optimizer.params[0].grad[0, 0])))
    for _ in range(steps):
        engine.step()
    total = sum(grads) * 40
    expected = 0.1 * steps * clip
    spread = (steps * 0.09 * clip**2 + steps * (0.1 * clip) ** 2) ** 0.5
    assert abs(total - expected) < 6 * spread
