"""A proof grows old: a session asks for evidence again on a timer, and an old proof counts for nothing.

What a machine was once doesn't say what it is now. A refusal ends the session; an outage doesn't, but nothing is sent
any more once the last proof is older than `Keeper.bound`, until the machine is proven again.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable

from cloister_data.errors import AttestationRefusedError, UnreachableError

FIRST_PAUSE = 1.0
"""Seconds until evidence that didn't come is asked for again; then twice as long each time, up to the interval."""
SHORTEST_BOUND = 30.0
"""Seconds that a proof counts for at least, however short the interval: a short outage ends nothing."""

_log = logging.getLogger(__name__)


class LapsedError(UnreachableError):
    """The last proof is too old, and no newer one could be had. Not a refusal: the machine may be as it should."""


class Keeper:
    """Calls `again`, the session's re-attestation, every `interval` seconds, a little earlier by chance.

    It ends with `stop`, when `again` raises AttestationRefusedError, when its session is forgotten, and with Python.
    Any other error is an outage: it tries again sooner.
    """

    def __init__(self, again: Callable[[], object], interval: float) -> None:
        """`again` is a bound method of an object that the keeper doesn't keep alive. `interval` is in seconds."""
        self.bound = max(2 * interval, SHORTEST_BOUND)
        self._interval = interval
        self._proven = now()
        self._stopped = stopped = threading.Event()
        # A session that nobody holds any more ends its timer now, not at its next turn.
        self._again = weakref.WeakMethod(again, lambda _: stopped.set())
        self._pid = os.getpid()
        # A daemon, or a script that doesn't close its session would never end; `_stop_all` ends it in good order.
        self._thread = threading.Thread(target=self._keep, name="cloister-reattest", daemon=True)

    @property
    def left(self) -> float:
        """Seconds for which the last proof still counts; zero or less when it counts no more."""
        return self._proven + self.bound - now()

    def proven(self, asked: float) -> None:
        """The machine proved itself with a nonce that was made at `asked`, by `now`."""
        self._proven = max(self._proven, asked)

    def start(self) -> None:
        _running.add(self)
        self._thread.start()

    def stop(self, patience: float = 2.0) -> None:
        """No further evidence is asked for. Waits at most `patience` seconds for an answer that is under way."""
        if self._pid != os.getpid():
            return
        self._stopped.set()
        _running.discard(self)
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(patience)

    def _keep(self) -> None:
        pause, retry = self._next(), self._first()
        while not self._stopped.wait(pause):
            again = self._again()
            if again is None:
                return
            try:
                again()
            except AttestationRefusedError as error:
                _log.warning("%s", error)
                return
            except Exception as error:
                if self._stopped.is_set():
                    return
                _log.info("No new evidence; trying again. %s: %s", type(error).__name__, error)
                pause, retry = retry, min(retry * 2, self._interval)
            else:
                pause, retry = self._next(), self._first()
            # Not across the wait: it would keep the session alive.
            del again

    def _next(self) -> float:
        """Between 80 and 100 % of the interval, so that many laptops don't ask in step."""
        return self._interval * (0.8 + secrets.randbelow(201) / 1000)

    def _first(self) -> float:
        return min(FIRST_PAUSE, self._interval)


def now() -> float:
    """Seconds by a clock that also runs while the computer sleeps, where there is one."""
    boottime = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boottime is None else time.clock_gettime(boottime)


_running: weakref.WeakSet[Keeper] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    for keeper in list(_running):
        keeper.stop()
