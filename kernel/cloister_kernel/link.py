"""One end of a kernel channel: what goes out is kept until the other side has it, what comes in is passed on once.

Each direction numbers its DATA and EXIT frames from 1 and acknowledges cumulatively. A connection may break at any
byte; the next one starts with HELLO frames that say how far each side got, and the rest is replayed: exactly once, in
order. What has no number yet was never sent, so it may still be joined with what follows it, or be replaced.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field

from cloister_data.errors import InvalidRequestError, TooLargeError
from cloister_data.framing import (
    MAX_CHANNEL_MESSAGE,
    MAX_PARTS,
    MAX_SLICE,
    Channel,
    ChannelFrame,
    FrameKind,
    Slice,
)
from cloister_kernel.holdings import Holding, Holdings
from cloister_kernel.merging import Piece, joined

LINK_ID_BYTES = 16
NO_LINK = bytes(LINK_ID_BYTES)
STREAM_SECONDS = 0.02
"""A cell's next piece of text waits so long after the last one for others to go with it. The first one never waits."""
JOINED_BYTES = 256 << 10
"""A text of this size goes out as it is."""
MESSAGE_MARGIN = 2 << 20
"""For what `_size` counts beyond a message's own bytes."""
_OVERHEAD, _PART_OVERHEAD = 400, 56
"""What Python needs for one message, and for one of its parts, beyond their bytes."""


@dataclass(slots=True)
class _Waiting:
    """A message without a number."""

    kind: FrameKind
    channel: Channel
    parts: tuple[bytes, ...]
    size: int
    piece: tuple[bytes, ...] | None = None
    later: list[bytes] = field(default_factory=list)
    replaces: tuple[object, ...] | None = None
    stale: bool = False


@dataclass(frozen=True, slots=True)
class _Numbered:
    kind: FrameKind
    channel: Channel
    parts: tuple[bytes, ...]
    slice: Slice
    size: int


