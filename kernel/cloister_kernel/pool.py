"""Warm kernels: started, confined and ready before anybody asks, each given to one user once, and never back."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable

from cloister_data.errors import CloisterError
from cloister_kernel.spawner import Prepared, Spawner

PAUSE_SECONDS = 1.0
"""After one was taken: its user's first cell comes first."""
RETRY_SECONDS = 30.0


class Pool:
    """Keeps `size` kernels warm. With size 0 every kernel is made when it is asked for."""

    def __init__(self, spawner: Spawner, size: int, log: Callable[..., None]) -> None:
        self._spawner, self._size, self._log = spawner, size, log
        self._ready: deque[Prepared] = deque()
        self._taken = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    @property
    def warm(self) -> int:
        """How many are ready."""
        return len(self._ready)

    def open(self) -> None:
        if self._size:
            self._keeper = asyncio.create_task(self._keep_full())

    async def take(self) -> Prepared:
        """A warm kernel, or a cold one where none is ready. Nobody else ever gets it. Raises CloisterError."""
        while self._ready:
            self._taken.set()
            prepared = self._ready.popleft()
            if self._spawner.ready(prepared):
                return prepared
            await self._spawner.discard(prepared)
        return await self._spawner.prepare()

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        while self._ready:
            with contextlib.suppress(CloisterError):
                await self._spawner.discard(self._ready.popleft())

    async def _keep_full(self) -> None:
        while True:
            self._taken.clear()
            pause = PAUSE_SECONDS
            while len(self._ready) < self._size:
                try:
                    self._ready.append(await self._spawner.prepare(warm=True))
                except CloisterError as error:
                    self._log("no warm kernel", error=error.code)
                    pause = RETRY_SECONDS
                    break
            else:
                await self._taken.wait()
            await asyncio.sleep(pause)
