"""Between one kernel's ZeroMQ sockets and the link to its laptop (the VM's side).

Messages cross it as ZeroMQ parts: the identities before `<IDS|MSG>` find their way back by themselves, and only the
signature is exchanged: empty on the link, made with the kernel's key towards the kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Mapping
from typing import Any

import zmq
import zmq.asyncio

from cloister_data.framing import Channel, ChannelFrame, FrameKind
from cloister_kernel.activity import Activity
from cloister_kernel.endings import exit_parts
from cloister_kernel.link import Link
from cloister_kernel.notices import shuts_down, stream
from cloister_kernel.overflow import Overflow
from cloister_kernel.pump import Send, carry
from cloister_kernel.signing import DELIMITER, with_signature, without_signature

QUIET_SECONDS = 0.1
DRAIN_SECONDS = 3.0


class KernelRelay:
    """The relay of one kernel: it outlives the connections, and ends with the kernel's process.

    Attributes:
        attached: whether a laptop is connected.
        asked_to_end: whether a notebook told the kernel to end, as it does before a restart.
        activity: whether the kernel is used.
    """

    def __init__(self, context: zmq.asyncio.Context, paths: Mapping[Channel, str], key: bytes) -> None:
        self.link = Link()
        self.attached = False
        self.asked_to_end = False
        self.activity = Activity()
        self._session = secrets.token_hex(16)
        self._key = key
        self._sockets: dict[Channel, zmq.asyncio.Socket] = {}
        self._connection: asyncio.Task[Any] | None = None
        self._overflow = Overflow()
        self._exit: tuple[bytes, ...] | None = None
        self._busy = 0  # counts what was read, for `finish`
        # One identity for shell, stdin and control, or the answer to input() finds no way back.
        identity = b"cloister"
        for channel, path in paths.items():
            socket = context.socket(zmq.SUB if channel is Channel.IOPUB else zmq.DEALER)
            socket.linger = 0
            if channel is Channel.IOPUB:
                socket.subscribe(b"")
            else:
                socket.setsockopt(zmq.IDENTITY, identity)
            socket.connect(f"ipc://{path}")
            self._sockets[channel] = socket
        self._readers = [asyncio.create_task(self._read(channel)) for channel in self._sockets]

    async def _read(self, channel: Channel) -> None:
        socket = self._sockets[channel]
        while True:
            await self.link.room.wait()
            parts = await socket.recv_multipart()
            self._busy += 1
            message = without_signature(parts)
            if message is None:
                if parts.count(DELIMITER) == 1 and len(parts) > parts.index(DELIMITER) + 5:
                    self._overflow.drop(parts)  # too large for one frame
                continue
            if channel is Channel.IOPUB:
                self.activity.told(message)
            for posted in self._overflow.admit(channel, message, self.link.full):
                self.link.post(channel, posted)

    async def _deliver(self, frame: ChannelFrame) -> None:
        if frame.kind is not FrameKind.DATA or frame.channel is Channel.IOPUB:
            return
        if frame.channel is Channel.SHELL:
            self.activity.asked(frame.parts)
        self.asked_to_end |= shuts_down(frame.parts)
        message = with_signature(frame.parts, self._key)
        if message is not None:
            await self._sockets[frame.channel].send_multipart(message)

    async def serve(self, send: Send, incoming: AsyncIterator[bytes]) -> None:
        """Carry one connection. A later one for the same kernel ends it: the laptop may have lost it long ago."""
        previous, self._connection = self._connection, asyncio.current_task()
        if previous is not None:
            previous.cancel()
            await asyncio.wait({previous})
        self.attached = True
        try:
            hello = await anext(incoming, None)
            if hello is None:
                return
            self.link.greeted_by_laptop(ChannelFrame.unpack(hello))
            if self._exit is not None and self.link.last == 0:
                self._post_exit(self._exit)  # another bridge has had it, this one hasn't
            await send(self.link.hello().pack())
            await carry(self.link, send, incoming, self._deliver)
        finally:
            if self._connection is asyncio.current_task():
                self._connection = None
                self.attached = False

    def say(self, text: str) -> None:
        """A line of text for the notebook, below the cell that was run last."""
        self.link.post(Channel.IOPUB, stream(self.activity.last_cell, text, self._session))

    async def finish(self, exit_code: int, reason: str) -> None:
        """The process has ended: take what it had still sent, then EXIT."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                seen = -1
                while seen != self._busy:
                    seen = self._busy
                    await asyncio.sleep(QUIET_SECONDS)
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        for socket in self._sockets.values():
            socket.close()
        self._exit = exit_parts(exit_code, reason)
        self._post_exit(self._exit)

    def _post_exit(self, parts: tuple[bytes, ...]) -> None:
        self.link.post(Channel.SHELL, parts, FrameKind.EXIT)

    async def flush(self, seconds: float) -> None:
        """Give a laptop that is attached so long to take what waits for it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.attached and not self.link.empty:  # noqa: ASYNC110 - acknowledgements tell nobody
                    await asyncio.sleep(0.02)

    async def close(self) -> None:
        """Break the present connection, if any."""
        if self._connection is not None:
            self._connection.cancel()
            await asyncio.wait({self._connection})
