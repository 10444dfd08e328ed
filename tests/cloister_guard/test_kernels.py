"""The limit of kernels, and the kernels of laptops that are gone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cloister_data.base import Wire
from cloister_data.errors import TooManyRequestsError
from cloister_data.kernels import KernelAnswer, KernelLaunch, KernelList, KernelQuery, KernelSignal, KernelView
from cloister_guard.kernels import ABANDONED_SECONDS, Kernels

ANN: Any = SimpleNamespace(user="ann")


def view(number: int, idle: int) -> KernelView:
    return KernelView(kernel=f"{number:032x}", state="running", started=0, sandbox="user", idle=idle)


class Service(Kernels):
    """Kernels over a service that remembers what it was told to end."""

    def __init__(self, *idle: int) -> None:
        super().__init__(Path("/nowhere"), per_user=len(idle))
        self.views = tuple(view(number, seconds) for number, seconds in enumerate(idle))
        self.ended: list[str] = []

    async def _order(self, order: Wire) -> KernelAnswer:
        if isinstance(order, KernelQuery):
            return KernelAnswer(kernels=KernelList(kernels=self.views))
        if isinstance(order, KernelSignal):
            self.ended.append(order.kernel)
        return KernelAnswer(kernel=view(99, 0))


def test_a_kernel_that_was_left_long_ago_makes_room() -> None:
    service = Service(0, ABANDONED_SECONDS, ABANDONED_SECONDS + 60)
    assert asyncio.run(service.start(ANN, KernelLaunch())).kernel == view(99, 0).kernel
    assert service.ended == [view(2, 0).kernel]


def test_a_kernel_that_is_used_or_was_lately_does_not() -> None:
    service = Service(0, ABANDONED_SECONDS - 1)
    with pytest.raises(TooManyRequestsError, match="makes room after ten minutes"):
        asyncio.run(service.start(ANN, KernelLaunch()))
    assert service.ended == []
