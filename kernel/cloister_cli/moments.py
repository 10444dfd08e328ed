"""Moments as people write them on a command line."""

from __future__ import annotations

import re
from datetime import UTC, datetime

FORMS = "2026-03-01, 2026-03-01T12:30, 2026-03-01T12:30+01:00, or 2h, 7d before now"

_DURATION = re.compile(r"([0-9]{1,6})([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def moment(text: str, now: float) -> int:
    """Unix seconds of an ISO 8601 date or date-time (UTC unless it states an offset), or of a duration before `now`.

    Raises ValueError.
    """
    duration = _DURATION.fullmatch(text)
    if duration is not None:
        return int(now) - int(duration[1]) * _SECONDS[duration[2]]
    try:
        then = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"{text[:60]!r} isn't a time. Write {FORMS}.") from error
    return int((then if then.tzinfo else then.replace(tzinfo=UTC)).timestamp() // 1)
