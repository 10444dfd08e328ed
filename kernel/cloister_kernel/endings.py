"""Why a kernel ended, in words from a closed set: what EXIT carries, and what the notebook shows."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from cloister_data.kernels import EndingKind

MAX_TEXT = 300
"""Characters of a reason that a notebook shows."""
SHELL_SIGNALS = 128
"""A process that waits for another one, as a shell or bubblewrap does, reports its signal N as status 128 + N."""


@dataclass(frozen=True)
class Ending:
    kind: EndingKind
    text: str


@dataclass(frozen=True)
class Periods:
    """After how many seconds a kernel is ended: idle, without a laptop, and without one where room is needed."""

    idle: float
    lease: float
    room: float


def ending(code: int, cause: EndingKind | None, periods: Periods, memory_mib: int | None = None) -> Ending:
    """The ending of a kernel whose process returned `code`: negative for a signal, as in `subprocess`.

    Args:
        cause: why the service ended it; None where it ended by itself.
        memory_mib: the limit that it was killed for; None where it wasn't. 0: its limit isn't known.
    """
    if cause is not None:
        return Ending(cause, _said(cause, periods))
    number = _signal(code)
    if number == signal.SIGKILL and memory_mib is not None:
        more = f"more than its {memory_mib} MiB of memory" if memory_mib else "more memory than it may have"
        return Ending("memory", f"It was killed because it needed {more}.")
    if number is not None:
        name = (signal.strsignal(number) or "unknown").lower()
        return Ending("signal", f"It ended by signal {number} ({name}).")
    return Ending("exited", f"It ended by itself with status {code}.")


def _said(cause: EndingKind, periods: Periods) -> str:
    match cause:
        case "asked":
            return "It was ended as you asked."
        case "idle":
            return f"It was shut down because it had been idle for {in_words(periods.idle)}."
        case "lease":
            return f"It was ended because no laptop had been attached to it for {in_words(periods.lease)}."
        case "room":
            away = in_words(periods.room)
            return f"It made room for another kernel of yours: no laptop had been attached to it for {away}."
        case "guard":
            return "It was ended because the restarted cloister refused to take it over."
        case _:
            return "It was ended because the cloister's kernel service stopped."


def _signal(code: int) -> int | None:
    number = -code if code < 0 else code - SHELL_SIGNALS
    return number if 0 < number < signal.NSIG else None


def in_words(seconds: float) -> str:
    """A duration for people: "24 hours", "23 hours 50 minutes", "1 minute 30 seconds"."""
    left, words = round(seconds), []
    for size, unit in ((3600, "hour"), (60, "minute"), (1, "second")):
        count, left = divmod(left, size)
        if count:
            words.append(f"{count} {unit}{'s' if count != 1 else ''}")
    return " ".join(words[:2]) or "no time"


def exit_parts(code: int, text: str) -> tuple[bytes, bytes]:
    """The parts of an EXIT frame."""
    return str(code).encode(), text.encode()


def read_exit(parts: tuple[bytes, ...]) -> tuple[int, str]:
    """(exit code, reason) of an EXIT frame; the reason is "" where there is none. Raises ValueError.

    The reason is one line of at most `MAX_TEXT` printable characters, whatever the frame holds.
    """
    if not 1 <= len(parts) <= 2:
        raise ValueError("an EXIT frame has one part or two")
    text = parts[1][: 4 * MAX_TEXT].decode("utf-8", "replace") if len(parts) == 2 else ""
    return int(parts[0]), "".join(letter for letter in text if letter.isprintable())[:MAX_TEXT]
