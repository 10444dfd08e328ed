"""The guard's losses and scores of ONE sample. The guard owns the loss; a model can't bring its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)

from cloister_data.errors import InternalError, UnsupportedModelError
from cloister_data.training import Loss
from cloister_guard.encoding import Aim


def check_output(shape: tuple[int, ...], aim: Aim, classes: int, named: str) -> int:
    """The number of outputs. Raises UnsupportedModelError where an output of `shape` doesn't fit the loss."""
    wanted = (classes,) if aim == "classes" else (1,)
    if shape == wanted or (wanted == (1,) and shape == ()):
        return wanted[0]
    what = f"{classes} numbers a sample, one for each class" if aim == "classes" else "one number a sample"
    raise UnsupportedModelError(
        f"The model's output doesn't fit {named}.",
        why=f"It must be {what}, and the model gives the shape {list(shape)} (without the batch dimension).",
        next_step=f"End the model with a Linear layer of {wanted[0]} output{'s' if wanted[0] > 1 else ''}.",
    )


def sample_loss(loss: Loss, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The loss of one sample, a scalar. Classes and binary take logits; huber has delta 1."""
    if loss == "cross_entropy":
        return -torch.gather(torch.log_softmax(output, 0), 0, target.reshape(1)).reshape(())
    value = output.reshape(())
    match loss:
        case "binary_cross_entropy":
            return F.softplus(value) - target * value
        case "mse":
            return torch.square(value - target)
        case "l1":
            return torch.abs(value - target)
        case "huber":
            return F.huber_loss(value, target)
    raise InternalError("A loss without a function.")
