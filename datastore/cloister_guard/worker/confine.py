"""A worker locks itself up before it reads its first order: no network, no new programs, no files written, no debugger.

Every layer is checked after it was set; one that can't be set or doesn't hold raises, and the worker never starts.
Linux only (prctl(2), seccomp(2), setrlimit(2)).
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import socket
from pathlib import Path

from cloister_data.errors import UnavailableError
from cloister_guard.worker.seccomp import install_filter, probe_io_uring

_PR_SET_PDEATHSIG = 1
_PR_GET_DUMPABLE = 3
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_PR_GET_NO_NEW_PRIVS = 39

OPEN_FILES = 256


def confine(*, parent: int, memory_bytes: int, cpu_seconds: int, keep: frozenset[int]) -> None:
    """Confine this process. `parent` is the guard's process id; `keep` are the descriptors that stay open.

    Raises UnavailableError that names the layer which can't be set.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    _die_with(libc, parent)
    _close_all_but(keep)
    _limit(memory_bytes, cpu_seconds)
    _prctl(libc, "PR_SET_DUMPABLE", _PR_SET_DUMPABLE, 0)
    _prctl(libc, "PR_SET_NO_NEW_PRIVS", _PR_SET_NO_NEW_PRIVS, 1)
    install_filter(libc)
    _check(libc)


def _die_with(libc: ctypes.CDLL, parent: int) -> None:
    _prctl(libc, "PR_SET_PDEATHSIG", _PR_SET_PDEATHSIG, signal.SIGKILL)
    # The guard may have died before the signal was asked for.
    if os.getppid() != parent:
        raise refused("parent-death signal", "its guard is gone")


def _close_all_but(keep: frozenset[int]) -> None:
    for descriptor in sorted(int(name) for name in os.listdir("/proc/self/fd")):
        if descriptor not in keep:
            try:
                os.close(descriptor)
            except OSError as error:
                # The listing's own descriptor is closed already.
                if error.errno != errno.EBADF:
                    raise refused("inherited descriptors", f"one can't be closed: {error.strerror}") from error


def _limit(memory_bytes: int, cpu_seconds: int) -> None:
    limits = {
        "RLIMIT_AS": (resource.RLIMIT_AS, memory_bytes),
        "RLIMIT_CPU": (resource.RLIMIT_CPU, cpu_seconds),
        # Pipes aren't files: nothing that a worker computes reaches a disk.
        "RLIMIT_FSIZE": (resource.RLIMIT_FSIZE, 0),
        "RLIMIT_CORE": (resource.RLIMIT_CORE, 0),
        "RLIMIT_NOFILE": (resource.RLIMIT_NOFILE, OPEN_FILES),
    }
    for name, (limit, value) in limits.items():
        try:
            _, hard = resource.getrlimit(limit)
            bounded = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(limit, (bounded, bounded))
        except (OSError, ValueError) as error:
            raise refused(name, str(error)) from error


def _prctl(libc: ctypes.CDLL, name: str, option: int, value: int) -> None:
    if _call(libc, option, value) != 0:
        raise refused(name, os.strerror(ctypes.get_errno()))


def _call(libc: ctypes.CDLL, option: int, value: int = 0) -> int:
    nothing = ctypes.c_ulong(0)
    return int(libc.prctl(option, ctypes.c_ulong(value), nothing, nothing, nothing))


def _check(libc: ctypes.CDLL) -> None:
    """What was asked for is in force. A network call is tried and must fail."""
    status = dict(
        line.split(":", 1)
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    )
    if status.get("Seccomp", "").strip() != "2":
        raise refused("seccomp filter", "the kernel doesn't report one")
    if _call(libc, _PR_GET_NO_NEW_PRIVS) != 1 or _call(libc, _PR_GET_DUMPABLE) != 0:
        raise refused("process flags", "they didn't stay set")
    for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, 40):
        try:
            opened = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            if error.errno == errno.EPERM:
                continue
            raise refused("seccomp filter", f"a socket fails for another reason: {error.strerror}") from error
        opened.close()
        raise refused("seccomp filter", "a socket can still be made")
    if probe_io_uring(libc) != errno.EPERM:
        raise refused("seccomp filter", "io_uring is still reachable")


def refused(layer: str, why: str) -> UnavailableError:
    """The error of a layer that isn't there."""
    return UnavailableError(
        f"A worker can't be confined on this machine: {layer}.",
        why=f"{why[:1].upper()}{why[1:]}.",
        next_step="Nothing was charged. The cloister needs Linux 4.17 or newer with seccomp filters and /proc mounted.",
    )
