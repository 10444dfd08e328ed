"""Length-prefixed frames over asyncio streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from cloister_data.framing import MAX_CHANNEL_FRAME, MAX_JSON_FRAME, frame_length, frame_prefix, pack_frame

SMALL_BYTES = 16 << 10


async def read_frame(reader: asyncio.StreamReader, limit: int = MAX_JSON_FRAME) -> bytes:
    """One frame. Raises asyncio.IncompleteReadError at the end of the stream, TooLargeError above `limit` bytes."""
    return await reader.readexactly(frame_length(await reader.readexactly(4), limit))


async def write_frame(writer: asyncio.StreamWriter, payload: bytes) -> None:
    if len(payload) < SMALL_BYTES:
        writer.write(pack_frame(payload))
    else:  # not copied once more
        writer.write(frame_prefix(payload))
        writer.write(payload)
    await writer.drain()


async def channel_frames(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The frames of a kernel channel until the other side closes it between two frames or inside one."""
    while True:
        try:
            yield await read_frame(reader, MAX_CHANNEL_FRAME)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
