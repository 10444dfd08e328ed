"""The kernel service beside the guard: met every few seconds; started, watched and ended unless it is a unit apart."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import structlog
from pydantic import ValidationError

from cloister_data.errors import CloisterError, ConfigurationError, Problem, from_problem
from cloister_data.kernels import MISCONFIGURED
from cloister_guard.http.servers import KernelSockets
from cloister_guard.kernels import Kernels

logger = structlog.get_logger()

MEET_SECONDS = 5.0
RETRY_SECONDS = 0.2
TROUBLE_SECONDS = 15.0
"""So long a kernel service may need to start before the log says that it isn't there."""
RESTART_SECONDS = 1.0
ANSWER_PAUSE_SECONDS = 0.02
STOP_SECONDS = 120.0
"""It ends its kernels, one beside the other, lets their laptops know, and saves the homes."""

_UCRED = struct.Struct("3i")


async def stay_met(kernels: Kernels, sockets: KernelSockets) -> None:
    """Until it is cancelled: tell the kernel service that this guard is there, and close what an earlier one left."""
    met = time.monotonic()
    told = False
    while True:
        try:
            figures = await kernels.meet()
        except CloisterError as error:
            if not told and time.monotonic() - met > TROUBLE_SECONDS:
                logger.error("the kernel service can't be met", why=error.code)
                told = True
            await asyncio.sleep(RETRY_SECONDS)
            continue
        met, told = time.monotonic(), False
        await sockets.keep(figures.service)
        await asyncio.sleep(MEET_SECONDS)


class _Service:
    """A running kernel service. Held by a descriptor: its number could become another process's."""

    def __init__(self, descriptor: int, child: subprocess.Popen[bytes] | None = None) -> None:
        self._descriptor, self._child = descriptor, child
        self.ended = asyncio.Event()
        self.code: int | None = None
        # A descriptor of a process is readable once it has ended (pidfd_open(2)).
        asyncio.get_running_loop().add_reader(descriptor, self._on_end)

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)
        if self._child is not None:
            self.code = self._child.wait()
        self.ended.set()

    def send_signal(self, number: int) -> None:
        if not self.ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)


def _find(service_socket: Path) -> _Service | None:
    """The kernel service that listens there, if one does: this user's or root's."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(str(service_socket))
            # Of the process that called listen(2): see unix(7), SO_PEERCRED.
            pid, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
            if pid <= 0 or uid not in (0, os.geteuid()):
                return None
            return _Service(os.pidfd_open(pid))
        except OSError:
            return None


async def answering(service_socket: Path) -> None:
    """Wait until a kernel service listens there."""
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            try:
                connection.connect(str(service_socket))
                return
            except OSError:
                await asyncio.sleep(ANSWER_PAUSE_SECONDS)


def _why(service_socket: Path) -> CloisterError:
    """What a kernel service that can't start here left as its reason."""
    path = service_socket.with_suffix(".problem")
    try:
        return from_problem(Problem.from_json(path.read_bytes()[: 1 << 16]))
    except (OSError, ValidationError):
        return ConfigurationError("The kernel service can't start on this machine.", next_step="Look into its log.")
    finally:
        path.unlink(missing_ok=True)


async def _start(command: Sequence[str]) -> _Service:
    # Not asyncio's own way, which kills its children where a guard ends by a fault.
    child = await asyncio.to_thread(subprocess.Popen, command, stdin=subprocess.DEVNULL)
    return _Service(os.pidfd_open(child.pid), child)


async def supervise(command: Sequence[str], service_socket: Path, stop: asyncio.Event) -> None:
    """Keep a kernel service running until `stop`, from one that runs already; end it then, and wait for it.

    Cancelled, it leaves the service as it is, as a guard does that is killed. Raises ConfigurationError where this
    machine can't run one: where kernels can't be confined, for example.
    """
    while not stop.is_set():
        service = _find(service_socket)
        if service is None:
            service = await _start(command)
        else:
            logger.info("a kernel service runs already: its kernels are taken over")
        await _first(service.ended, stop)
        if not service.ended.is_set():
            service.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_SECONDS):
                    await service.ended.wait()
        service.send_signal(signal.SIGKILL)
        await service.ended.wait()
        if service.code == MISCONFIGURED and not stop.is_set():
            raise _why(service_socket)
        if not stop.is_set():
            logger.error("the kernel service ended", code=service.code)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RESTART_SECONDS):
                    await stop.wait()


async def _first(*events: asyncio.Event) -> None:
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
