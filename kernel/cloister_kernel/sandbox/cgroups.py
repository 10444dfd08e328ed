"""A cgroup for each notebook kernel: bounds on memory, processes and CPU time that hold for all that it starts.

Under the cgroup of the kernel service (SERVICE) this makes, in one v2 hierarchy or in three of v1:

    SERVICE/NAME-service             v2 only: the service's processes; a v2 cgroup has processes or children, not both
    SERVICE/NAME-kernels             all kernels together: a low CPU weight, so that the guard comes first
    SERVICE/NAME-kernels/kernel-ID   one kernel and its limits

A kernel can't write any of these files: its sandbox has no /sys, and as root's files they are closed to its uid.
Files of cgroupfs answer within milliseconds, so the event loop reads and writes them itself; only waits are async.
Reference: Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cloister_kernel.sandbox.cgroup_mounts import UNIFIED, locate, parse_membership, parse_mountinfo
from cloister_kernel.sandbox.kernel_cgroup import KernelCgroup, listed, removed, unique, write
from cloister_kernel.sandbox.layers import LayerError

CONTROLLERS = ("memory", "pids", "cpu")
PERIOD_MICROSECONDS = 100_000
# What all kernels together weigh: a tenth of the guard's cgroup on v2. On v1, where each of the guard's processes
# counts for itself, as much as one of them: with less, a busy machine would hardly run a kernel at all.
CPU_WEIGHT, CPU_SHARES = 10, 1024
MOVES = 100

_KERNEL_ID = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_PREFIX = "kernel-"
_DELEGATE = (
    "As root run the service under systemd with Delegate=yes. As an ordinary user start it with "
    "`systemd-run --user --scope -p Delegate=yes COMMAND`, on a system whose user units are given memory, pids and cpu."
)


@dataclass(frozen=True)
class Limits:
    """What one kernel may use.

    Attributes:
        memory_bytes: of memory, the pages of its /tmp, /dev/shm and home included; swap is not to be had.
        pids: processes and threads at one time.
        cpus: CPU time per time; 1.5 is one CPU and a half.
    """

    memory_bytes: int
    pids: int
    cpus: float

    def __post_init__(self) -> None:
        # The kernel rounds memory down to pages, and takes no CPU quota under a millisecond.
        if self.memory_bytes < 4096 or self.pids < 1 or not 0.01 <= self.cpus <= 4096:
            raise ValueError(f"{self} can't be a kernel's limits.")


def settings(limits: Limits, *, unified: bool) -> list[tuple[str, str, str, bool]]:
    """(controller, file, value, whether the file must exist) in the order in which they are to be written.

    The files that may be absent bound swap: they are absent where Linux doesn't account for it (the image has none).
    """
    memory, quota = str(limits.memory_bytes), int(limits.cpus * PERIOD_MICROSECONDS)
    if unified:
        return [
            ("memory", "memory.max", memory, True),
            ("memory", "memory.swap.max", "0", False),
            # Out of memory, a kernel dies as one: half of it, such as a fork without its parent, is of no use.
            ("memory", "memory.oom.group", "1", True),
            ("pids", "pids.max", str(limits.pids), True),
            ("cpu", "cpu.max", f"{quota} {PERIOD_MICROSECONDS}", True),
        ]
    return [
        ("memory", "memory.limit_in_bytes", memory, True),
        # Memory and swap together; it can't be lower than memory alone, so it comes second.
        ("memory", "memory.memsw.limit_in_bytes", memory, False),
        ("pids", "pids.max", str(limits.pids), True),
        ("cpu", "cpu.cfs_period_us", str(PERIOD_MICROSECONDS), True),
        ("cpu", "cpu.cfs_quota_us", str(quota), True),
    ]


class Cgroups:
    """Makes the cgroups of kernels. One object holds a name at a time: a second `find` of it is refused."""

    def __init__(self, name: str, service: Mapping[str, Path], *, unified: bool) -> None:
        """`service`: by controller, the directory of the cgroup below which everything goes. Raises LayerError."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} can't name cgroups.")
        self.unified = unified
        self._service = dict(service)
        self._leaf = f"{name}-service"
        self._parents = {controller: path / f"{name}-kernels" for controller, path in service.items()}
        self._lock = -1
        try:
            self._parents["pids"].mkdir(exist_ok=True)
            self._lock = _lock(self._parents["pids"])
            for parent in unique(self._parents):
                parent.mkdir(exist_ok=True)
            if unified:
                self._share_out()
            file, weight = ("cpu.weight", CPU_WEIGHT) if unified else ("cpu.shares", CPU_SHARES)
            write(self._parents["cpu"] / file, str(weight))
        except OSError as error:
            self.close()
            raise LayerError("cgroup", f"{error.filename} can't be set up: {error.strerror}.", _DELEGATE) from error
        except BaseException:
            self.close()
            raise

    def make(self, kernel_id: str, limits: Limits) -> KernelCgroup:
        """An empty cgroup with its limits set. Raises LayerError; then nothing is left behind."""
        if not _KERNEL_ID.fullmatch(kernel_id):
            raise ValueError(f"{kernel_id!r} isn't a kernel's id.")
        group = self._group(_PREFIX + kernel_id)
        made: list[Path] = []
        try:
            for directory in unique(group.directories):
                directory.mkdir()
                made.append(directory)
            for controller, file, value, needed in settings(limits, unified=self.unified):
                try:
                    write(group.directories[controller] / file, value)
                except FileNotFoundError:
                    if needed:
                        raise
        except OSError as error:
            for directory in made:
                removed(directory)
            raise LayerError(
                "cgroup",
                f"{error.filename} can't be set: {error.strerror}.",
                "Compare the kernel's limits with those of the service's own cgroup.",
            ) from error
        return group

    async def recover(self) -> None:
        """End and remove the kernels that an earlier service of this name left. To be called before a `make`."""
        left = {
            entry
            for parent in unique(self._parents)
            for entry in os.listdir(parent)
            if entry.startswith(_PREFIX) and _KERNEL_ID.fullmatch(entry.removeprefix(_PREFIX))
        }
        for entry in sorted(left):
            group = self._group(entry)
            await group.kill()
            await group.remove()

    def close(self) -> None:
        """Remove what holds no kernel any more, and on v2 bring the service's processes back to where they were."""
        if self._lock < 0:
            return
        with contextlib.suppress(OSError):
            for parent in unique(self._parents):
                removed(parent)
            if self.unified:
                self._take_back()
        os.close(self._lock)
        self._lock = -1

    def _group(self, entry: str) -> KernelCgroup:
        return KernelCgroup(self.unified, {key: parent / entry for key, parent in self._parents.items()})

    def _share_out(self) -> None:
        """v2: empty the service's cgroup into a leaf, then turn the controllers on below it and below the kernels."""
        service, leaf = self._service["pids"], self._service["pids"] / self._leaf
        # The root cgroup alone, which has no type, may hold processes beside children.
        if (service / "cgroup.type").exists():
            leaf.mkdir(exist_ok=True)
            _move(service, leaf)
        for directory in (service, self._parents["pids"]):
            write(directory / "cgroup.subtree_control", " ".join(f"+{key}" for key in self._service))

    def _take_back(self) -> None:
        service, leaf = self._service["pids"], self._service["pids"] / self._leaf
        if leaf.exists():
            write(service / "cgroup.subtree_control", " ".join(f"-{key}" for key in self._service))
            _move(leaf, service)
            removed(leaf)


