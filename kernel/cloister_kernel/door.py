"""Where the guard gives the kernel service its orders: one connection for each, as `docs/protocol.md` says.

Each begins with one frame, a KernelOrder, answered by one frame, a KernelAnswer. After "attach" the same connection
carries the kernel's channel frames both ways, after "put" and "get" a file's bytes. The guard has decided whose kernel
it is before it asks.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cloister_data.errors import CloisterError, InternalError, InvalidRequestError
from cloister_data.kernels import (
    KernelAnswer,
    KernelAttach,
    KernelGet,
    KernelMeet,
    KernelOrder,
    KernelPut,
    KernelQuery,
    KernelRuntime,
    KernelSignal,
    KernelStart,
    KernelWipe,
)
from cloister_kernel import transfers
from cloister_kernel.frames import channel_frames, read_frame, write_frame
from cloister_kernel.journal import log
from cloister_kernel.kernels import Kernel, KernelService

ORDER_SECONDS = 10.0

_ORDER: TypeAdapter[Any] = TypeAdapter(KernelOrder)


class Door:
    """The connections from the guard to one service."""

    def __init__(self, service: KernelService) -> None:
        self._service = service

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection from the guard."""
        try:
            if _peer_uid(writer) not in (0, os.geteuid()):
                return
            attached = await self._answer(reader, writer)
            if attached is not None:

                async def send(data: bytes) -> None:
                    await write_frame(writer, data)

                await attached.relay.serve(send, channel_frames(reader))
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError, TimeoutError):
            pass  # the laptop left, or came back on another connection
        except CloisterError as error:
            log("connection refused", error=error.code)
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Kernel | None:
        attached: Kernel | None = None
        answer: KernelAnswer | None
        try:
            async with asyncio.timeout(ORDER_SECONDS):
                frame = await read_frame(reader)
            order = _ORDER.validate_json(frame)
            match order:
                case KernelStart():
                    answer = KernelAnswer(kernel=await self._service.start(order))
                case KernelSignal():
                    answer = KernelAnswer(kernel=await self._service.signal(order))
                case KernelQuery():
                    answer = KernelAnswer(kernels=self._service.list(order))
                case KernelWipe():
                    answer = KernelAnswer(kernels=await self._service.wipe(order))
                case KernelMeet():
                    answer = KernelAnswer(figures=await self._service.meet(order))
                case KernelPut():
                    kernel = self._service.find_running(order.kernel)
                    ready = KernelAnswer(kernel=kernel.view())
                    await transfers.put(await self._service.home_of(kernel, "put"), order, reader, writer, ready)
                    answer = KernelAnswer(kernel=kernel.view())
                case KernelGet():
                    kernel = self._service.find_running(order.kernel)
                    await transfers.get(await self._service.home_of(kernel, "get"), order, writer)
                    answer = None  # the file's bytes were it
                case KernelRuntime():
                    answer = KernelAnswer(runtime=transfers.runtime())
                case KernelAttach():
                    attached = self._service.find(order.kernel)
                    answer = KernelAnswer(kernel=attached.view())
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            raise  # also of somebody who only looked whether the door is open
        except ValidationError:
            answer = KernelAnswer(problem=InvalidRequestError("The kernel service can't read this order.").to_problem())
        except CloisterError as error:
            answer = KernelAnswer(problem=error.to_problem())
        except Exception as error:
            log("order failed", error=type(error).__name__)
            problem = InternalError("The kernel service failed.", next_step="Look into its log.").to_problem()
            answer = KernelAnswer(problem=problem)
        if answer is not None:
            await write_frame(writer, answer.to_json())
        return attached


def _peer_uid(writer: asyncio.StreamWriter) -> int:
    connection: socket.socket = writer.get_extra_info("socket")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def listen(path: Path) -> socket.socket:
    """The guard's door, mode 0600."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen(128)
    listener.setblocking(False)
    return listener
