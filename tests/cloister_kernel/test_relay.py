"""The service's end of a kernel that is hostile, or that prints more than anybody holds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import zmq
import zmq.asyncio
from jupyter_client.session import Session

from cloister_data.framing import MAX_CHANNEL_MESSAGE, Channel, ChannelFrame, FrameKind
from cloister_kernel.holdings import RESERVED_BYTES, Holding, Holdings
from cloister_kernel.link import Link
from cloister_kernel.merging import message_type
from cloister_kernel.relay import KernelRelay
from cloister_kernel.zmtp import SMALL_BYTES, Received, ZmtpSocket

GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x04\x06\x05READY"
BRIDGE = bytes(range(16))


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cl-") as directory:
        yield Path(directory) / "k"


def part(data: bytes, more: bool) -> bytes:
    return bytes([2 | more]) + struct.pack(">Q", len(data)) + data


def conversation(
    place: Path, sent: list[bytes], holding: Holding, greeting: bytes = GREETING + READY
) -> list[Received]:
    """What is received of a kernel that says `sent` and ends."""
    found: list[Received] = []

    async def kernel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            writer.write(greeting)
            for piece in sent:
                writer.write(piece)
                await writer.drain()
        writer.close()

    async def scenario() -> None:
        async with await asyncio.start_unix_server(kernel, place):
            socket = await ZmtpSocket.connect(str(place), identity=b"x")
            async for received in socket.messages(holding.take, holding.give):
                holding.give(received.taken)
                found.append(received)
            socket.close()

    asyncio.run(scenario())
    return found


def test_a_message_is_received_whole(place: Path) -> None:
    holding = Holdings().holding()
    large = bytes(range(256)) * 20_000
    found = conversation(place, [part(b"id", True) + b"\x00\x02hi", part(b"", True) + part(large, False)], holding)
    assert [received.parts for received in found] == [(b"id", b"hi"), (b"", large)]
    assert holding.held == 0


def test_parts_without_end_take_no_memory(place: Path) -> None:
    """libzmq would keep them all: 64 MiB here, and as many as the kernel likes."""
    holding = Holdings(limit=8 << 20).holding()
    most = 0

    def take(size: int) -> bool:
        nonlocal most
        taken = Holding.take(holding, size)
        most = max(most, holding.held)
        return taken

    holding.take = take  # type: ignore[method-assign]
    endless = [part(bytes(1 << 20), True) for _ in range(64)]
    found = conversation(place, [*endless, part(b"end", False), part(b"next", False)], holding)
    assert [(received.whole, received.parts[-1:]) for received in found][1:] == [(True, (b"next",))]
    assert not found[0].whole
    assert most <= 4 << 20
    assert holding.held == 0


def test_a_size_that_is_only_announced_takes_nothing_beyond_the_limits(place: Path) -> None:
    for length in (MAX_CHANNEL_MESSAGE + 1, 1 << 62):
        holding = Holdings().holding()
        assert conversation(place, [b"\x02" + struct.pack(">Q", length) + b"x"], holding) == []
        assert holding.held == 0


def test_a_kernel_that_ends_inside_a_message_leaves_nothing(place: Path) -> None:
    holding = Holdings().holding()
    announced = b"\x02" + struct.pack(">Q", SMALL_BYTES + 5) + b"x"
    assert conversation(place, [part(b"id", True), announced], holding) == []
    assert holding.held == 0


@pytest.mark.parametrize(
    "greeting",
    [b"", b"HTTP/1.1 200 OK\r\n\r\n" * 10, GREETING.replace(b"NULL", b"EVIL") + READY, GREETING + b"\x00\x01x"],
)
def test_what_speaks_no_zmtp_is_no_kernel(place: Path, greeting: bytes) -> None:
    with pytest.raises(OSError):  # noqa: PT011 - whatever it is, the relay goes on without it
        conversation(place, [], Holdings().holding(), greeting)


class Printing:
    """A kernel's iopub socket, and its relay with a bridge that takes what comes when it is asked to."""

    def __init__(self, relay: KernelRelay, socket: zmq.asyncio.Socket) -> None:
        self.relay, self._socket, self._laptop = relay, socket, Link(BRIDGE)
        self._session = Session(key=b"k")
        self._parent = self._session.msg("execute_request", content={})

    async def say(self, kind: str, **content: object) -> None:
        message = self._session.msg(kind, content=content, parent=self._parent)
        await self._socket.send_multipart(self._session.serialize(message, ident=kind.encode()))

    async def fetched(self, last: Callable[[tuple[bytes, ...]], bool]) -> list[tuple[bytes, ...]]:
        """Attach as a laptop, until a message is the `last` one."""
        found: list[tuple[bytes, ...]] = []
        ended = asyncio.Event()
        laptop = self._laptop
        up: asyncio.Queue[bytes] = asyncio.Queue()
        await up.put(laptop.hello().pack())

        async def send(data: bytes) -> None:
            frame = ChannelFrame.unpack(data)
            if frame.kind is FrameKind.HELLO:
                laptop.greeted_by_service(frame)
            elif (whole := laptop.accept(frame)) is not None:
                found.append(whole.parts)
                await up.put(laptop.acknowledgement().pack())
                if last(whole.parts):
                    ended.set()

        async def incoming() -> AsyncIterator[bytes]:
            while True:
                yield await up.get()

        serving = asyncio.create_task(self.relay.serve(send, incoming()))
        async with asyncio.timeout(30):
            await ended.wait()
        serving.cancel()
        await asyncio.wait({serving})
        return found


