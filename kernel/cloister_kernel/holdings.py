"""How much of the kernels' output the service holds for laptops that are away or slow.

Each kernel may hold as much as is free for all, up to its own limit. So one kernel alone has plenty, many that print
without end share, and a part of the memory always stays free for the next one.
"""

from __future__ import annotations

KERNEL_BYTES = 320 << 20
"""What one kernel may hold: an output of the largest size, or 100 MB of small ones, and more."""
SERVICE_BYTES = 1 << 30
"""What all kernels may hold together."""
RESERVED_BYTES = 4 << 20
"""What a kernel may hold in any case, on top: replies, and small outputs."""


class Holdings:
    """The account of one service's memory."""

    def __init__(self, limit: int = SERVICE_BYTES, each: int = KERNEL_BYTES) -> None:
        self.limit, self.each = limit, each
        self.held = 0

    def holding(self) -> Holding:
        """A new kernel's part."""
        return Holding(self)


class Holding:
    """One kernel's part of the account."""

    def __init__(self, everyone: Holdings) -> None:
        self._everyone = everyone
        self.held = 0

    def fits(self, size: int) -> bool:
        """Whether so many bytes more may be held."""
        share = max(0, min(self._everyone.each, self._everyone.limit - self._everyone.held))
        return self.held + size <= max(share, RESERVED_BYTES)

    @property
    def over(self) -> bool:
        """Also what may not be left out has to wait: nothing more is read from the kernel."""
        return not self.fits(-RESERVED_BYTES)

    def take(self, size: int) -> bool:
        """Hold `size` bytes more, where they fit."""
        if not self.fits(size):
            return False
        self.hold(size)
        return True

    def hold(self, size: int) -> None:
        self.held += size
        self._everyone.held += size

    def give(self, size: int) -> None:
        self.hold(-size)