def find(
    name: str, *, mountinfo: Path = Path("/proc/self/mountinfo"), membership: Path = Path("/proc/self/cgroup")
) -> Cgroups:
    """The cgroups that this process may make, v2 if it can be. Raises LayerError: what is missing, and the mend.

    `name` tells services of one machine apart. On v2 every process of this process's cgroup moves to a leaf below it.
    """
    mounts, own = parse_mountinfo(mountinfo.read_text()), parse_membership(membership.read_text())
    places = {key: locate(mounts, own, key) for key in (UNIFIED, *CONTROLLERS)}
    offered: set[str] = set()
    place = places[UNIFIED]
    if place is not None and place[0].name == f"{name}-service":
        place = place[0].parent, place[1]  # a service that was restarted by one that had moved
    if place is not None:
        with contextlib.suppress(OSError):
            offered = set((place[0] / "cgroup.controllers").read_text().split())
    if place is not None and offered.issuperset(CONTROLLERS):
        _check_rights(place[0], place[1], ("cgroup.procs", "cgroup.subtree_control"), "cgroup v2")
        return Cgroups(name, dict.fromkeys(CONTROLLERS, place[0]), unified=True)
    mounted = {key: found for key in CONTROLLERS if (found := places[key]) is not None}
    if len(mounted) < len(CONTROLLERS):
        missing = [key for key in CONTROLLERS if key not in offered and key not in mounted]
        raise _unavailable(missing, list(mounted), place[0] if place else None)
    for key, (directory, writable) in mounted.items():
        _check_rights(directory, writable, (), f"the {key} controller of cgroup v1")
    return Cgroups(name, {key: directory for key, (directory, _) in mounted.items()}, unified=False)


