"""The guard's time, which never goes back: a host that turns its clock back revives no expired policy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloister_budget.tables import Leaf


class SteadyClock:
    """Unix seconds, at least as late as any that it told before. Usable from several threads."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._latest = 0.0
        self._lock = threading.Lock()

    def __call__(self) -> float:
        with self._lock:
            self._latest = max(self._latest, self._clock())
            return self._latest

    def not_before(self, seconds: float) -> None:
        """From now on, tell no earlier time than this."""
        with self._lock:
            self._latest = max(self._latest, seconds)


def last_written(s: Session) -> int:
    """When the audit log got its last leaf, in Unix seconds, coarse; 0 where it is empty. For a guard that starts."""
    return s.scalar(select(Leaf.at).order_by(Leaf.index.desc()).limit(1)) or 0


steady_time = SteadyClock()
"""The time of this process."""