class Link:
    """Numbering, acknowledging and replaying for one side of one kernel's channel.

    Attributes:
        identity: 16 bytes that name the laptop's bridge. The service answers a new identity with fresh numbers, so that
            a bridge that lost its state can attach to a kernel that still runs.
        received: the highest sequence number received without a gap.
        changed: set whenever there may be something to send.
        holding: the account that pays for what is kept.
    """

    def __init__(self, identity: bytes = NO_LINK, holding: Holding | None = None) -> None:
        self.identity = identity
        self.received = 0
        self.changed = asyncio.Event()
        self.holding = holding or Holdings().holding()
        self._waiting: deque[_Waiting] = deque()
        self._replaceable: dict[tuple[object, ...], _Waiting] = {}
        self._stale = 0
        self._numbered: deque[_Numbered] = deque()
        self._begun: list[_Numbered] = []  # acknowledged slices of a message whose last one isn't
        self._acknowledged = 0  # by the other side; the numbered ones start at the number after it
        self._cursor = 0  # the last number sent on the present connection
        self._announced = 0  # the last `received` that was sent
        self._parts: list[bytes] = []  # of the message that is coming in slices
        self._pieces: list[bytes] = []  # of its next part; empty where none is coming
        self._coming = 0  # what both take, held
        self._streamed: tuple[tuple[bytes, ...] | None, float] = (None, 0.0)  # which piece was sent last, and when

    @property
    def last(self) -> int:
        """The highest sequence number given out."""
        return self._acknowledged + len(self._numbered)

    @property
    def empty(self) -> bool:
        """Everything that was posted has arrived."""
        return not self._numbered and not self._waiting

    def has_room(self, parts: tuple[bytes, ...]) -> bool:
        """Whether what may be left out, too, can be kept."""
        return self.holding.fits(_size(parts))

    @property
    def owed(self) -> int:
        """How many received frames the other side doesn't know to have arrived."""
        return self.received - self._announced

    def post(
        self,
        channel: Channel,
        parts: tuple[bytes, ...],
        kind: FrameKind = FrameKind.DATA,
        *,
        piece: Piece | None = None,
        replaces: tuple[object, ...] | None = None,
    ) -> None:
        """Keep one message until it is acknowledged. `piece` and `replaces` say what it may be merged with."""
        self.changed.set()
        tail = self._waiting[-1] if self._waiting else None
        if piece is not None and tail is not None and tail.piece == piece.key and tail.size < JOINED_BYTES:
            tail.later.append(piece.text)
            self._grow(tail, len(piece.text) + _PART_OVERHEAD)
            return
        made = _Waiting(kind, channel, parts, _size(parts), piece.key if piece else None, replaces=replaces)
        self._waiting.append(made)
        self.holding.hold(made.size)
        if replaces is not None:
            self._replace(replaces, made)

    def _grow(self, waiting: _Waiting, size: int) -> None:
        waiting.size += size
        self.holding.hold(size)

    def _replace(self, key: tuple[object, ...], made: _Waiting) -> None:
        stale = self._replaceable.get(key)
        self._replaceable[key] = made
        if stale is None:
            return
        self._grow(stale, _OVERHEAD - stale.size)
        stale.parts, stale.stale = (), True
        self._stale += 1
        if self._stale > 1000 and self._stale > len(self._waiting) // 2:
            self.holding.give(_OVERHEAD * self._stale)
            self._waiting = deque(waiting for waiting in self._waiting if not waiting.stale)
            self._stale = 0

    def hello(self) -> ChannelFrame:
        """The first frame of a connection, from either side."""
        self._announced = self.received
        return ChannelFrame(FrameKind.HELLO, Channel.SHELL, 0, self.received, (self.identity,))

    def greeted_by_laptop(self, hello: ChannelFrame) -> bool:
        """The service's side of a HELLO: go on where that bridge was, or start its numbers anew (True).

        Raises InvalidRequestError.
        """
        identity = _identity(hello)
        new = identity != self.identity
        if new:
            self.identity = identity
            self.received = 0
            self._acknowledged = 0
            self._forget_slices()
            # Another bridge has taken a message's first slices along.
            self._numbered.extendleft(reversed(self._begun))
            self._begun.clear()
            if hello.acknowledged != 0:
                raise InvalidRequestError("A new bridge claims frames that it can't have.")
        self._resume(hello.acknowledged)
        return new

    def greeted_by_service(self, hello: ChannelFrame) -> None:
        """The laptop's side of a HELLO. Raises InvalidRequestError."""
        if _identity(hello) != self.identity:
            raise InvalidRequestError("The kernel service answered for another bridge.")
        self._resume(hello.acknowledged)

    def _resume(self, acknowledged: int) -> None:
        self._prune(acknowledged)
        self._cursor = self._acknowledged
        self.changed.set()

    def accept(self, frame: ChannelFrame) -> ChannelFrame | None:
        """Take in one frame; returns what has to be passed on: a new, whole message or EXIT.

        Raises InvalidRequestError on a gap, TooLargeError where a message doesn't fit.
        """
        if frame.kind is FrameKind.HELLO:
            raise InvalidRequestError("A second HELLO came on one connection.")
        self._prune(frame.acknowledged)
        if frame.kind is FrameKind.ACK:
            return None
        self.changed.set()
        if frame.sequence <= self.received:
            return None
        if frame.sequence != self.received + 1:
            raise InvalidRequestError("A kernel channel frame is missing.")
        whole = self._assemble(frame)
        self.received = frame.sequence
        return whole

    def _assemble(self, frame: ChannelFrame) -> ChannelFrame | None:
        if frame.slice is Slice.WHOLE:
            if self._pieces:
                raise InvalidRequestError("A message in slices isn't finished.")
            return frame
        size = _size(frame.parts)
        if self._coming + size > MAX_CHANNEL_MESSAGE + MESSAGE_MARGIN or len(self._parts) > MAX_PARTS:
            raise TooLargeError("A message in slices is larger than a kernel's channel carries.")
        if not self.holding.take(size):
            raise TooLargeError("There is no room for this message now.", next_step="Try again.")
        self._coming += size
        self._pieces.append(frame.parts[0])
        for part in frame.parts[1:]:
            self._parts.append(b"".join(self._pieces))
            self._pieces = [part]
        if frame.slice is Slice.FURTHER:
            return None
        parts = (*self._parts, b"".join(self._pieces))
        self._forget_slices()
        return ChannelFrame(frame.kind, frame.channel, frame.sequence, frame.acknowledged, parts)

    def _forget_slices(self) -> None:
        self.holding.give(self._coming)
        self._parts, self._pieces, self._coming = [], [], 0

    def next_frame(self) -> ChannelFrame | None:
        """The next frame to send on this connection, with the present acknowledgement, or None."""
        if self._cursor >= self.last and not self._number():
            return None
        kept = self._numbered[self._cursor - self._acknowledged]
        self._cursor += 1
        self._announced = self.received
        return ChannelFrame(kept.kind, kept.channel, self._cursor, self.received, kept.parts, kept.slice)

    @property
    def patience(self) -> float | None:
        """Seconds until the last piece of a text goes out, if that is all that there is to send; None: nothing is."""
        if not self._waiting or self._cursor < self.last:
            return None
        key, sent = self._streamed
        tail = self._waiting[-1]
        if len(self._waiting) > 1 or tail.piece is None or tail.piece != key or tail.size >= JOINED_BYTES:
            return 0.0
        return max(0.0, sent + STREAM_SECONDS - time.monotonic())

    def _number(self) -> bool:
        """Give the next message its number, or its slices theirs. False where none may go out now."""
        while self._waiting and self._waiting[0].stale:
            self._stale -= 1
            self.holding.give(self._waiting.popleft().size)
        if self.patience != 0.0:
            return False
        waiting = self._waiting.popleft()
        if waiting.replaces is not None and self._replaceable.get(waiting.replaces) is waiting:
            del self._replaceable[waiting.replaces]
        if waiting.piece is not None:
            self._streamed = waiting.piece, time.monotonic()
        self.holding.give(waiting.size)
        for kept in _slices(waiting):
            self.holding.hold(kept.size)
            self._numbered.append(kept)
        return True

    def acknowledgement(self) -> ChannelFrame:
        self._announced = self.received
        return ChannelFrame(FrameKind.ACK, Channel.SHELL, 0, self.received)

    def _prune(self, acknowledged: int) -> None:
        if acknowledged > self.last:
            raise InvalidRequestError("A frame was acknowledged that was never sent.")
        while self._acknowledged < acknowledged:
            kept = self._numbered.popleft()
            self._acknowledged += 1
            self._begun.append(kept)
            if kept.slice is not Slice.FURTHER:
                self.holding.give(sum(slice.size for slice in self._begun))
                self._begun.clear()
        self._cursor = max(self._cursor, self._acknowledged)

    def forget(self) -> None:
        """Give back all that is kept: nobody will come for it."""
        self.holding.give(sum(waiting.size for waiting in self._waiting))
        self.holding.give(sum(kept.size for kept in (*self._numbered, *self._begun)))
        self._acknowledged = self.last
        self._waiting.clear()
        self._numbered.clear()
        self._begun.clear()
        self._replaceable.clear()
        self._forget_slices()


