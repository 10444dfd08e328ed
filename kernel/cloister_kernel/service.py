"""The kernel service of the confidential VM: starts kernels when the guard asks, and carries their channels.

`python -m cloister_kernel.service --socket S --control C --homes DIR --runtime DIR [--hide DIR]...`

Each connection to S begins with one frame, a KernelOrder, answered by one frame, a KernelAnswer. After "attach" the
same connection carries the kernel's channel frames both ways, after "put" and "get" a file's bytes. The guard has
decided whose kernel it is before it asks.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import os
import secrets
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import zmq.asyncio
from pydantic import TypeAdapter, ValidationError

from cloister_data.errors import (
    CloisterError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    UnavailableError,
)
from cloister_data.kernels import (
    KernelAnswer,
    KernelAttach,
    KernelGet,
    KernelList,
    KernelOrder,
    KernelPut,
    KernelQuery,
    KernelRuntime,
    KernelSignal,
    KernelStart,
    KernelState,
    KernelView,
)
from cloister_kernel import transfers
from cloister_kernel.control import ControlClient
from cloister_kernel.frames import channel_frames, read_frame, write_frame
from cloister_kernel.process import die_with_parent
from cloister_kernel.relay import KernelRelay
from cloister_kernel.spawner import Spawner, Started

ORDER_SECONDS = 10.0
MAX_KERNELS_PER_USER = 100
"""A backstop; the guard's own limit for a user is lower."""
REMEMBER_SECONDS = 600.0
"""How long an ended kernel's last output and exit code wait for its laptop."""
REMEMBER_KERNELS = 4
LEASE_SECONDS = 12 * 3600.0
"""How long a kernel lives that no laptop is attached to."""

_ORDER: TypeAdapter[KernelStart | KernelSignal | KernelAttach | KernelQuery | KernelPut | KernelGet | KernelRuntime] = (
    TypeAdapter(KernelOrder)
)


@dataclass
class Kernel:
    user: str
    started: Started
    relay: KernelRelay
    since: int
    buried: asyncio.Event
    watcher: asyncio.Task[None] | None = None
    exit_code: int | None = None
    ended_at: float | None = None  # monotonic
    seen_at: float = 0.0  # monotonic: when a laptop was last attached

    def view(self) -> KernelView:
        state: KernelState = "running" if self.exit_code is None else "dead"
        alone = state == "running" and not self.relay.attached
        return KernelView(
            kernel=self.started.kernel,
            state=state,
            started=self.since,
            sandbox=self.started.sandbox,
            exit_code=self.exit_code,
            idle=int(time.monotonic() - self.seen_at) if alone else 0,
        )


