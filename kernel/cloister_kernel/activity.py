"""Whether a kernel is used, as its relay sees it: messages to its shell, and the cells that it says are running.

A kernel can claim to be busy for ever. It then takes its own user's place under the limit of kernels, as a cell that
never ends does, and nobody else's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from cloister_kernel.merging import MAX_HEADER_BYTES
from cloister_kernel.signing import DELIMITER

MAX_CELLS = 64
"""Requests that are remembered as running; of more the end isn't noticed as an activity of its own."""
MAX_STATUS_BYTES = 1024


class Activity:
    """Attributes:
    last_cell: the header of the last request to run a cell, to put messages below it; `{}` before the first.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.last_cell = b"{}"
        self._clock = clock
        self._at = clock()
        self._running: set[str] = set()

    @property
    def idle(self) -> float:
        """For how many seconds nothing has run and nothing was asked; 0 while something runs."""
        return 0.0 if self._running else self._clock() - self._at

    def asked(self, message: tuple[bytes, ...]) -> None:
        """A message of the laptop to the kernel's shell."""
        self._at = self._clock()
        header = _part(message, 2)
        if header is not None and _read(header).get("msg_type") == "execute_request":
            self.last_cell = header

    def told(self, message: tuple[bytes, ...]) -> None:
        """A message of the kernel to everybody (iopub); only its status counts."""
        header = _part(message, 2)
        # Most messages are output: only a few are worth parsing.
        if header is None or b"status" not in header or _read(header).get("msg_type") != "status":
            return
        request = _read(_part(message, 3)).get("msg_id")
        state = _read(_part(message, 5, MAX_STATUS_BYTES)).get("execution_state")
        if not isinstance(request, str):
            return
        if state == "busy" and len(self._running) < MAX_CELLS:
            self._running.add(request)
        elif state == "idle":
            self._running.discard(request)
            self._at = self._clock()


def _part(message: tuple[bytes, ...], place: int, limit: int = MAX_HEADER_BYTES) -> bytes | None:
    """The header (place 2 after the delimiter), the parent's (3) or the content (5); None where it is too long."""
    try:
        part = message[message.index(DELIMITER) + place]
    except (ValueError, IndexError):
        return None
    return part if len(part) <= limit else None


def _read(part: bytes | None) -> dict[str, object]:
    try:
        found = json.loads(part or b"")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
