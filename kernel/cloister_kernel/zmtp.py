"""The kernel service's end of a notebook kernel's ZeroMQ socket: ZMTP 3.0, mechanism NULL, over a Unix socket.

A kernel is hostile, and libzmq buffers what a peer sends by the number of messages, whatever their size, and the parts
of one message without any bound. Here every byte is asked for before it is kept. (https://rfc.zeromq.org/spec/23/)
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from cloister_data.framing import MAX_CHANNEL_MESSAGE, MAX_PARTS

BUFFER_BYTES = 128 << 10
SMALL_BYTES = 1 << 20
"""A message of so many bytes is always taken in; a larger one where there is room."""
MAX_COMMAND = 4096
_GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
_MORE, _LONG, _COMMAND = 1, 2, 4
_SIZE = struct.Struct(">Q")


@dataclass(frozen=True)
class Received:
    """One message. `whole` is False where something of it didn't fit; the `parts` are then those before that."""

    parts: tuple[bytes, ...]
    whole: bool
    taken: int
    """Bytes that were asked for; the receiver gives them back."""


class ZmtpSocket:
    """A DEALER or SUB socket, connected to one kernel that listens already."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._input = _Input(connection)
        self._sending = asyncio.Lock()

    @classmethod
    async def connect(cls, path: str, *, identity: bytes | None) -> ZmtpSocket:
        """A DEALER of that identity; where it is None, a SUB that subscribes to everything.

        Returns when the kernel has said READY, which may take until it has started. Raises OSError.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        made = cls(connection)
        try:
            await asyncio.get_running_loop().sock_connect(connection, path)
            await made._shake_hands(b"SUB" if identity is None else b"DEALER", identity or b"")
            if identity is None:
                await made.send([b"\x01"])
        except BaseException:
            made.close()
            raise
        return made

    async def _shake_hands(self, kind: bytes, identity: bytes) -> None:
        ready = b"\x05READY" + _property(b"Socket-Type", kind) + _property(b"Identity", identity)
        await self._write(_GREETING + bytes([_COMMAND, len(ready)]) + ready)
        greeting = await self._input.exactly(len(_GREETING))
        if greeting[0] != 0xFF or greeting[9] != 0x7F or greeting[10] < 3 or greeting[12:32] != _GREETING[12:32]:
            raise ConnectionError("The kernel doesn't speak ZMTP 3.")
        flags = (await self._input.exactly(1))[0]
        if not flags & _COMMAND:
            raise ConnectionError("The kernel doesn't shake hands.")
        await self._command(flags)

    async def send(self, parts: Sequence[bytes]) -> None:
        """Raises OSError where the kernel is gone. Waits while it doesn't read."""
        await self._write(_frames(parts))

    async def _write(self, data: bytes) -> None:
        async with self._sending:
            await asyncio.get_running_loop().sock_sendall(self._socket, data)

    async def messages(self, take: Callable[[int], bool], give: Callable[[int], None]) -> AsyncIterator[Received]:
        """What the kernel sends, until it ends or breaks the protocol.

        Above SMALL_BYTES, `take` is asked before bytes are kept; where it refuses, or where a message exceeds the
        channel's limits, the message's rest is read and forgotten. `give` takes back what a broken message had.
        """
        # A kernel that ends, or that speaks no ZMTP: either way nothing more comes.
        with contextlib.suppress(OSError):
            while True:
                yield await self._message(take, give)

    async def _message(self, take: Callable[[int], bool], give: Callable[[int], None]) -> Received:
        parts: list[bytes] = []
        size = taken = 0
        whole, more = True, True
        try:
            while more:
                flags = (await self._input.exactly(1))[0]
                if flags & _COMMAND:
                    await self._command(flags)
                    continue
                more, length = bool(flags & _MORE), await self._length(flags)
                whole = whole and len(parts) < MAX_PARTS and size + length <= MAX_CHANNEL_MESSAGE
                if whole and size + length > SMALL_BYTES:
                    whole = take(size + length - taken)
                    taken = size + length if whole else taken
                if not whole:
                    await self._input.skip(length)
                    continue
                parts.append(await self._input.exactly(length))
                size += length
        except BaseException:
            give(taken)
            raise
        return Received(tuple(parts), whole, taken)

    async def _command(self, flags: int) -> None:
        if (length := await self._length(flags)) > MAX_COMMAND:
            raise ConnectionError("The kernel sent a command that is none.")
        await self._input.exactly(length)

    async def _length(self, flags: int) -> int:
        if flags & _LONG:
            return int(_SIZE.unpack(await self._input.exactly(8))[0])
        return (await self._input.exactly(1))[0]

    def close(self) -> None:
        self._socket.close()


class _Input:
    """What comes from one socket, through a buffer of a fixed size."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._start = self._end = 0

    async def _receive(self, into: memoryview) -> int:
        """Raises ConnectionError at the end."""
        count = await asyncio.get_running_loop().sock_recv_into(self._socket, into)
        if not count:
            raise ConnectionResetError("The kernel closed its socket.")
        return count

    async def exactly(self, length: int) -> bytes:
        """Above the buffer's size it is read to where it stays, and is a memoryview."""
        have = self._buffer[self._start : self._end]
        if length > BUFFER_BYTES:
            whole = memoryview(bytearray(length))
            whole[: len(have)] = have
            filled, self._start, self._end = len(have), 0, 0
            while filled < length:
                filled += await self._receive(whole[filled:])
            return whole.toreadonly()  # type: ignore[return-value]
        if len(have) < length:
            self._buffer[: len(have)] = bytes(have)
            self._start, self._end = 0, len(have)
            while self._end < length:
                self._end += await self._receive(self._buffer[self._end :])
        found = bytes(self._buffer[self._start : self._start + length])
        self._start += length
        return found

    async def skip(self, length: int) -> None:
        length -= (have := min(length, self._end - self._start))
        self._start += have
        while length:
            length -= await self._receive(self._buffer[: min(length, BUFFER_BYTES)])
            self._start = self._end = 0


def _property(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + struct.pack(">I", len(value)) + value


def _frames(parts: Sequence[bytes]) -> bytes:
    pieces: list[bytes] = []
    for at, part in enumerate(parts):
        more = _MORE if at + 1 < len(parts) else 0
        if len(part) < 256:
            pieces += (bytes([more, len(part)]), part)
        else:
            pieces += (bytes([more | _LONG]), _SIZE.pack(len(part)), part)
    return b"".join(pieces)