class KernelService:
    """The kernels of one cloister, by their ids."""

    def __init__(self, spawner: Spawner, control: ControlClient, *, lease: float = LEASE_SECONDS) -> None:
        self._spawner, self._control, self._lease = spawner, control, lease
        self._kernels: dict[str, Kernel] = {}
        self._starting: dict[str, int] = {}
        self._context = zmq.asyncio.Context()

    async def start(self, order: KernelStart) -> KernelView:
        alive = sum(1 for kernel in self._kernels.values() if kernel.user == order.user and kernel.exit_code is None)
        if alive + self._starting.get(order.user, 0) >= MAX_KERNELS_PER_USER:
            raise UnavailableError(
                f"{MAX_KERNELS_PER_USER} of your kernels run already.", next_step="Shut down those that you don't use."
            )
        self._starting[order.user] = self._starting.get(order.user, 0) + 1
        try:
            return await self._start(order)
        finally:
            self._starting[order.user] -= 1
            if not self._starting[order.user]:
                del self._starting[order.user]

    async def _start(self, order: KernelStart) -> KernelView:
        identifier, uid = secrets.token_hex(16), self._spawner.take_uid()
        try:
            # The guard knows whose kernel it is before the first line of its code can run.
            guard_socket = await self._control.register(identifier, uid, order.user, self._spawner.sandbox)
            try:
                started = await self._spawner.start(identifier, uid, order.user, guard_socket, order.launch)
            except BaseException:
                with contextlib.suppress(CloisterError):
                    await self._control.end(identifier)
                raise
        except BaseException:
            self._spawner.give_uid_back(uid)
            raise
        relay = KernelRelay(self._context, started.paths, started.key)
        kernel = Kernel(order.user, started, relay, int(time.time()), asyncio.Event(), seen_at=time.monotonic())
        self._kernels[identifier] = kernel
        kernel.watcher = asyncio.create_task(self._watch(kernel))
        _log("kernel started", kernel=identifier, user=order.user, uid=uid, sandbox=started.sandbox)
        return kernel.view()

    async def _watch(self, kernel: Kernel) -> None:
        """Wait for the process, then bury it: what it left is killed and deleted, and the guard is told."""
        identifier = kernel.started.kernel
        code = await kernel.started.process.wait()
        try:
            await self._spawner.end(kernel.started)
        except Exception as error:
            # Its uid stays lent: what goes on under it meets no other kernel.
            _log("kernel not swept", kernel=identifier, error=type(error).__name__)
        try:
            await self._control.end(identifier)
        except CloisterError as error:
            _log("guard not told", kernel=identifier, error=error.code)
        await kernel.relay.finish(code)
        kernel.exit_code, kernel.ended_at = code, time.monotonic()
        kernel.buried.set()
        _log("kernel ended", kernel=identifier, exit_code=code)
        await self._forget_old(kernel.user)

    async def _forget_old(self, user: str) -> None:
        """Of one user's ended kernels only the last few are remembered: each may still hold its last output."""
        ended = [kernel for kernel in self._kernels.values() if kernel.user == user and kernel.ended_at is not None]
        ended.sort(key=lambda kernel: kernel.ended_at or 0.0)
        for kernel in ended[:-REMEMBER_KERNELS]:
            await self._forget(kernel)

    async def _forget(self, kernel: Kernel) -> None:
        self._kernels.pop(kernel.started.kernel, None)
        await kernel.relay.close()

    def find(self, identifier: str) -> Kernel:
        kernel = self._kernels.get(identifier)
        if kernel is None:
            raise NotFoundError("There is no such kernel.", next_step="Start another one.")
        return kernel

    def find_running(self, identifier: str) -> Kernel:
        """One whose home is still there. Raises NotFoundError."""
        kernel = self.find(identifier)
        if kernel.exit_code is not None or kernel.started.process.returncode is not None:
            raise NotFoundError("The kernel has ended, and its home is gone.", next_step="Start another one.")
        return kernel

    async def signal(self, order: KernelSignal) -> KernelView:
        kernel = self.find(order.kernel)
        if order.op == "interrupt" and kernel.started.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                # Its whole session's first group, as a terminal's Ctrl-C does.
                os.killpg(kernel.started.process.pid, signal.SIGINT)
        elif order.op == "end":
            await self.end(kernel)
        return kernel.view()

    async def end(self, kernel: Kernel) -> None:
        """Kill it at once; returns when it is buried."""
        with contextlib.suppress(ProcessLookupError):
            kernel.started.process.kill()
        await kernel.buried.wait()

    def list(self, order: KernelQuery) -> KernelList:
        return KernelList(kernels=tuple(k.view() for k in self._kernels.values() if k.user == order.user))

    async def housekeeping(self) -> None:
        """Forget the ended, end the forgotten."""
        while True:
            await asyncio.sleep(5)
            now = time.monotonic()
            for identifier, kernel in list(self._kernels.items()):
                if kernel.relay.attached:
                    kernel.seen_at = now
                if kernel.ended_at is not None and now - kernel.ended_at > REMEMBER_SECONDS:
                    await self._forget(kernel)
                elif kernel.exit_code is None and now - kernel.seen_at > self._lease:
                    _log("lease over", kernel=identifier)
                    await self.end(kernel)

    async def close(self) -> None:
        """End every kernel."""
        await asyncio.gather(*(self.end(kernel) for kernel in self._kernels.values()), return_exceptions=True)
        await asyncio.gather(*(kernel.relay.close() for kernel in self._kernels.values()), return_exceptions=True)
        self._context.destroy(linger=0)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection from the guard."""
        try:
            if _peer_uid(writer) not in (0, os.geteuid()):
                return
            attached = await self._answer(reader, writer)
            if attached is not None:

                async def send(data: bytes) -> None:
                    await write_frame(writer, data)

                await attached.relay.serve(send, channel_frames(reader))
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError, TimeoutError):
            pass  # the laptop left, or came back on another connection
        except CloisterError as error:
            _log("connection refused", error=error.code)
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Kernel | None:
        attached: Kernel | None = None
        answer: KernelAnswer | None
        try:
            async with asyncio.timeout(ORDER_SECONDS):
                frame = await read_frame(reader)
            order = _ORDER.validate_json(frame)
            match order:
                case KernelStart():
                    answer = KernelAnswer(kernel=await self.start(order))
                case KernelSignal():
                    answer = KernelAnswer(kernel=await self.signal(order))
                case KernelQuery():
                    answer = KernelAnswer(kernels=self.list(order))
                case KernelAttach():
                    attached = self.find(order.kernel)
                    answer = KernelAnswer(kernel=attached.view())
                case KernelPut():
                    kernel = self.find_running(order.kernel)
                    await transfers.put(kernel.started, order, reader, writer, KernelAnswer(kernel=kernel.view()))
                    answer = KernelAnswer(kernel=kernel.view())
                case KernelGet():
                    await transfers.get(self.find_running(order.kernel).started, order, writer)
                    answer = None  # the file's bytes were it
                case KernelRuntime():
                    answer = KernelAnswer(runtime=transfers.runtime())
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            raise
        except ValidationError:
            answer = KernelAnswer(problem=InvalidRequestError("The kernel service can't read this order.").to_problem())
        except CloisterError as error:
            answer = KernelAnswer(problem=error.to_problem())
        except Exception as error:
            _log("order failed", error=type(error).__name__)
            problem = InternalError("The kernel service failed.", next_step="Look into its log.").to_problem()
            answer = KernelAnswer(problem=problem)
        if answer is not None:
            await write_frame(writer, answer.to_json())
        return attached


def _peer_uid(writer: asyncio.StreamWriter) -> int:
    connection: socket.socket = writer.get_extra_info("socket")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def _log(event: str, **facts: str | int) -> None:
    """One line on standard error, which the guard or systemd collects: ids and codes, nothing that a kernel wrote."""
    line = " ".join([f"kernel-service: {event}", *(f"{name}={value}" for name, value in facts.items())])
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def listen(path: Path) -> socket.socket:
    """The guard's door, mode 0600."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen(128)
    listener.setblocking(False)
    return listener


