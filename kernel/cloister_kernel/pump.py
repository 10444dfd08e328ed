"""Carry a link's frames over one connection, until either side breaks it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from cloister_data.framing import ChannelFrame
from cloister_kernel.link import Link

ACK_EVERY_FRAMES = 64
ACK_AFTER_SECONDS = 0.1

Send = Callable[[bytes], Awaitable[None]]
Deliver = Callable[[ChannelFrame], Awaitable[None]]


async def carry(link: Link, send: Send, incoming: AsyncIterator[bytes], deliver: Deliver) -> None:
    """Both directions at once; the HELLO frames have been exchanged. Returns when `incoming` ends.

    `deliver` gets each new message or EXIT once, in order. Raises what `send`, `incoming` or `deliver` raise, and
    InvalidRequestError for a frame that breaks the protocol: the caller closes the connection, nothing is lost.
    """
    writer = asyncio.create_task(_write(link, send))
    reader = asyncio.create_task(_read(link, incoming, deliver))
    try:
        await asyncio.wait({writer, reader}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (writer, reader):
            task.cancel()
        results = await asyncio.gather(writer, reader, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
            raise result


async def _read(link: Link, incoming: AsyncIterator[bytes], deliver: Deliver) -> None:
    async for data in incoming:
        frame = link.accept(ChannelFrame.unpack(data))
        if frame is not None:
            await deliver(frame)


async def _write(link: Link, send: Send) -> None:
    while True:
        link.changed.clear()
        frame = link.next_frame()
        if frame is not None:
            await send(frame.pack())
        elif link.owed >= ACK_EVERY_FRAMES:
            await send(link.acknowledgement().pack())
        else:
            # A little patience: most acknowledgements ride on an answer, and a text's pieces may go together.
            limits = [limit for limit in (link.patience, ACK_AFTER_SECONDS if link.owed else None) if limit is not None]
            try:
                async with asyncio.timeout(min(limits, default=None)):
                    await link.changed.wait()
            except TimeoutError:
                if link.owed and link.patience is None:
                    await send(link.acknowledgement().pack())
