"""The limits of kernels, and kernels whose laptops are gone."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cloister_data.errors import TooManyRequestsError
from cloister_data.kernels import EndingKind, KernelLaunch, KernelStart, KernelView
from cloister_kernel.control import ControlClient
from cloister_kernel.kernels import KernelService, Rules
from cloister_kernel.limits import ABANDONED_SECONDS, Limits


class Held:
    """A kernel of which only what the limits ask is there. `away`: for how long its laptop has been gone."""

    def __init__(self, user: str, away: float = 0.0) -> None:
        self.user, self.away = user, away
        self.exit_code: int | None = None
        self.cause: EndingKind | None = None


class Service(KernelService):
    """A service whose kernels need a moment to start and are nothing else."""

    def __init__(self, limits: Limits, *held: Held) -> None:
        super().__init__(SimpleNamespace(), ControlClient(Path("/nowhere")), Rules(limits=limits))  # type: ignore[arg-type]
        self._kernels = {str(number): kernel for number, kernel in enumerate(held)}  # type: ignore[misc]

    async def _start(self, order: KernelStart) -> KernelView:
        await asyncio.sleep(0.01)
        made: Any = Held(order.user)
        self._kernels[f"made-{len(self._kernels)}"] = made
        return KernelView(kernel="0" * 32, state="running", started=int(time.time()), sandbox="user")

    async def end(self, kernel: Any, cause: EndingKind) -> None:
        await asyncio.sleep(0.01)
        kernel.exit_code = -9

    def alive(self, user: str) -> int:
        return sum(kernel.user == user and kernel.exit_code is None for kernel in self._kernels.values())


def start(user: str) -> KernelStart:
    return KernelStart(user=user, launch=KernelLaunch())


def test_a_hundred_starts_at_once_get_no_place_more_than_there_is() -> None:
    async def scenario() -> None:
        service = Service(Limits(per_user=3, total=5))
        asked = [service.start(start(user)) for _ in range(25) for user in ("ann", "ben", "cyd", "dan")]
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert sum(isinstance(result, KernelView) for result in results) == 5
        assert all(isinstance(result, (KernelView, TooManyRequestsError)) for result in results)
        assert max(service.alive(user) for user in ("ann", "ben", "cyd", "dan")) <= 3
        assert not service._starting

    asyncio.run(scenario())


def test_the_error_says_which_limit_and_what_to_do() -> None:
    with pytest.raises(TooManyRequestsError, match=r"The limit for one user is 2\..*makes room after ten minutes"):
        asyncio.run(Service(Limits(2, 9), Held("ann"), Held("ann")).start(start("ann")))
    with pytest.raises(TooManyRequestsError, match=r"The limit for all users together is 2\..*Try again later"):
        asyncio.run(Service(Limits(2, 2), Held("ben"), Held("cyd")).start(start("ann")))


@pytest.mark.parametrize("limits", [Limits(3, 9), Limits(9, 4)])
def test_a_kernel_that_was_left_long_ago_makes_room(limits: Limits) -> None:
    left, longest = Held("ann", ABANDONED_SECONDS), Held("ann", ABANDONED_SECONDS + 60)
    others = Held("ben", ABANDONED_SECONDS + 999)
    service = Service(limits, Held("ann"), left, longest, others)
    asyncio.run(service.start(start("ann")))
    assert [kernel.exit_code for kernel in (longest, left, others)] == [-9, None, None]
    assert longest.cause == "room"


def test_one_that_makes_room_makes_it_once() -> None:
    async def scenario() -> None:
        service = Service(Limits(1, 9), Held("ann", ABANDONED_SECONDS))
        results = await asyncio.gather(*(service.start(start("ann")) for _ in range(5)), return_exceptions=True)
        assert sum(isinstance(result, KernelView) for result in results) == 1
        assert service.alive("ann") == 1

    asyncio.run(scenario())


def test_a_kernel_that_is_used_or_was_lately_makes_no_room() -> None:
    service = Service(Limits(2, 9), Held("ann"), Held("ann", ABANDONED_SECONDS - 1))
    with pytest.raises(TooManyRequestsError):
        asyncio.run(service.start(start("ann")))
    assert service.alive("ann") == 2
