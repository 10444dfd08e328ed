"""What the SDK remembers of a user's torch modules, and how it copies them. Loads no torch."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_features: weakref.WeakKeyDictionary[Any, tuple[str, ...]] = weakref.WeakKeyDictionary()


def remember_features(model: nn.Module, features: Sequence[str]) -> None:
    """So that `evaluate` knows them. Forgotten with the model."""
    with contextlib.suppress(TypeError):
        _features[model] = tuple(features)


def known_features(model: object) -> tuple[str, ...] | None:
    try:
        return _features.get(model)
    except TypeError:
        return None


def copy_of(model: nn.Module) -> nn.Module:
    """A copy, or the module itself where it can't be copied."""
    try:
        return copy.deepcopy(model)
    except Exception:  # a user's module may forbid copies in any way it likes
        return model
