"""Use of more than one's share, in bounded sizes: nothing here may endanger the machine that runs the tests.

Each is open where no limit took hold before the size that the host has given. Everything ends by itself.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import shutil
import signal
import tempfile
import time

from tests.attack.battery.registry import Given, Stopped, attack


@attack("limits: many processes", proof="seen", bare=False, seconds=20)
def forks(given: Given) -> str:
    """As many as the host says, all alive at once."""
    wanted, alive = given["limits"]["processes"], []
    try:
        for _ in range(wanted):
            alive.append(os.posix_spawn("/bin/sleep", ["sleep", "20"], {}))
    finally:
        for child in alive:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return f"{len(alive)} processes at once"


@attack("limits: much memory", proof="seen", needs="memory_hog", bare=False, seconds=20)
def memory(given: Given) -> str:
    size = given["limits"]["memory"]
    page = mmap.mmap(-1, size)
    for offset in range(0, size, 4096):
        page[offset] = 1
    return f"{size >> 20} MiB touched"


def _fill(directory: str, size: int) -> int:
    with tempfile.TemporaryFile(dir=directory) as file:
        written = 0
        while written < size:
            written += file.write(bytes(1 << 20))
            file.flush()
        return written


@attack("limits: a full disk", proof="seen", bare=False, seconds=20)
def disk(given: Given) -> str:
    """In each place that can be written."""
    filled = []
    for directory in (os.path.expanduser("~"), "/tmp", "/var/tmp", "/dev/shm", "/run", "/"):
        with contextlib.suppress(OSError):
            filled.append(f"{directory} {_fill(directory, given['limits']['disk']) >> 20} MiB")
    if not filled:
        raise Stopped("no place took as much")
    return ", ".join(filled)


@attack("limits: many files", proof="seen", bare=False, seconds=20)
def inodes(given: Given) -> str:
    place = tempfile.mkdtemp(dir=os.path.expanduser("~"))
    try:
        for number in range(given["limits"]["files"]):
            os.close(os.open(f"{place}/{number}", os.O_CREAT | os.O_WRONLY))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return f"{given['limits']['files']} files"


@attack("limits: many descriptors", proof="seen", bare=False, seconds=20)
def descriptors(given: Given) -> str:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    null = os.open(os.devnull, os.O_RDONLY)
    for _ in range(given["limits"]["descriptors"]):
        os.dup(null)
    return f"{given['limits']['descriptors']} descriptors"


@attack("limits: all processors for a second", proof="watch", bare=False)
def burn(given: Given) -> str:
    """Four processes that compute; the guard and other kernels must be served meanwhile."""
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            end = time.monotonic() + 1
            while time.monotonic() < end:
                pass
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return "four processes computed for a second"


@attack("limits: a daemon that outlives its kernel", proof="end", bare=False)
def daemon(given: Given) -> str:
    """A process of its own session, whose parents are gone. The host looks for it when the kernel has ended."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            signal.alarm(120)
            os.write(writing, str(os.getpid()).encode())
            os.closerange(0, 1024)
            # The host finds it by this argument.
            os.execv("/bin/sh", ["/bin/sh", "-c", "sleep 100; :", given["daemon"]])
        os._exit(0)
    return f"process {os.read(reading, 16).decode()}"
