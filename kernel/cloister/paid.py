"""Requests that cost: sent again with the same id after a network fault, so that they are never charged twice."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import TypeVar

from cloister_data.errors import ConflictError, UnreachableError

T = TypeVar("T")

PAUSES = (0.5, 2.0, 6.0, 12.0)
"""Seconds before each further attempt: long enough for a cloister that is started again."""


def request_id() -> str:
    """16 fresh random bytes in hex."""
    return secrets.token_hex(16)


def send_paid(send: Callable[[], T]) -> T:
    """Run `send`, which carries one fixed request id; try again where the cloister couldn't be reached."""
    for pause in (*PAUSES, None):
        try:
            return send()
        except UnreachableError as error:
            if pause is None:
                raise _unknown(error.why) from error
            fault = error
        except ConflictError as error:
            if pause == PAUSES[0]:
                raise
            # The first attempt did arrive, and has not ended yet.
            raise _unknown(error.why) from error
        time.sleep(pause)
    raise fault


def _unknown(why: str) -> UnreachableError:
    return UnreachableError(
        "The connection broke while the cloister was answering.",
        why=why,
        next_step="Look at cloister.history() and cloister.jobs() before you ask again: what was paid is there, free.",
    )
