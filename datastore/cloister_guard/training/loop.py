"""The training loop: mark, sample, gradients in fixed slots, clip, add up, noise, step."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from opacus.accountants import RDPAccountant

from cloister_data.errors import InternalError
from cloister_data.training import Optimizer
from cloister_guard.encoding import Floats, Targets
from cloister_guard.training.interpreter import Program
from cloister_guard.training.isolate import IsolatedGradients
from cloister_guard.training.optimizer import LatticeOptimizer
from cloister_guard.training.planning import Prepared, split_parameters
from cloister_guard.training.randomness import KeyedStream
from cloister_guard.training.sampler import PoissonSampler

BLOCK_SHARE = 20
"""Steps are marked in blocks of 1/20 of them."""

MAX_BLOCK = 50
TICK_SECONDS = 5.0
"""Progress moves at most this often, and by blocks: its pace shows no batch's size."""


def block_size(steps: int) -> int:
    return max(1, min(MAX_BLOCK, math.ceil(steps / BLOCK_SHARE)))


def train(
    prepared: Prepared,
    features: Floats,
    targets: Targets,
    *,
    noise_multiplier: float,
    mark: Callable[[int], None],
    progress: Callable[[int], None],
) -> bytes:
    """Train on features [units, F]; safetensors bytes of all parameters and buffers.

    `mark(k)` is called, and has returned, before the batch of step k is sampled: steps 1..k are then spent.
    `progress(k)` says that k steps are done. An exception of either ends the training. Loss, gradient norms and batch
    sizes leave this function in no way.
    """
    facts = prepared.known
    engine = Engine(prepared, features, targets, noise_multiplier=noise_multiplier, steps=facts.steps)
    block = block_size(facts.steps)
    marked, ticked = 0, time.monotonic()
    with numerics():
        for done in range(facts.steps):
            if done == marked:
                marked = min(facts.steps, marked + block)
                mark(marked)
            engine.step()
            if (done + 1) % block == 0 and time.monotonic() - ticked >= TICK_SECONDS:
                ticked = time.monotonic()
                progress(done + 1)
    progress(facts.steps)
    return engine.weights()


class Engine:
    """One attempt at a training: its own keys for sampling, slots, noise and dropout, fresh from the system."""

    def __init__(
        self, prepared: Prepared, features: Floats, targets: Targets, *, noise_multiplier: float, steps: int
    ) -> None:
        plan, facts = prepared.plan, prepared.known
        if not features.shape[0] == len(targets.values) == len(targets.present) == facts.units:
            raise InternalError("The rows don't match the plan.")
        self._prepared = prepared
        self._features = torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32))
        self._targets = torch.from_numpy(targets.values)
        self._present = torch.from_numpy(targets.present)
        trainable, self._frozen = split_parameters(prepared.graph, prepared.weights)
        self._parameters = {name: torch.nn.Parameter(value.clone()) for name, value in trainable.items()}
        self._gradients = IsolatedGradients(
            Program(prepared.graph, training=True), plan.loss, prepared.weights.buffers, self._frozen
        )
        self.optimizer = LatticeOptimizer(
            _optimizer(plan.optimizer, list(self._parameters.values())),
            noise_multiplier=noise_multiplier,
            max_grad_norm=plan.max_grad_norm,
            expected_batch_size=plan.batch_size,
        )
        self.accountant = RDPAccountant()
        self.optimizer.attach_step_hook(self.accountant.get_optimizer_hook_fn(facts.sample_rate))
        self._batches = iter(PoissonSampler(num_samples=facts.units, sample_rate=facts.sample_rate, steps=steps))
        self._places = KeyedStream()

    def step(self) -> None:
        """One step of DP-SGD. An empty batch is a step like any other: its noise is applied."""
        batch = np.asarray(next(self._batches), dtype=np.int64)
        microbatches = list(self._microbatches(batch))
        detached = {name: value.detach() for name, value in self._parameters.items()}
        for number, rows in enumerate(microbatches):
            # A slot without a unit reads row 0 and is overwritten by zeros.
            index = torch.from_numpy(np.maximum(rows, 0))
            filled = torch.from_numpy(rows >= 0)
            present = filled & self._present[index]
            samples = torch.where(present[:, None], self._features[index], 0.0)
            targets = torch.where(present, self._targets[index], 0)
            gradients = self._gradients(detached, samples, targets)
            self.optimizer.set_gradients([gradients[name] for name in self._parameters], present)
            self.optimizer.signal_skip_step(do_skip=number < len(microbatches) - 1)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def _microbatches(self, batch: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
        """Row numbers by slot, -1 where empty. The units take random slots of as few microbatches as hold them."""
        slots = self._prepared.known.slots
        count = max(1, -(-len(batch) // slots))
        places = np.full(count * slots, -1, dtype=np.int64)
        places[self._places.permutation(count * slots)[: len(batch)]] = batch
        yield from places.reshape(count, slots)

    def weights(self) -> bytes:
        """All parameters and buffers, by the graph's names."""
        tensors = {name: value.detach().contiguous() for name, value in self._parameters.items()}
        tensors |= {name: value.contiguous() for name, value in self._frozen.items()}
        tensors |= {name: value.contiguous() for name, value in self._prepared.weights.buffers.items()}
        data: bytes = safetensors.torch.save(tensors)
        return data


def _optimizer(wanted: Optimizer, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    match wanted.name:
        case "sgd":
            return torch.optim.SGD(parameters, lr=wanted.lr, momentum=wanted.momentum, weight_decay=wanted.weight_decay)
        case "adam":
            return torch.optim.Adam(parameters, lr=wanted.lr, betas=wanted.betas, weight_decay=wanted.weight_decay)
        case "adamw":
            return torch.optim.AdamW(parameters, lr=wanted.lr, betas=wanted.betas, weight_decay=wanted.weight_decay)


@contextmanager
def numerics() -> Iterator[None]:
    """A fresh seed for dropout, and no subnormals, which are slow; both are put back as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(os.urandom(8), "big"))
        torch.set_flush_denormal(True)
        try:
            yield
        finally:
            torch.set_flush_denormal(False)
