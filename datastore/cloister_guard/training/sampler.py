"""Poisson sampling: each unit is in a batch by its own coin. Empty batches stay, large ones are never cut."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from opacus.utils.uniform_sampler import UniformWithReplacementSampler

from cloister_guard.training.randomness import KeyedStream

_UNIFORM_BITS = 53


class PoissonSampler(UniformWithReplacementSampler):  # type: ignore[misc]  # Opacus has no types
    """Opacus's sampler with our own randomness: `steps` batches of indices into `num_samples` units.

    A unit is taken when a 53-bit uniform is below floor(sample_rate * 2**53), so that the true rate is never above
    the accounted one. Each batch is sampled when the iterator is asked for it, not before.
    """

    def __init__(self, *, num_samples: int, sample_rate: float, steps: int) -> None:
        if not 0 < sample_rate <= 1:
            raise ValueError("sample_rate must be in (0, 1]")
        super().__init__(num_samples=num_samples, sample_rate=sample_rate, steps=steps)
        self._stream = KeyedStream()
        self._threshold = np.uint64(math.floor(sample_rate * 2**_UNIFORM_BITS))

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            uniforms = self._stream.words(self.num_samples) >> np.uint64(64 - _UNIFORM_BITS)
            yield np.flatnonzero(uniforms < self._threshold).tolist()
