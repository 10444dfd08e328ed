"""One end of a kernel channel: what goes out is kept until the other side has it, what comes in is passed on once.

Each direction numbers its DATA and EXIT frames from 1 and acknowledges cumulatively. A connection may break at any
byte; the next one starts with HELLO frames that say how far each side got, and the rest is replayed: exactly once, in
order.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from cloister_data.errors import InvalidRequestError
from cloister_data.framing import Channel, ChannelFrame, FrameKind

MAX_OUTBOX_BYTES = 64 << 20
"""Above this many unacknowledged bytes an outbox is full; at twice as many it takes nothing more."""

LINK_ID_BYTES = 16
NO_LINK = bytes(LINK_ID_BYTES)


@dataclass(frozen=True)
class _Kept:
    kind: FrameKind
    channel: Channel
    parts: tuple[bytes, ...]
    size: int


class Link:
    """Numbering, acknowledging and replaying for one side of one kernel's channel.

    Attributes:
        identity: 16 bytes that name the laptop's bridge. The service answers a new identity with fresh numbers, so that
            a bridge that lost its state can attach to a kernel that still runs.
        received: the highest sequence number received without a gap.
        changed: set whenever there may be something to send.
        room: cleared while the outbox takes nothing more.
    """

    def __init__(self, identity: bytes = NO_LINK, *, limit: int = MAX_OUTBOX_BYTES) -> None:
        self.identity = identity
        self.received = 0
        self.changed = asyncio.Event()
        self.room = asyncio.Event()
        self.room.set()
        self._limit = limit
        self._outbox: deque[_Kept] = deque()
        self._bytes = 0
        self._acknowledged = 0  # by the other side; the outbox starts at the number after it
        self._cursor = 0  # the last number sent on the present connection
        self._announced = 0  # the last `received` that was sent

    @property
    def last(self) -> int:
        """The highest sequence number given out."""
        return self._acknowledged + len(self._outbox)

    @property
    def empty(self) -> bool:
        """Everything that was posted has arrived."""
        return not self._outbox

    @property
    def full(self) -> bool:
        return self._bytes >= self._limit

    @property
    def owed(self) -> int:
        """How many received frames the other side doesn't know to have arrived."""
        return self.received - self._announced

    def post(self, channel: Channel, parts: tuple[bytes, ...], kind: FrameKind = FrameKind.DATA) -> None:
        """Number one frame and keep it until it is acknowledged."""
        size = 64 + sum(len(part) + 4 for part in parts)
        self._outbox.append(_Kept(kind, channel, parts, size))
        self._bytes += size
        if self._bytes >= 2 * self._limit:
            self.room.clear()
        self.changed.set()

    def hello(self) -> ChannelFrame:
        """The first frame of a connection, from either side."""
        self._announced = self.received
        return ChannelFrame(FrameKind.HELLO, Channel.SHELL, 0, self.received, (self.identity,))

    def greeted_by_laptop(self, hello: ChannelFrame) -> None:
        """The service's side of a HELLO: go on where that bridge was, or start its numbers anew.

        Raises InvalidRequestError.
        """
        identity = _identity(hello)
        if identity != self.identity:
            self.identity = identity
            self.received = 0
            self._acknowledged = 0
            if hello.acknowledged != 0:
                raise InvalidRequestError("A new bridge claims frames that it can't have.")
        self._resume(hello.acknowledged)

    def greeted_by_service(self, hello: ChannelFrame) -> None:
        """The laptop's side of a HELLO. Raises InvalidRequestError."""
        if _identity(hello) != self.identity:
            raise InvalidRequestError("The kernel service answered for another bridge.")
        self._resume(hello.acknowledged)

    def _resume(self, acknowledged: int) -> None:
        self._prune(acknowledged)
        self._cursor = self._acknowledged
        self.changed.set()

    def accept(self, frame: ChannelFrame) -> bool:
        """Take in one frame; True where it is new and has to be passed on. Raises InvalidRequestError on a gap."""
        if frame.kind is FrameKind.HELLO:
            raise InvalidRequestError("A second HELLO came on one connection.")
        self._prune(frame.acknowledged)
        if frame.kind is FrameKind.ACK:
            return False
        if frame.sequence <= self.received:
            self.changed.set()
            return False
        if frame.sequence != self.received + 1:
            raise InvalidRequestError("A kernel channel frame is missing.")
        self.received = frame.sequence
        self.changed.set()
        return True

    def next_frame(self) -> ChannelFrame | None:
        """The next frame to send on this connection, with the present acknowledgement, or None."""
        if self._cursor >= self.last:
            return None
        kept = self._outbox[self._cursor - self._acknowledged]
        self._cursor += 1
        self._announced = self.received
        return ChannelFrame(kept.kind, kept.channel, self._cursor, self.received, kept.parts)

    def acknowledgement(self) -> ChannelFrame:
        self._announced = self.received
        return ChannelFrame(FrameKind.ACK, Channel.SHELL, 0, self.received)

    def _prune(self, acknowledged: int) -> None:
        if acknowledged > self.last:
            raise InvalidRequestError("A frame was acknowledged that was never sent.")
        while self._acknowledged < acknowledged:
            self._bytes -= self._outbox.popleft().size
            self._acknowledged += 1
        self._cursor = max(self._cursor, self._acknowledged)
        if self._bytes < 2 * self._limit:
            self.room.set()


def _identity(hello: ChannelFrame) -> bytes:
    if hello.kind is not FrameKind.HELLO or len(hello.parts) != 1 or len(hello.parts[0]) != LINK_ID_BYTES:
        raise InvalidRequestError("A kernel channel must begin with HELLO and a bridge's 16 bytes.")
    return hello.parts[0]
