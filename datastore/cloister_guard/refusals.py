"""A refusal costs no budget, so it is rationed: at most so many a minute for each user, counted in memory."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

from cloister_data.base import Wire
from cloister_data.errors import BudgetRefusedError, CloisterError, PolicyRefusedError, TooManyRequestsError
from cloister_guard.identity import Caller

WINDOW_SECONDS = 60.0
REMEMBERED_USERS = 10_000

T = TypeVar("T")


class Refusals:
    """Counts each user's refusals of the last minute, in one event loop. `clock` gives seconds that only grow.

    `note` writes a refusal down before it is answered.
    """

    def __init__(
        self,
        limit: int,
        note: Callable[[Caller, Wire, CloisterError], Awaitable[None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = limit
        self._note = note
        self._clock = clock
        self._seen: OrderedDict[str, deque[float]] = OrderedDict()

    async def counted(self, caller: Caller, request: Wire, work: Callable[[], Awaitable[T]]) -> T:
        """Do the work for a request, and count it where policy or budget refuse it.

        Raises TooManyRequestsError, before anything is looked at, where the user's refusals of the last minute have
        reached the limit.
        """
        self._admit(caller.user)
        try:
            return await work()
        except (PolicyRefusedError, BudgetRefusedError) as error:
            recent = self._seen.setdefault(caller.user, deque(maxlen=self._limit))
            recent.append(self._clock())
            self._seen.move_to_end(caller.user)
            while len(self._seen) > REMEMBERED_USERS:
                self._seen.popitem(last=False)
            await self._note(caller, request, error)
            raise

    def _admit(self, user: str) -> None:
        recent = self._seen.get(user)
        if recent is None or len(recent) < self._limit or self._clock() - recent[0] >= WINDOW_SECONDS:
            return
        raise TooManyRequestsError(
            "Too many of your requests were refused.",
            why=f"At most {self._limit} refusals are answered in {WINDOW_SECONDS:.0f} seconds.",
            next_step="Wait a minute; q.cost() and ds.budget say what would fit. Nothing was charged.",
        )
