"""Per-sample gradients that no sample can disturb, and their clipped sum, exact.

A microbatch always has the same shape: `slots` samples, of which the empty ones are zeros and masked. vmap isolates
samples mathematically, and the fixed shape isolates them bit by bit: with a shape that followed the batch, the last
bits of other rows would move, and a hostile graph amplifies them. Neighbours differ in one slot alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.func import grad, vmap

from cloister_data.training import Loss
from cloister_guard.training.interpreter import Program
from cloister_guard.training.losses import sample_loss

_MARGIN = 1.0 - 2.0**-24
"""Clipping aims this much below C, which covers every rounding error of norms and factors."""

_CHUNK = 1 << 16


class IsolatedGradients:
    """The gradient of the loss of each of `slots` samples, by vmap over the graph of one sample."""

    def __init__(
        self, program: Program, loss: Loss, buffers: Mapping[str, torch.Tensor], frozen: Mapping[str, torch.Tensor]
    ) -> None:
        def loss_of_one(
            parameters: dict[str, torch.Tensor], sample: torch.Tensor, target: torch.Tensor
        ) -> torch.Tensor:
            return sample_loss(loss, program({**frozen, **parameters}, buffers, sample), target)

        # Dropout draws for each slot by itself, whatever the samples are.
        self._of_all = vmap(grad(loss_of_one), in_dims=(None, 0, 0), randomness="different")

    def __call__(
        self, parameters: dict[str, torch.Tensor], samples: torch.Tensor, targets: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """{name: [slots, *shape]} for samples [slots, F] and targets [slots]; nothing is masked or clipped yet."""
        gradients: dict[str, torch.Tensor] = self._of_all(parameters, samples, targets)
        return gradients


def clipped_sum(
    gradients: Sequence[torch.Tensor], present: torch.Tensor, max_grad_norm: float, spacing: float
) -> list[torch.Tensor]:
    """Clip each sample to `max_grad_norm` and add up: int64 tensors in units of `spacing`, one for each of `gradients`.

    gradients: [slots, *shape] each; present: bool [slots]. A sample that is absent, or whose norm isn't finite, adds
    exactly zero. Each clipped value is cut towards zero to a multiple of `spacing`, so no sample's norm exceeds
    max_grad_norm, and the float64 sums of such multiples are exact: replacing one sample by a null moves the result by
    at most max_grad_norm, with no rounding term.
    """
    slots = len(present)
    flats = [value.reshape(slots, -1) for value in gradients]
    # In float64 the squares of float32 values neither overflow nor vanish: a norm is finite iff all its values are.
    squares = torch.zeros(slots, dtype=torch.float64)
    for flat in flats:
        for _, piece in _pieces(flat):
            squares += torch.linalg.vector_norm(piece, dim=1).square_()
    norm = squares.sqrt_()
    counted = present & torch.isfinite(norm)
    limit = max_grad_norm * _MARGIN
    factor = torch.where(counted, limit / torch.clamp(norm, min=limit), torch.zeros_like(norm)) / spacing
    sums = []
    for flat, value in zip(flats, gradients, strict=True):
        total = torch.empty(flat.shape[1], dtype=torch.float64)
        for columns, piece in _pieces(flat):
            # A slot that doesn't count has the factor 0, and 0 * NaN is NaN until it is replaced; others are finite.
            piece.mul_(factor[:, None]).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).trunc_()
            torch.sum(piece, dim=0, out=total[columns])
        sums.append(total.to(torch.int64).reshape(value.shape[1:]))
    return sums


def _pieces(flat: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Columns of `flat` [slots, n] with their values in float64: one buffer, small enough for the processor's cache."""
    slots, size = flat.shape
    width = max(1, min(size, _CHUNK // slots))
    buffer = torch.empty(slots * width, dtype=torch.float64)
    for start in range(0, size, width):
        columns = slice(start, min(start + width, size))
        piece = buffer[: slots * (columns.stop - start)].view(slots, -1)
        piece.copy_(flat[:, columns])
        yield columns, piece
