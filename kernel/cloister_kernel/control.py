"""The spawner's side of the guard's control socket: it alone says whose kernel a socket belongs to."""

from __future__ import annotations

import asyncio
from pathlib import Path

from pydantic import ValidationError

from cloister_data.control import ControlAnswer, EndKernel, RegisterKernel
from cloister_data.errors import TooLargeError, UnavailableError, from_problem
from cloister_data.policy import Sandbox
from cloister_kernel.frames import read_frame, write_frame

ANSWER_SECONDS = 10.0


class ControlClient:
    """One connection per order, so that a guard that restarted is simply met again."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def register(
        self, kernel: str, uid: int, user: str, sandbox: Sandbox, *, service: str, again: bool = False
    ) -> str:
        """The absolute path of the kernel's guard socket. Raises UnavailableError, or what the guard answered."""
        answer = await self._ask(
            RegisterKernel(kernel=kernel, uid=uid, user=user, sandbox=sandbox, service=service, again=again)
        )
        if not answer.socket.startswith("/"):
            raise UnavailableError("The guard registered the kernel without a socket.")
        return answer.socket

    async def end(self, kernel: str) -> None:
        """Tell the guard that the kernel is gone. Raises UnavailableError."""
        await self._ask(EndKernel(kernel=kernel))

    async def _ask(self, order: RegisterKernel | EndKernel) -> ControlAnswer:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                reader, writer = await asyncio.open_unix_connection(self._path)
                try:
                    await write_frame(writer, order.to_json())
                    answer = ControlAnswer.from_json(await read_frame(reader))
                finally:
                    writer.close()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, ValidationError, TooLargeError) as error:
            raise UnavailableError(
                "The guard's control socket doesn't answer.",
                why=type(error).__name__,
                next_step="Look whether cloister serve runs.",
            ) from error
        if answer.problem is not None:
            raise from_problem(answer.problem)
        return answer
