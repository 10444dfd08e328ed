"""When an idle kernel is warned, and when it is ended (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cloister_kernel.endings import in_words

WARN_SECONDS = 600.0


@dataclass(frozen=True)
class IdleRule:
    """`after`: seconds without a running cell and without a message to the kernel, until it is ended."""

    after: float

    @property
    def notice(self) -> float:
        """Seconds between the warning and the end: ten minutes, and at most half of the idle time."""
        return min(WARN_SECONDS, self.after / 2)

    def step(self, idle: float, warned: float | None) -> Literal["keep", "warn", "end"]:
        """What to do with a kernel that has been idle for `idle` seconds, and was warned `warned` seconds ago."""
        if idle < self.after - self.notice:
            return "keep"
        if warned is None or warned > idle:  # that warning was for an earlier rest
            return "warn"
        return "end" if warned >= self.notice and idle >= self.after else "keep"

    def warning(self) -> str:
        return (
            f"Cloister: this kernel has been idle for {in_words(self.after - self.notice)}. In "
            f"{in_words(self.notice)} it is shut down, and its variables are lost. Run any cell to keep it."
        )
