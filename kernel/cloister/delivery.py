"""Entries of the audit log on their way to another system: what a sink is, and how long it is tried.

At least once: what a sink didn't confirm is sent again, so the other side may see an entry twice, with the same index.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cloister.auditlog import Record
from cloister_data.errors import ConfigurationError, UnavailableError

NEXT = "Then run the same command again: with --cursor it goes on from the first entry that wasn't delivered."


class Undelivered(Exception):
    """A sink didn't take entries.

    Attributes:
        why: a sentence for people.
        passing: whether it may go well a little later.
        after: seconds to wait by the other side's wish, else None.
        done: how many of the entries it did take, from the first on.
    """

    def __init__(self, why: str, *, passing: bool, after: float | None = None, done: int = 0) -> None:
        super().__init__(why)
        self.why, self.passing, self.after, self.done = why, passing, after, done


class Sink(Protocol):
    """Where entries go. `send` returns when the other side has taken all of them, else raises Undelivered."""

    @property
    def name(self) -> str:
        """For people."""

    def send(self, records: Sequence[Record]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Patience:
    """How often a delivery is tried, and the seconds between: each pause is twice the one before, up to `longest`."""

    tries: int = 6
    first: float = 1.0
    longest: float = 300.0


PATIENCE = Patience()


def deliver(
    sink: Sink,
    records: Sequence[Record],
    told: Callable[[str], None],
    patience: Patience = PATIENCE,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Send all, in order. `told` hears of each new try.

    Raises ConfigurationError for what no new try mends, UnavailableError when all were in vain.
    """
    left, failures = records, 0
    while left:
        try:
            sink.send(left)
        except Undelivered as error:
            # Whoever takes some of them is there: the tries count from the last that was taken.
            failures = 1 if error.done else failures + 1
            left = left[error.done :]
            if not error.passing:
                raise ConfigurationError(
                    f"{sink.name} doesn't take the entries from {left[0].index} on.",
                    why=error.why,
                    next_step=f"Mend it: the address, the certificate, or what the receiver accepts. {NEXT}",
                ) from error
            if failures >= patience.tries:
                raise UnavailableError(
                    f"{sink.name} didn't take the entries from {left[0].index} on, after {failures} tries.",
                    why=error.why,
                    next_step=f"Check that the receiver runs, and the network. {NEXT}",
                ) from error
            pause = min(patience.longest, max(patience.first * 2.0 ** (failures - 1), error.after or 0))
            told(f"{sink.name}: {error.why} Trying again in {pause:.0f} s.")
            wait(pause)
        else:
            return