@contextlib.contextmanager
def alone(runtime: Path) -> Iterator[None]:
    """Wait until an earlier service, whose guard was killed, has ended its kernels and taken its socket away."""
    descriptor = os.open(runtime / "k", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


async def run(spawner: Spawner, control: ControlClient, lease: float, listener: socket.socket) -> None:
    """Clear what an earlier service left, serve until SIGTERM or SIGINT, then end every kernel."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await spawner.recover()
    service = KernelService(spawner, control, lease=lease)
    server = await asyncio.start_unix_server(service.serve, sock=listener)
    keeper = asyncio.create_task(service.housekeeping())
    _log("listening")
    await stop.wait()
    server.close()
    keeper.cancel()
    await service.close()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cloister_kernel.service", description=__doc__.split("\n")[0])
    parser.add_argument("--socket", type=Path, required=True, help="where the guard gives its orders")
    parser.add_argument("--control", type=Path, required=True, help="the guard's control socket")
    parser.add_argument("--homes", type=Path, required=True, help="where the kernels' homes are made")
    parser.add_argument("--runtime", type=Path, required=True, help="a short path for the kernels' sockets")
    parser.add_argument("--hide", type=Path, action="append", default=[], help="a directory no kernel may see")
    parser.add_argument(
        "--die-with-parent", action="store_true", help="stop when the process that started this one ends"
    )
    parser.add_argument("--lease", type=float, default=LEASE_SECONDS, help="seconds a kernel lives without its laptop")
    options = parser.parse_args(arguments)
    try:
        if options.die_with_parent:
            die_with_parent(signal.SIGTERM)
        spawner = Spawner(homes=options.homes, runtime=options.runtime, hidden=tuple(options.hide))
        with alone(options.runtime):
            listener = listen(options.socket)
            try:
                asyncio.run(run(spawner, ControlClient(options.control), options.lease, listener))
            finally:
                options.socket.unlink(missing_ok=True)
    except (CloisterError, OSError) as error:
        sys.stderr.write(f"kernel-service: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