def _slices(waiting: _Waiting) -> list[_Numbered]:
    parts = joined(waiting.parts, waiting.later)
    if sum(len(part) + 4 for part in parts) <= MAX_SLICE:
        return [_Numbered(waiting.kind, waiting.channel, parts, Slice.WHOLE, _size(parts))]
    made: list[tuple[bytes, ...]] = []
    frame: list[bytes] = []
    room = MAX_SLICE
    for part in parts:
        rest = memoryview(part)
        while len(rest) > room - 4:
            cut = max(0, room - 4)
            # Not copied: the memory is free again only when the last slice is, and so it is counted (`_prune`).
            made.append((*frame, rest[:cut]))  # type: ignore[arg-type]
            rest, frame, room = rest[cut:], [], MAX_SLICE
        frame.append(rest)  # type: ignore[arg-type]
        room -= len(rest) + 4
    made.append(tuple(frame))
    slices = [Slice.FURTHER] * (len(made) - 1) + [Slice.LAST]
    return [
        _Numbered(waiting.kind, waiting.channel, frame, slice, _size(frame))
        for frame, slice in zip(made, slices, strict=True)
    ]


def _size(parts: tuple[bytes, ...]) -> int:
    """What keeping a message takes, in bytes."""
    return _OVERHEAD + sum(len(part) + _PART_OVERHEAD for part in parts)


def _identity(hello: ChannelFrame) -> bytes:
    if hello.kind is not FrameKind.HELLO or len(hello.parts) != 1 or len(hello.parts[0]) != LINK_ID_BYTES:
        raise InvalidRequestError("A kernel channel must begin with HELLO and a bridge's 16 bytes.")
    return hello.parts[0]
