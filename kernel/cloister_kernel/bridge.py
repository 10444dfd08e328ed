"""The laptop's end of a kernel: local Jupyter sockets on one side, a resumable connection on the other.

The bridge lives in a thread and an event loop of its own, so that it goes on while Jupyter's loop is busy. To local
clients it looks like a kernel: three ROUTERs, one XPUB and a heartbeat, messages signed with the local key. That key
stays here; it is checked on what comes in and put on what goes out.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import hmac
import logging
import os
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import zmq
import zmq.asyncio

from cloister.reattest import LapsedError
from cloister.transport import CertificateChangedError
from cloister_data.errors import (
    AttestationRefusedError,
    CloisterError,
    ConfigurationError,
    InvalidRequestError,
    NotFoundError,
    UnreachableError,
)
from cloister_data.framing import Channel, ChannelFrame, FrameKind
from cloister_kernel.endings import read_exit
from cloister_kernel.errands import CarryOut, Errands
from cloister_kernel.holdings import Holdings
from cloister_kernel.link import LINK_ID_BYTES, Link
from cloister_kernel.merging import message_type
from cloister_kernel.notices import Notices, shuts_down
from cloister_kernel.pump import carry
from cloister_kernel.signing import DELIMITER, with_signature, without_signature
from cloister_kernel.waking import woken

FIRST_RETRY_SECONDS = 0.2
LAST_RETRY_SECONDS = 5.0
HELLO_SECONDS = 20.0
LISTENER_SECONDS = 10.0
COPIED_BYTES = 64 << 10
LAPTOP_BYTES = 1 << 30
"""What waits here for the network, or comes in, at most: above, the notebook's next message waits outside."""
FULL_SECONDS = 0.1
"""How often the bridge looks whether what waits for the network has become less."""
WAITING = "The kernel runs on there; what you run here stays here until the machine is proven again."
PROVEN = "Cloister: the machine is proven again; the kernel goes on."
ENDED = "Cloister: the kernel has ended, and its variables are gone."
LOST_KERNEL = 70
"""The exit code of a kernel that the cloister doesn't know (any more)."""


class Connection(Protocol):
    """One connection to the kernel: binary messages, each one ChannelFrame."""

    async def send(self, data: bytes) -> None: ...

    def __aiter__(self) -> AsyncIterator[bytes]: ...


Connect = Callable[[], AbstractAsyncContextManager[Connection]]
"""Opens a connection. Raises NotFoundError where the kernel is gone for good, else what trying again may mend."""


@dataclass(frozen=True)
class LocalAddress:
    """Where and with which key local clients expect the kernel: a Jupyter connection file's content."""

    transport: str
    ip: str
    ports: dict[str, int]
    key: bytes

    @classmethod
    def from_connection_info(cls, info: Mapping[str, Any]) -> LocalAddress:
        """Raises ConfigurationError for what the bridge doesn't serve."""
        key = info.get("key", b"")
        if isinstance(key, str):
            key = key.encode()
        if str(info.get("signature_scheme", "hmac-sha256")) != "hmac-sha256":
            raise ConfigurationError("A Cloister kernel's local messages are signed with hmac-sha256 only.")
        if not key:
            raise ConfigurationError(
                "Jupyter was told not to sign its local messages.",
                why="Then every program on this machine could run code in the kernel.",
                next_step="Remove Session.key = '' from Jupyter's configuration.",
            )
        if info.get("curve_publickey"):
            raise ConfigurationError(
                "A Cloister kernel's local sockets don't speak CURVE.",
                next_step="Set transport_encryption to 'disabled' or 'auto', or use the transport 'ipc'.",
            )
        names = ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")
        return cls(str(info["transport"]), str(info["ip"]), {name: int(info[name]) for name in names}, key)

    def endpoint(self, name: str) -> str:
        if self.transport == "tcp":
            return f"tcp://{self.ip}:{self.ports[name]}"
        return f"ipc://{self.ip}-{self.ports[name]}"


