"""What owners' witnesses lend this guard: data keys for a while, and signatures under checkpoints. In memory alone.

A key is forgotten when its lease ends. Usable from several threads; waiting happens in the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from cloister_data.errors import UnavailableError


@dataclass(frozen=True)
class Lease:
    """`cosigned` entries are covered by the checkpoint that `line` is the witness's signature under (0 and "" if none).

    `key` (32 bytes) opens the owner's data until `until` on the clock; None where they are locked.
    """

    witness: bytes
    cosigned: int = 0
    line: str = ""
    key: bytes | None = None
    until: float = 0.0


class Leases:
    """By owner. `clock` gives seconds that only grow."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._held: dict[str, Lease] = {}
        self._lock = threading.Lock()
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    def of(self, owner: str) -> Lease | None:
        """The lease as it stands now: without a key where it has run out."""
        with self._lock:
            return self._now(owner)

    def key(self, owner: str) -> bytes:
        """The key (32 bytes) that the owner lends. Raises UnavailableError while nobody lends it."""
        lease = self.of(owner)
        if lease is None or lease.key is None:
            raise UnavailableError(
                f"The data of {owner} are locked.",
                why="Their owner's witness is silent, so the cloister has no key to them.",
                next_step="Nothing was charged. Try again when the owner serves it: cloister owner serve.",
            )
        return lease.key

    def renew(self, owner: str, witness: bytes, cosigned: int, line: str, key: bytes | None) -> bool:
        """Note what a witness brought; answers whether that unlocked the data.

        Another witness than before begins anew. A signature under an earlier checkpoint than one that is known changes
        nothing.
        """
        with self._lock:
            known = self._now(owner)
            if known is None or known.witness != witness:
                known = Lease(witness)
            fresh = known if cosigned < known.cosigned else replace(known, cosigned=cosigned, line=line)
            if key is not None:
                fresh = replace(fresh, key=key, until=self._clock() + self.seconds)
            self._held[owner] = fresh
            waiting = list(self._waiting)
        # A loop that has ended waits for nothing.
        for loop, event in waiting:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(event.set)
        return key is not None and known.key is None

    def drop(self, owner: str) -> None:
        """Forget the owner's key and the witness's signatures: the owner has named another witness."""
        with self._lock:
            self._held.pop(owner, None)

    def expire(self) -> list[str]:
        """Forget the keys of leases that have run out; answers whose."""
        with self._lock:
            ended = [owner for owner, lease in self._held.items() if lease.key is not None and self._over(lease)]
            for owner in ended:
                self._held[owner] = replace(self._held[owner], key=None)
            return ended

    async def cosigned(self, owners: Collection[str], size: int, seconds: float) -> bool:
        """Wait, at most so long, until the witnesses of all of these have signed for at least `size` entries."""
        event = asyncio.Event()
        entry = (asyncio.get_running_loop(), event)
        with self._lock:
            self._waiting.add(entry)
        try:
            async with asyncio.timeout(seconds):
                while not self.has_cosigned(owners, size):
                    await event.wait()
                    event.clear()
            return True
        except TimeoutError:
            return False
        finally:
            with self._lock:
                self._waiting.discard(entry)

    def has_cosigned(self, owners: Collection[str], size: int) -> bool:
        """Whether the witnesses of all of these have signed for at least `size` entries."""
        with self._lock:
            return all((lease := self._held.get(owner)) is not None and lease.cosigned >= size for owner in owners)

    def _now(self, owner: str) -> Lease | None:
        lease = self._held.get(owner)
        return replace(lease, key=None) if lease is not None and self._over(lease) else lease

    def _over(self, lease: Lease) -> bool:
        return self._clock() >= lease.until
