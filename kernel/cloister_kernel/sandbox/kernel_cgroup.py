"""The cgroup of one notebook kernel: entered, read, killed, removed. `cloister_kernel.sandbox.cgroups` makes it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cloister_kernel.sandbox.layers import LayerError

ROUNDS = 500
PAUSE_SECONDS = 0.01
BATCH = 64


@dataclass(frozen=True)
class KernelCgroup:
    """The cgroup of one kernel: one directory on v2, one for each controller on v1."""

    unified: bool
    directories: Mapping[str, Path]

    @property
    def procs(self) -> tuple[Path, ...]:
        """The files into each of which a process writes "0" to enter, as long as it has the service's rights."""
        return tuple(directory / "cgroup.procs" for directory in unique(self.directories))

    def enter(self, pid: int) -> None:
        """Put a process in. What it forked before stays out. Raises OSError."""
        for path in self.procs:
            write(path, str(pid))

    def memory(self) -> int:
        """Bytes in use now. Raises OSError after `remove`, as the counters do."""
        file = "memory.current" if self.unified else "memory.usage_in_bytes"
        return int((self.directories["memory"] / file).read_text())

    def oom_kills(self) -> int:
        """How many processes Linux killed because memory ran out.

        On v2 one such kill ends the whole kernel. On v1 it ends one process: where that is the notebook's own, the
        sandbox ends with it; where it is one that the notebook started, the notebook learns of it and goes on.
        """
        file = "memory.events" if self.unified else "memory.oom_control"
        return counter(self.directories["memory"] / file, "oom_kill")

    def throttled(self) -> int:
        """In how many periods the kernel used up its CPU quota and had to wait."""
        return counter(self.directories["cpu"] / "cpu.stat", "nr_throttled")

    def pids(self) -> list[int]:
        """The processes inside; on v1, those in any of the hierarchies. None after `remove`."""
        found: set[int] = set()
        for path in self.procs:
            found.update(listed(path))
        return sorted(found)

    async def kill(self) -> None:
        """End every process inside, daemons too, and wait until none is left. Raises LayerError where one survives."""
        # Nothing can fork any more, so a list of processes only gets shorter.
        with contextlib.suppress(OSError):
            write(self.directories["pids"] / "pids.max", "0")
        for _ in range(ROUNDS):
            if not self.pids():
                return
            self._kill_once()
            await asyncio.sleep(PAUSE_SECONDS)
        raise LayerError("cgroup", "Processes of an ended kernel go on.", "Restart the machine.")

    async def remove(self) -> None:
        """Remove the cgroup of a kernel whose processes are gone. Raises LayerError where it can't be."""
        for directory in unique(self.directories):
            for _ in range(ROUNDS):
                if removed(directory):
                    break
                await asyncio.sleep(PAUSE_SECONDS)
            else:
                raise LayerError("cgroup", f"{directory} can't be removed: it is in use.", "End the processes in it.")

    def _kill_once(self) -> None:
        if self.unified:
            try:
                write(self.directories["pids"] / "cgroup.kill", "1")
                return
            except FileNotFoundError:  # before Linux 5.14
                pass
        pids = self.pids()
        for first in range(0, len(pids), BATCH):
            self._kill_listed(pids[first : first + BATCH])

    def _kill_listed(self, pids: list[int]) -> None:
        """SIGKILL to processes. Each is held before it is looked for again: its number may have gone to another."""
        held: dict[int, int] = {}
        try:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    held[pid] = os.pidfd_open(pid)
            for pid in held.keys() & set(self.pids()):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(held[pid], signal.SIGKILL)
        finally:
            for descriptor in held.values():
                os.close(descriptor)


def write(path: Path, value: str) -> None:
    """Write a file of cgroupfs, never make one. Raises OSError with the file's name: write(2) alone tells none."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, value.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error


def listed(path: Path) -> list[int]:
    """The pids in a cgroup.procs file; none where the cgroup is gone. Raises OSError.

    Linux lists a process that this pid namespace doesn't show as 0. It is left out: its cgroup can't be removed, then.
    """
    try:
        return [pid for line in path.read_text().split() if (pid := int(line)) > 0]
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):
            return []
        raise


def counter(path: Path, key: str) -> int:
    for line in path.read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    raise LayerError("cgroup", f"{path} doesn't count {key}.", "Use Linux 5.15 or later.")


def removed(directory: Path) -> bool:
    """Whether the directory is gone now. Raises OSError where that can't change by waiting."""
    try:
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.ENOTEMPTY):
            return False
        raise
    return True


def unique(directories: Mapping[str, Path]) -> list[Path]:
    """On v2, and where v1 controllers are mounted together, one directory stands for several."""
    return list(dict.fromkeys(directories.values()))