async def settled(everyone: Holdings) -> int:
    """What is held when it changes no more."""
    before = -1
    while before != everyone.held:
        before = everyone.held
        await asyncio.sleep(0.2)
    return before


@contextlib.asynccontextmanager
async def printing(place: Path, holdings: Holdings) -> AsyncIterator[Printing]:
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.XPUB)
    socket.set_hwm(0)
    socket.bind(f"ipc://{place}")
    relay = KernelRelay(holdings, {Channel.IOPUB: str(place)}, b"k")
    await socket.recv_multipart()
    try:
        yield Printing(relay, socket)
    finally:
        socket.close(linger=0)
        context.term()
        await relay.finish(0, "")
        await relay.close()


def test_above_the_limit_outputs_are_left_out_and_the_rest_stays(place: Path) -> None:
    everyone = Holdings(limit=16 << 20)

    async def scenario() -> list[tuple[bytes, ...]]:
        async with printing(place, everyone) as kernel:
            for number in range(200):
                await kernel.say("display_data", data={"text/plain": f"{number}" + "x" * 300_000})
            await kernel.say("status", execution_state="idle")
            before = await settled(everyone)
            assert 4 << 20 < before <= (8 << 20) + RESERVED_BYTES
            found = await kernel.fetched(lambda parts: message_type(parts) == "status")
            await kernel.say("display_data", data={"text/plain": "there is room again"})
            return found + await kernel.fetched(lambda parts: b"there is room again" in parts[-1])

    kinds = [(message_type(parts), json.loads(parts[-1])) for parts in asyncio.run(scenario())]
    shown = [content for kind, content in kinds if kind == "display_data"]
    notes = [content["text"] for kind, content in kinds if kind == "stream"]
    assert len(shown) > 10
    assert [content["data"]["text/plain"][:3].strip("x") for content in shown[:11]] == [str(at) for at in range(11)]
    (note,) = notes
    assert f"{201 - len(shown)} outputs of this kernel" in note
    assert [kind for kind, _ in kinds[-3:]] == ["stream", "status", "display_data"]
    assert everyone.held == 0


def test_a_kernel_whose_messages_find_no_room_has_to_wait(place: Path) -> None:
    """Replies and status are never left out; so nothing more is read, and the kernel keeps them itself."""
    everyone = Holdings(limit=1 << 20)

    async def scenario() -> int:
        async with printing(place, everyone) as kernel:
            for number in range(300):
                await kernel.say("status", execution_state="busy", number=number, filling="x" * 100_000)
            await kernel.say("status", execution_state="idle")
            before = await settled(everyone)
            assert before < 2 * RESERVED_BYTES + (1 << 20)
            return len(await kernel.fetched(lambda parts: b'"idle"' in parts[-1]))

    assert asyncio.run(scenario()) == 301
    assert everyone.held == 0
