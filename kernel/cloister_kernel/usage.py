"""How much memory kernels hold, and whether one was killed for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from cloister_kernel.spawner import Started
from cloister_kernel.uids import uids_of


class Memory(Protocol):
    """Where kernels' memory is accounted. Both methods may block for some milliseconds, and never raise."""

    def used(self, kernels: Sequence[Started]) -> int:
        """Bytes that these kernels hold together."""

    def exceeded(self, kernel: Started) -> int | None:
        """The limit in MiB for which a kernel that has just ended was killed; 0 where it isn't known, None for none."""


class ProcessMemory:
    """By what /proc says of the kernels' processes: for kernels without a limit of their own."""

    def used(self, kernels: Sequence[Started]) -> int:
        """The sum of their resident sets; pages that several share count for each."""
        if not kernels:
            return 0
        uids = {kernel.uid for kernel in kernels if kernel.sandbox != "none"}
        sessions = {kernel.process.pid for kernel in kernels if kernel.sandbox == "none"}
        pages = 0
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            try:
                if uids_of(int(entry)) & uids or (sessions and os.getsid(int(entry)) in sessions):
                    pages += int(Path(f"/proc/{entry}/statm").read_bytes().split()[1])
            except (OSError, IndexError):
                continue  # it has ended
        return pages * os.sysconf("SC_PAGE_SIZE")

    def exceeded(self, kernel: Started) -> int | None:
        return None
