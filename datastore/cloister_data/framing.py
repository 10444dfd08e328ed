"""Bytes between processes: length-prefixed frames, bodies with a JSON head, and the kernel channel's messages.

`docs/protocol.md` gives the same layouts in words, with golden vectors. Integers are big-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from cloister_data.errors import InvalidRequestError, TooLargeError

MAX_JSON_FRAME = 1 << 20
MAX_CHANNEL_MESSAGE = 256 << 20
"""One Jupyter message, all its parts together."""
MAX_SLICE = 256 << 10
"""Above this size a message travels in slices: none holds up a connection, and one that breaks repeats little."""
MAX_CHANNEL_FRAME = 2 * MAX_SLICE
MAX_HEAD = 8 << 20
MAX_PARTS = 4096

_LENGTH = struct.Struct(">I")
_CHANNEL_HEADER = struct.Struct(">BBBBQQ")
CHANNEL_VERSION = 1


def pack_frame(payload: bytes) -> bytes:
    """u32 length, then the payload."""
    return _LENGTH.pack(len(payload)) + payload


def frame_prefix(payload: bytes) -> bytes:
    """The u32 length alone."""
    return _LENGTH.pack(len(payload))


def frame_length(prefix: bytes, limit: int) -> int:
    """The length that a 4-byte prefix announces. Raises TooLargeError above `limit`, before anything is read."""
    (length,) = _LENGTH.unpack(prefix)
    if length > limit:
        raise TooLargeError(f"A frame of {length} bytes was announced.", why=f"The limit here is {limit} bytes.")
    return int(length)


def pack_body(head: bytes, blob: bytes) -> bytes:
    """A request body with a JSON head: u32 length of the head, the head, the rest."""
    return _LENGTH.pack(len(head)) + head + blob


def unpack_body(body: bytes) -> tuple[bytes, memoryview]:
    """(head, rest) of `pack_body`. Raises InvalidRequestError or TooLargeError."""
    if len(body) < 4:
        raise InvalidRequestError("The body is shorter than its own header.")
    length = frame_length(body[:4], MAX_HEAD)
    if len(body) < 4 + length:
        raise InvalidRequestError("The body ends inside its head.")
    return body[4 : 4 + length], memoryview(body)[4 + length :]


class FrameKind(IntEnum):
    """What a frame of the kernel channel is. HELLO opens a connection, also a resumed one."""

    HELLO = 0
    DATA = 1
    ACK = 2
    EXIT = 3


class Slice(IntEnum):
    """Whether a DATA frame is a whole message, or a slice whose last part goes on in the next frame's first part, or a
    message's last slice. Slices of one message follow each other; the first is a FURTHER, too.
    """

    WHOLE = 0
    FURTHER = 1
    LAST = 2


class Channel(IntEnum):
    SHELL = 0
    IOPUB = 1
    STDIN = 2
    CONTROL = 3


@dataclass(frozen=True)
class ChannelFrame:
    """One frame of the kernel channel.

    `sequence` counts this direction's DATA and EXIT frames from 1 (0 on HELLO and ACK); `acknowledged` is the highest
    sequence number that the sender has received from the other side without a gap. `parts` are the Jupyter message's
    ZeroMQ parts with an empty signature, or some of them; for EXIT the exit code in decimal, and the reason as text.
    """

    kind: FrameKind
    channel: Channel
    sequence: int
    acknowledged: int
    parts: tuple[bytes, ...] = ()
    slice: Slice = Slice.WHOLE

    def pack(self) -> bytes:
        head = _CHANNEL_HEADER.pack(
            CHANNEL_VERSION, self.kind, self.channel, self.slice, self.sequence, self.acknowledged
        )
        pieces = [head, _LENGTH.pack(len(self.parts))]
        for part in self.parts:
            pieces += (_LENGTH.pack(len(part)), part)
        return b"".join(pieces)

    @classmethod
    def unpack(cls, data: bytes) -> ChannelFrame:
        """Raises InvalidRequestError for anything but one whole frame."""
        try:
            version, kind, channel, slice, sequence, acknowledged = _CHANNEL_HEADER.unpack_from(data)
            (count,) = _LENGTH.unpack_from(data, _CHANNEL_HEADER.size)
            if version != CHANNEL_VERSION or count > MAX_PARTS:
                raise InvalidRequestError("A kernel channel frame has a header of another version.")
            offset = _CHANNEL_HEADER.size + _LENGTH.size
            parts = []
            for _ in range(count):
                (length,) = _LENGTH.unpack_from(data, offset)
                offset += _LENGTH.size
                if offset + length > len(data):
                    raise InvalidRequestError("A kernel channel frame ends inside a part.")
                parts.append(data[offset : offset + length])
                offset += length
            if offset != len(data):
                raise InvalidRequestError("A kernel channel frame has bytes after its end.")
            if slice != Slice.WHOLE and (kind != FrameKind.DATA or not parts):
                raise InvalidRequestError("A kernel channel frame is a slice of nothing.")
            return cls(FrameKind(kind), Channel(channel), sequence, acknowledged, tuple(parts), Slice(slice))
        except (struct.error, ValueError) as error:
            raise InvalidRequestError("A kernel channel frame can't be read.") from error
