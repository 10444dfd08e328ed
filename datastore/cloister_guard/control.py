"""The control socket: where the kernel spawner, and nobody else, says whose kernel a socket is for."""

from __future__ import annotations

import asyncio
import os
import socket
import struct

import structlog
from pydantic import TypeAdapter

from cloister_data.control import ControlAnswer, ControlOrder, RegisterKernel
from cloister_data.framing import MAX_JSON_FRAME, pack_frame
from cloister_guard.guard import Guard
from cloister_guard.http.servers import KernelSockets
from cloister_guard.kernels import read_frame
from cloister_guard.release import problem

logger = structlog.get_logger()

_ORDER: TypeAdapter[ControlOrder] = TypeAdapter(ControlOrder)
_UCRED = struct.Struct("3i")


class ControlServer:
    """Listens at `config.control_socket`, mode 0600; the peer must be root or the guard's own uid."""

    def __init__(self, guard: Guard, sockets: KernelSockets) -> None:
        self._guard = guard
        self._sockets = sockets
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        path = self._guard.config.control_socket
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        path.chmod(0o600)
        self._server = await asyncio.start_unix_server(self._serve, sock=listener)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        self._guard.config.control_socket.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            peer = writer.get_extra_info("socket")
            _, uid, _ = _UCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
            if uid not in (0, os.geteuid()):
                logger.warning("control socket refused a peer", uid=uid)
                return
            while True:
                frame = await read_frame(reader, MAX_JSON_FRAME)
                writer.write(pack_frame((await self._obey(frame)).to_json()))
                await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            return
        finally:
            writer.close()

    async def _obey(self, frame: bytes) -> ControlAnswer:
        try:
            order = _ORDER.validate_json(frame)
            if isinstance(order, RegisterKernel):
                caller = self._guard.identity.scientist(order.user, order.sandbox)
                if order.again:
                    # An earlier guard may have ended before it wrote that this kernel started.
                    await self._guard.kernel_log.started_before(caller, order.kernel)
                path = await self._sockets.open(order.kernel, order.uid, caller, order.service)
                return ControlAnswer(socket=str(path))
            await self._sockets.close(order.kernel)
            return ControlAnswer()
        except Exception as error:
            return ControlAnswer(problem=problem(error))
