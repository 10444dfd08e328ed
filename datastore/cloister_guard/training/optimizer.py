"""Opacus's DPOptimizer with the exact clipped sum and the lattice noise in place of its own.

Its contract stays: per-sample gradients are set as `grad_sample`, microbatches are accumulated under
`signal_skip_step`, `step()` clips, adds noise, divides by the EXPECTED batch size and calls the step hook, on which
Opacus's accountants hang.
"""

from __future__ import annotations

import torch
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed

from cloister_guard.training.isolate import clipped_sum
from cloister_guard.training.noise import LatticeGaussian, fine_spacing


class LatticeOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus has no types
    """`summed_grad` is int64, in units of `fine_spacing(max_grad_norm)`, exact over all microbatches of a step."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: int,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            loss_reduction="mean",
        )
        self._noise = LatticeGaussian(noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm)
        self._present: torch.Tensor | None = None

    def set_gradients(self, gradients: list[torch.Tensor], present: torch.Tensor) -> None:
        """One microbatch's per-sample gradients in the order of `params`, and which slots hold a unit."""
        for parameter, gradient in zip(self.params, gradients, strict=True):
            parameter.grad_sample = gradient
        self._present = present

    def clip_and_accumulate(self) -> None:
        if self._present is None:
            raise ValueError("set_gradients comes before step")
        for parameter in self.params:
            _check_processed_flag(parameter.grad_sample)
        spacing = fine_spacing(self.max_grad_norm)
        sums = clipped_sum(self.grad_samples, self._present, self.max_grad_norm, spacing)
        for parameter, total in zip(self.params, sums, strict=True):
            parameter.summed_grad = total if parameter.summed_grad is None else parameter.summed_grad + total
            _mark_as_processed(parameter.grad_sample)
        self._present = None

    def add_noise(self) -> None:
        for parameter in self.params:
            _check_processed_flag(parameter.summed_grad)
            noised = torch.from_numpy(self._noise.release(parameter.summed_grad.numpy()))
            parameter.grad = (noised.to(torch.float64) * self._noise.spacing).to(parameter.dtype).view_as(parameter)
            _mark_as_processed(parameter.summed_grad)