def _unavailable(missing: list[str], mounted: list[str], unified: Path | None) -> LayerError:
    """`missing` controllers are nowhere; `mounted` ones are on v1; `unified` is this process's cgroup on v2, if any."""
    if not missing:
        why = f"The controllers are split between cgroup v1, which has {' and '.join(mounted)}, and v2."
        return LayerError("cgroup", why, "Boot Linux with cgroup_no_v1=all, so that v2 has them all.")
    why = f"Linux offers this process no controller for {' and '.join(missing)}."
    if mounted:
        commands = [f"mount -t cgroup -o {key} cgroup /sys/fs/cgroup/{key}" for key in missing]
        return LayerError("cgroup", why, f"Boot Linux with cgroup_no_v1=all, or as root: {'; '.join(commands)}")
    if unified is None:
        mend = "As root: mount -t cgroup2 cgroup2 /sys/fs/cgroup. A container needs a cgroup namespace of its own."
        return LayerError("cgroup", why, mend)
    if not (unified / "cgroup.type").exists():  # the root: what it doesn't have, Linux doesn't
        options = " ".join(f"cgroup_enable={key}" for key in missing)
        return LayerError("cgroup", why, f"Boot Linux with cgroup_no_v1=all {options}.")
    enabled = " ".join(f"+{key}" for key in missing)
    file = unified.parent / "cgroup.subtree_control"
    return LayerError("cgroup", why, f"{_DELEGATE} Without systemd, as root: echo {enabled} > {file}")


def _check_rights(directory: Path, writable: bool, files: tuple[str, ...], where: str) -> None:
    """Raises LayerError where this process may not make cgroups in `directory`."""
    if not directory.is_dir():
        raise LayerError(
            "cgroup", f"{directory} isn't there, though {where} is mounted.", "Mount it as Linux lists it."
        )
    if not writable:
        raise LayerError("cgroup", f"{where} is mounted read-only.", f"Mount {directory} for writing.")
    for path in (directory, *(directory / file for file in files)):
        if not os.access(path, os.W_OK, effective_ids=True):
            raise LayerError("cgroup", f"This user may not write {path}, which {where} needs.", _DELEGATE)


def _lock(directory: Path) -> int:
    """A lock that falls with this process. Raises LayerError where another process holds it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        why = f"Another kernel service uses {directory}."
        raise LayerError("cgroup", why, "End it, or give this one another name.") from None
    return descriptor


def _move(source: Path, target: Path) -> None:
    """Move every process of one cgroup into another. Raises OSError."""
    for _ in range(MOVES):
        pids = listed(source / "cgroup.procs")
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                write(target / "cgroup.procs", str(pid))
    raise OSError(errno.EBUSY, "it goes on filling", str(source))
