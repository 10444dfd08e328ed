"""Whether this computer has slept: its connections may then be dead, and their timers don't know it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

LOOK_SECONDS = 1.0
SLEPT_SECONDS = 10.0
"""A busy computer is late by less. A clock that is set looks like sleep, too: that costs one new connection."""


async def woken(clock: Callable[[], float] = time.time, look: float = LOOK_SECONDS) -> None:
    """Returns as soon as the computer is awake again after it slept. `clock` has to go on during sleep."""
    while True:
        before = clock()
        await asyncio.sleep(look)
        if clock() - before > look + SLEPT_SECONDS:
            return