class Bridge:
    """Serves one remote kernel locally, until it ends or `stop` is called.

    Attributes:
        exit_code: None while the kernel lives, as far as the bridge knows; it stays None during an outage.
        connected: whether the remote end is reached at the moment.
        asked_to_end: whether the user, or their Jupyter, wants the kernel to end: then the notebook isn't told why.
        adopting: the kernel runs already, and its output waits a moment for somebody who listens.
        doubt: why the machine doesn't count as proven, for people; None while it does. The notebook is told.
    """

    def __init__(
        self,
        address: LocalAddress,
        connect: Connect,
        log: logging.Logger | None = None,
        carry_out: CarryOut | None = None,
        *,
        adopting: bool = False,
    ) -> None:
        """`carry_out` does what the notebook's lines for the laptop say; without it they all go to the kernel."""
        self.adopting = adopting
        self.exit_code: int | None = None
        self.connected = False
        self.asked_to_end = False
        self.trouble: Exception | None = None
        self.doubt: str | None = None
        self._address, self._connect = address, connect
        self._log = log or logging.getLogger(__name__)
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._ended = threading.Event()
        self._over = asyncio.Event()  # the same, for the bridge's loop
        self._thread = threading.Thread(target=self._run, name="cloister-bridge", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main: asyncio.Task[None] | None = None
        self._sockets: dict[Channel, zmq.asyncio.Socket] = {}
        self._notices = Notices()
        self._told = ""
        self._heard = asyncio.Event()  # somebody listens to the kernel's output
        self._errands = Errands(carry_out, self._show)

    def start(self, timeout: float = 60.0) -> None:
        """Bind the local sockets and reach the kernel for the first time. Raises what prevents either."""
        self._thread.start()
        if not self._ready.wait(timeout):
            self.stop()
            raise self.trouble or UnreachableError("The kernel's channel didn't open in time.")
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def stop(self) -> None:
        """Release the local sockets and end the thread. What isn't acknowledged is dropped. May be called twice."""
        loop = self._loop
        if loop is not None and self._main is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the loop has just closed
                loop.call_soon_threadsafe(self._main.cancel)
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=10)

    def set_exit_code(self, code: int) -> None:
        """Said by whoever ended the kernel, where no EXIT could arrive. From any thread."""
        if self.exit_code is None:
            self.exit_code = code
        self._ended.set()
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._over.set)

    def cancel_errand(self) -> bool:
        """Interrupt what the laptop does for a cell. True where it was doing it: the kernel is idle then."""
        loop = self._loop
        if loop is None or not self._thread.is_alive():
            return False

        async def cancel() -> bool:
            return self._errands.cancel()

        try:
            return asyncio.run_coroutine_threadsafe(cancel(), loop).result(timeout=1)
        except (RuntimeError, TimeoutError, concurrent.futures.CancelledError):  # it is ending
            return False

    def wait(self, timeout: float | None = None) -> int | None:
        self._ended.wait(timeout)
        return self.exit_code

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=_selector_loop) as runner:
                self._loop = runner.get_loop()
                runner.run(self._serve())
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            self._failure = error
        finally:
            self.connected = False
            self._ready.set()

    async def _serve(self) -> None:
        self._main = asyncio.current_task()
        context = zmq.asyncio.Context()
        link = Link(secrets.token_bytes(LINK_ID_BYTES), Holdings(LAPTOP_BYTES, LAPTOP_BYTES).holding())
        tasks = []
        try:
            self._bind(context)
            heart = context.socket(zmq.ROUTER)
            heart.linger = 0
            heart.bind(self._address.endpoint("hb_port"))
            tasks = [asyncio.create_task(_echo(heart)), asyncio.create_task(self._listeners())]
            tasks += [
                asyncio.create_task(self._read(channel, link))
                for channel in (Channel.SHELL, Channel.STDIN, Channel.CONTROL)
            ]
            await self._stay_connected(link)
            # The kernel has ended: local clients stay served (with silence) until Jupyter lets go.
            await asyncio.Event().wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            context.destroy(linger=200)
            self._unlink()

    def _bind(self, context: zmq.asyncio.Context) -> None:
        self._unlink()
        for channel in Channel:
            socket = context.socket(zmq.XPUB if channel is Channel.IOPUB else zmq.ROUTER)
            # A replay comes faster than a notebook reads; dropping it here would undo it.
            socket.set_hwm(0)
            socket.linger = 200
            if channel is not Channel.IOPUB:
                socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
            endpoint = self._address.endpoint(f"{channel.name.lower()}_port")
            try:
                socket.bind(endpoint)
            except zmq.ZMQError as error:
                raise ConfigurationError(
                    f"The local kernel address {endpoint} can't be used.", why=str(error), next_step="Start it again."
                ) from error
            self._sockets[channel] = socket

    def _unlink(self) -> None:
        """A Unix socket's file of an earlier launch is in the way of the next one."""
        if self._address.transport == "ipc":
            for port in self._address.ports.values():
                try:
                    os.unlink(f"{self._address.ip}-{port}")
                except OSError:
                    continue

    async def _read(self, channel: Channel, link: Link) -> None:
        socket = self._sockets[channel]
        while True:
            while link.holding.over:  # noqa: ASYNC110 - it is over while the network is
                await asyncio.sleep(FULL_SECONDS)
            parts = await socket.recv_multipart()
            if not self._authentic(parts):
                self._log.warning("A local message without a valid signature was dropped.")
                continue
            message = without_signature(parts)
            if message is None:
                self._log.error("A message too large for the kernel's channel was dropped.")
                continue
            if channel is Channel.SHELL:
                message = await self._errands.in_turn(message)
            elif channel is Channel.CONTROL and message_type(message) == "interrupt_request":
                self._errands.cancel()
            link.post(channel, message)
            self.asked_to_end |= channel is not Channel.STDIN and shuts_down(message)
            if channel is Channel.SHELL and self._notices.asked(message) and self.doubt is not None:
                await self._tell(self._notices.to_last(self.doubt))

    def _authentic(self, parts: list[bytes]) -> bool:
        signed = with_signature(tuple(parts), self._address.key)
        if signed is None:
            return False
        mark = parts.index(DELIMITER)
        return hmac.compare_digest(signed[mark + 1], parts[mark + 1])

    async def _listeners(self) -> None:
        """Subscriptions need no answer, but have to be read."""
        while True:
            if (await self._sockets[Channel.IOPUB].recv_multipart())[0][:1] == b"\x01":
                self._heard.set()

    async def _await_listener(self) -> None:
        """What a kernel printed while no local server was there would be lost on a socket that nobody has found yet."""
        if self.adopting:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LISTENER_SECONDS):
                    await self._heard.wait()
            self.adopting = False

    async def _deliver(self, frame: ChannelFrame) -> None:
        if frame.kind is FrameKind.EXIT:
            try:
                code, reason = read_exit(frame.parts)
            except ValueError:
                code, reason = LOST_KERNEL, ""
            await self._end(code, reason)
            return
        await self._await_listener()
        if frame.channel is Channel.SHELL:
            self._notices.answered(frame.parts)
            self._errands.answered(frame.parts)
        message = with_signature(frame.parts, self._address.key)
        if message is not None:
            # Large ones aren't copied into ZeroMQ's own memory.
            copy = sum(map(len, message)) < COPIED_BYTES
            await self._sockets[frame.channel].send_multipart(message, copy=copy)

    async def _tell(self, notices: list[tuple[bytes, ...]]) -> None:
        for parts in notices:
            message = with_signature(parts, self._address.key)
            if message is not None:
                await self._sockets[Channel.IOPUB].send_multipart(message)

    async def _end(self, code: int, reason: str) -> None:
        """The kernel is gone: the notebook hears why before Jupyter sees that it is dead."""
        if self.exit_code is None and not self.asked_to_end:
            self._log.error("%s %s", ENDED, reason)
            await self._tell(self._notices.to_one(f"{ENDED} {reason}".rstrip()))
        self.set_exit_code(code)

    async def _show(self, cell: bytes, text: str) -> None:
        await self._tell([self._notices.progress(cell, text)])

    async def _note_doubt(self, error: Exception) -> None:
        """Tell the notebook and the log where it isn't the network that is in the way, but the machine's proof."""
        if not isinstance(error, (AttestationRefusedError, LapsedError)) or isinstance(error, CertificateChangedError):
            return
        if self.doubt is None or error.why != self._told:
            self.doubt, self._told = f"Cloister: {error} {WAITING}", error.why
            self._log.error("%s", self.doubt)
            await self._tell(self._notices.to_all(self.doubt))

    async def _note_proof(self) -> None:
        if self.doubt is not None:
            self.doubt = None
            self._log.warning("%s", PROVEN)
            await self._tell(self._notices.to_all(PROVEN))

    async def _stay_connected(self, link: Link) -> None:
        pause = FIRST_RETRY_SECONDS
        while self.exit_code is None:
            try:
                async with self._connect() as connection:
                    await self._converse(link, connection)
                pause = FIRST_RETRY_SECONDS
                self.trouble = None
            except NotFoundError as error:
                self._fail_first(error)
                await self._end(LOST_KERNEL, str(error.why or error))
            except Exception as error:
                if self.connected:
                    pause = FIRST_RETRY_SECONDS
                if isinstance(error, CloisterError) and not isinstance(error, (UnreachableError, InvalidRequestError)):
                    self._fail_first(error)
                await self._note_doubt(error)
                if type(error) is not type(self.trouble):
                    self._log.warning(
                        "The kernel's connection is interrupted (%s: %s); trying again.", type(error).__name__, error
                    )
                self.trouble = error
            self.connected = False
            with contextlib.suppress(TimeoutError):
                # Not wait_for: until Python 3.12 it hides a cancellation that comes together with the result.
                async with asyncio.timeout(pause * (0.75 + secrets.randbelow(500) / 1000)):
                    await self._over.wait()
            pause = min(pause * 2, LAST_RETRY_SECONDS)

    def _fail_first(self, error: Exception) -> None:
        """Before the first success an error that time doesn't mend ends the start."""
        if not self._ready.is_set():
            raise error

    async def _converse(self, link: Link, connection: Connection) -> None:
        incoming = connection.__aiter__()
        await connection.send(link.hello().pack())
        async with asyncio.timeout(HELLO_SECONDS):
            link.greeted_by_service(ChannelFrame.unpack(await anext(incoming)))
        self.connected = True
        self._ready.set()
        await self._note_proof()
        over, woke = asyncio.create_task(self._over.wait()), asyncio.create_task(woken())
        carrier = asyncio.create_task(carry(link, connection.send, incoming, self._deliver))
        try:
            await asyncio.wait({over, carrier, woke}, return_when=asyncio.FIRST_COMPLETED)
            if over.done() and not carrier.done():
                # Let the service know that EXIT has arrived; it may then forget the kernel.
                await connection.send(link.acknowledgement().pack())
        finally:
            ended = over.done()
            for task in (over, carrier, woke):
                task.cancel()
            results = await asyncio.gather(carrier, return_exceptions=True)
        if isinstance(results[0], Exception) and not ended:
            raise results[0]


async def _echo(socket: zmq.asyncio.Socket) -> None:
    """The heartbeat: this process lives, whatever the network does."""
    while True:
        await socket.send_multipart(await socket.recv_multipart())


def _selector_loop() -> asyncio.AbstractEventLoop:
    # pyzmq needs add_reader, which Windows' default loop lacks.
    return asyncio.SelectorEventLoop()
