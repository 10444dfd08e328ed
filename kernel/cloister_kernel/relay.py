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

from cloister_data.framing import Channel, ChannelFrame, FrameKind
from cloister_kernel.activity import Activity
from cloister_kernel.endings import exit_parts
from cloister_kernel.holdings import Holdings
from cloister_kernel.link import Link
from cloister_kernel.merging import message_type, piece, replaces
from cloister_kernel.notices import shuts_down, stream
from cloister_kernel.overflow import OUTPUTS, Overflow
from cloister_kernel.pump import Send, carry
from cloister_kernel.signing import with_signature, without_signature
from cloister_kernel.zmtp import Received, ZmtpSocket

DRAIN_SECONDS = 3.0
FULL_SECONDS = 0.05
"""How often a kernel whose messages find no room any more is looked at again."""
TURN_BYTES = 1 << 20
TURN_MESSAGES = 64
"""What one kernel may send before the others have their turn."""
IDENTITY = b"cloister"
"""One identity for shell, stdin and control, or the answer to input() finds no way back."""


class KernelRelay:
    """The relay of one kernel: it outlives the connections, and ends with the kernel's process.

    Attributes:
        attached: whether a laptop is connected.
        asked_to_end: whether a notebook told the kernel to end, as it does before a restart.
        activity: whether the kernel is used.
    """

    def __init__(self, holdings: Holdings, paths: Mapping[Channel, str], key: bytes) -> None:
        self.link = Link(holding=holdings.holding())
        self.attached = False
        self.asked_to_end = False
        self.activity = Activity()
        self._session = secrets.token_hex(16)
        self._key = key
        self._sockets: dict[Channel, asyncio.Task[ZmtpSocket]] = {}
        self._connection: asyncio.Task[Any] | None = None
        self._overflow = Overflow()
        self._exit: tuple[bytes, ...] | None = None
        for channel, path in paths.items():
            identity = None if channel is Channel.IOPUB else IDENTITY
            self._sockets[channel] = asyncio.create_task(ZmtpSocket.connect(path, identity=identity))
        self._readers = [asyncio.create_task(self._read(channel)) for channel in self._sockets]

    async def _read(self, channel: Channel) -> None:
        """Until the kernel's end of the socket closes."""
        holding = self.link.holding
        messages = turn = 0
        try:
            socket = await self._sockets[channel]
        except OSError:
            return
        async for received in socket.messages(holding.take, holding.give):
            holding.give(received.taken)
            self._post(channel, received)
            messages += 1
            turn += sum(map(len, received.parts))
            if messages >= TURN_MESSAGES or turn >= TURN_BYTES:
                messages = turn = 0
                await asyncio.sleep(0)
            while holding.over:  # noqa: ASYNC110 - room comes from other kernels, too
                await asyncio.sleep(FULL_SECONDS)

    def _post(self, channel: Channel, received: Received) -> None:
        message = without_signature(received.parts) if received.whole else None
        if message is None:
            if not received.whole and channel is Channel.IOPUB:
                self._overflow.drop(received.parts)
            return
        if channel is not Channel.IOPUB:
            self.link.post(channel, message)
            return
        self.activity.told(message)
        kind = message_type(message)
        if kind in OUTPUTS and not self.link.has_room(message):
            self._overflow.drop(message)
            return
        if (note := self._overflow.note()) is not None:
            self.link.post(channel, note)
        self.link.post(channel, message, piece=piece(kind, message), replaces=replaces(kind, message))

    async def _deliver(self, frame: ChannelFrame) -> None:
        if frame.kind is not FrameKind.DATA or frame.channel is Channel.IOPUB:
            return
        if frame.channel is Channel.SHELL:
            self.activity.asked(frame.parts)
        self.asked_to_end |= shuts_down(frame.parts)
        message = with_signature(frame.parts, self._key)
        if message is not None:
            # A kernel that has ended gets nothing any more; its EXIT says so.
            with contextlib.suppress(OSError):
                await (await self._sockets[frame.channel]).send(message)

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
            new = self.link.greeted_by_laptop(ChannelFrame.unpack(hello))
            if new and self._exit is not None and self.link.empty:
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
        await asyncio.wait(self._readers, timeout=DRAIN_SECONDS)
        for task in (*self._readers, *self._sockets.values()):
            task.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        for opened in await asyncio.gather(*self._sockets.values(), return_exceptions=True):
            if isinstance(opened, ZmtpSocket):
                opened.close()
        if (note := self._overflow.note()) is not None:
            self.link.post(Channel.IOPUB, note)
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
        """Break the present connection, if any, and let go of what was held."""
        if self._connection is not None:
            self._connection.cancel()
            await asyncio.wait({self._connection})
        self.link.forget()
