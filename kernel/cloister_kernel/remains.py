"""What a kernel leaves: processes that outlive it, and files. All of it goes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import cloister_kernel.sweep
from cloister_data.errors import UnavailableError
from cloister_kernel.uids import uids_in_use, uids_of

ROUNDS = 100
PAUSE_SECONDS = 0.02


async def sweep_uid(uid: int) -> None:
    """Kill every process of a kernel's own uid. Raises UnavailableError where one survives."""
    for _ in range(ROUNDS):
        if uid not in await asyncio.to_thread(uids_in_use):
            return
        sweeper = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", cloister_kernel.sweep.__file__, str(uid), cwd="/", env={}
        )
        await sweeper.wait()
        await asyncio.sleep(PAUSE_SECONDS)
    raise UnavailableError("Processes of an ended kernel go on.")


async def sweep_session(session: int | None, home: Path) -> None:
    """Without uids of their own: kill the kernel's session, and whatever still carries its HOME.

    As sure as one uid for all kernels allows: a process that leaves both behind isn't found.
    """
    mark = f"\0HOME={home}\0".encode()
    for _ in range(ROUNDS):
        found = await asyncio.to_thread(_marked, session, mark)
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(PAUSE_SECONDS)
    raise UnavailableError("Processes of an ended kernel go on.")


def _marked(session: int | None, mark: bytes) -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and _belongs(int(entry), session, mark)]


def _belongs(pid: int, session: int | None, mark: bytes) -> bool:
    if pid == os.getpid() or os.geteuid() not in uids_of(pid):
        return False
    try:
        return os.getsid(pid) == session or mark in b"\0" + Path(f"/proc/{pid}/environ").read_bytes() + b"\0"
    except OSError:
        return False


async def delete(*paths: Path) -> None:
    """Delete trees that something hostile may have built: rm follows no links and bears any depth."""
    if not paths:
        return
    remover = await asyncio.create_subprocess_exec(
        "rm", "-rf", "--one-file-system", "--", *paths, env={"PATH": "/usr/bin:/bin"}, stderr=asyncio.subprocess.DEVNULL
    )
    if await remover.wait() != 0:
        raise UnavailableError("What an ended kernel left can't be deleted.")
