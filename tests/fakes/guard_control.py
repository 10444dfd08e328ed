"""A guard's control socket that answers every registration with a socket path, and remembers the orders."""

from __future__ import annotations

import asyncio
from pathlib import Path

from pydantic import TypeAdapter

from cloister_data.control import ControlAnswer, ControlOrder, EndKernel, RegisterKernel
from cloister_data.errors import Problem
from cloister_data.framing import frame_length, pack_frame


class FakeControl:
    """`sockets` is the directory in which each kernel gets one of its own."""

    def __init__(self, path: Path, sockets: Path) -> None:
        self.path, self.sockets = path, sockets
        self.orders: list[RegisterKernel | EndKernel] = []
        self.problem: Problem | None = None
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> FakeControl:
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.readexactly(frame_length(await reader.readexactly(4), 1 << 20))
        order: RegisterKernel | EndKernel = TypeAdapter(ControlOrder).validate_json(data)
        self.orders.append(order)
        if self.problem is not None:
            answer = ControlAnswer(problem=self.problem)
        elif isinstance(order, RegisterKernel):
            directory = self.sockets / order.kernel
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            answer = ControlAnswer(socket=str(directory / "guard.sock"))
        else:
            answer = ControlAnswer()
        writer.write(pack_frame(answer.to_json()))
        await writer.drain()
        writer.close()
