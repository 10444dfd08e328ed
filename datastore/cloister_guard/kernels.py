"""The guard's side of the kernels: orders to the kernel service, and the splice of a kernel's channel."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from pydantic import ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect

from cloister_data.base import Wire
from cloister_data.errors import NotFoundError, UnavailableError, from_problem
from cloister_data.framing import MAX_CHANNEL_FRAME, MAX_JSON_FRAME, frame_length, pack_frame
from cloister_data.kernels import (
    KernelAnswer,
    KernelAttach,
    KernelFigures,
    KernelGet,
    KernelLaunch,
    KernelList,
    KernelMeet,
    KernelPut,
    KernelQuery,
    KernelRuntime,
    KernelSignal,
    KernelStart,
    KernelView,
    KernelWipe,
)
from cloister_data.transfers import MAX_TRANSFER_FRAME, TransferRequest, TransferTerms
from cloister_guard.identity import Caller

ORDER_SECONDS = 60.0
SUBPROTOCOL = "cloister.kernel.v1"


async def read_frame(reader: asyncio.StreamReader, limit: int) -> bytes:
    """One length-prefixed frame. Raises asyncio.IncompleteReadError at the end, TooLargeError over `limit`."""
    return await reader.readexactly(frame_length(await reader.readexactly(4), limit))


class Kernels:
    """Kernels of users: each request is checked for whose kernel it is before the service hears of it."""

    def __init__(self, service_socket: Path) -> None:
        self._socket = service_socket
        self._name = secrets.token_hex(16)
        self._service = ""
        self.registered = 0
        """So many kernels have a socket to this guard."""
        self.figures: KernelFigures | None = None
        """What the kernel service said when it was met last; None while it doesn't answer."""
        self.services = 0
        """How often a kernel service was met that had not been before: each start of it is one."""

    async def meet(self) -> KernelFigures:
        """Tell the kernel service that this guard is there; it registers the kernels that this guard doesn't know.

        Raises UnavailableError, or what the service answered.
        """
        try:
            self.figures = (await self._order(KernelMeet(guard=self._name))).figures
        except BaseException:
            self.figures = None
            raise
        if self.figures is None:
            raise UnavailableError("The kernel service gave an answer that can't be used.")
        if self.figures.service != self._service:
            self._service = self.figures.service
            self.services += 1
        return self.figures

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            return await asyncio.open_unix_connection(self._socket, limit=MAX_CHANNEL_FRAME)
        except OSError as error:
            raise UnavailableError(
                "The kernel service doesn't answer.",
                why="It is starting, or it has stopped.",
                next_step="Try again in a moment; then tell the admin.",
            ) from error

    async def _order(self, order: Wire) -> KernelAnswer:
        reader, writer = await self._connect()
        try:
            return await self._ask(reader, writer, order)
        finally:
            writer.close()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, order: Wire) -> KernelAnswer:
        writer.write(pack_frame(order.to_json()))
        return await self._read_answer(reader, writer)

    async def _read_answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> KernelAnswer:
        async with _broken_off():
            await writer.drain()
            async with asyncio.timeout(ORDER_SECONDS):
                frame = await read_frame(reader, MAX_JSON_FRAME)
        try:
            answer = KernelAnswer.from_json(frame)
        except ValidationError as error:
            raise UnavailableError(
                "The kernel service gave an answer that can't be read.",
                why="It may be of another version.",
                next_step="Restart the kernel service.",
            ) from error
        if answer.problem is not None:
            raise from_problem(answer.problem)
        return answer

    async def start(self, caller: Caller, launch: KernelLaunch) -> KernelView:
        """Raises TooManyRequestsError where the service has as many kernels as it may."""
        return _view(await self._order(KernelStart(user=caller.user, launch=launch)))

    async def list(self, caller: Caller) -> KernelList:
        answer = await self._order(KernelQuery(user=caller.user))
        return answer.kernels or KernelList(kernels=())

    async def wipe_home(self, caller: Caller) -> KernelList:
        """Delete what is kept of the caller's home. Raises InvalidRequestError while a kernel of theirs runs."""
        return (await self._order(KernelWipe(user=caller.user))).kernels or KernelList(kernels=())

    async def _own(self, caller: Caller, kernel: str) -> None:
        if all(view.kernel != kernel for view in (await self.list(caller)).kernels):
            raise NotFoundError("There is no such kernel of yours.", next_step="Start a new one.")

    async def signal(self, caller: Caller, kernel: str, op: str) -> KernelView:
        """`op` is interrupt, end or state."""
        await self._own(caller, kernel)
        return _view(await self._order(KernelSignal.model_validate({"op": op, "kernel": kernel})))

    async def runtime(self, caller: Caller, kernel: str) -> TransferTerms:
        """What the kernel runs on, as its service says; the kernel itself isn't asked."""
        await self._own(caller, kernel)
        answer = await self._order(KernelRuntime())
        if answer.runtime is None:
            raise _unusable()
        return answer.runtime

    async def put(
        self,
        caller: Caller,
        request: TransferRequest,
        size: int,
        chunks: AsyncIterator[bytes],
        before: Callable[[], Awaitable[None]],
    ) -> None:
        """Hand a file of `size` bytes to the kernel's home; `before` is awaited when all have come, before it shows.

        Where anything raises, `before` too, nothing of the file remains there.
        """
        await self._own(caller, request.kernel)
        reader, writer = await self._connect()
        try:
            await self._ask(reader, writer, KernelPut(kernel=request.kernel, path=request.path, size=size))
            async with _broken_off():
                async for chunk in chunks:
                    for at in range(0, len(chunk), MAX_TRANSFER_FRAME):
                        writer.write(pack_frame(chunk[at : at + MAX_TRANSFER_FRAME]))
                    await writer.drain()
            await before()
            writer.write(pack_frame(b""))
            await self._read_answer(reader, writer)
        finally:
            writer.close()

    @asynccontextmanager
    async def get(self, caller: Caller, request: TransferRequest) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        """(size, the bytes) of a file in the kernel's home. Where they end early, UnavailableError."""
        await self._own(caller, request.kernel)
        reader, writer = await self._connect()

        async def chunks(left: int) -> AsyncIterator[bytes]:
            while left > 0:
                async with _broken_off(), asyncio.timeout(ORDER_SECONDS):
                    chunk = await read_frame(reader, min(left, MAX_TRANSFER_FRAME))
                    left -= len(chunk)
                if not chunk:
                    raise _unusable()
                yield chunk

        try:
            answer = await self._ask(reader, writer, KernelGet(kernel=request.kernel, path=request.path))
            if answer.size is None:
                raise _unusable()
            yield answer.size, chunks(answer.size)
        finally:
            writer.close()

    async def splice(self, caller: Caller, kernel: str, websocket: WebSocket) -> None:
        """Carry the kernel's frames between the laptop and the service, unread, until either side ends."""
        await self._own(caller, kernel)
        reader, writer = await self._connect()
        try:
            await self._ask(reader, writer, KernelAttach(kernel=kernel))
            await websocket.accept(subprotocol=SUBPROTOCOL)
            pumps = {
                asyncio.create_task(_to_service(websocket, writer)),
                asyncio.create_task(_to_laptop(websocket, reader)),
            }
            done, pending = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()
            await asyncio.gather(*done, *pending, return_exceptions=True)
        finally:
            writer.close()
            with contextlib.suppress(RuntimeError, WebSocketDisconnect):
                await websocket.close()


async def _to_service(websocket: WebSocket, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(WebSocketDisconnect, OSError):
        while True:
            message = await websocket.receive()
            if message["type"] != "websocket.receive":
                return
            frame = message.get("bytes")
            if frame is None or len(frame) > MAX_CHANNEL_FRAME:
                return
            writer.write(pack_frame(frame))
            await writer.drain()


async def _to_laptop(websocket: WebSocket, reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(WebSocketDisconnect, OSError, EOFError):
        while True:
            await websocket.send_bytes(await read_frame(reader, MAX_CHANNEL_FRAME))


@asynccontextmanager
async def _broken_off() -> AsyncIterator[None]:
    try:
        yield
    except (OSError, EOFError, TimeoutError) as error:
        raise UnavailableError("The kernel service broke off.", next_step="Try again.") from error


def _view(answer: KernelAnswer) -> KernelView:
    if answer.kernel is None:
        raise _unusable()
    return answer.kernel


def _unusable() -> UnavailableError:
    return UnavailableError("The kernel service gave an answer that can't be used.")
