"""On the laptop: the lines of a notebook that the laptop carries out itself, in their turn among its cells.

Only what local clients send, signed with the local key, comes here: a kernel's messages never do, so nothing that it
says can start an errand. What a line may name is decided by `cloister.errands` alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from cloister.errands import METADATA, Outcome, errand_line
from cloister_data.errors import InternalError, InvalidRequestError
from cloister_kernel.signing import DELIMITER

MAX_REQUEST = 1 << 16
"""Bytes of a cell's header, metadata and content that may be an errand: a line is short."""
MAX_OPEN = 4096
PATIENCE_SECONDS = 3.0
"""How long a cancelled errand may take to notice it; then the notebook goes on, and it ends when it does."""

CarryOut = Callable[[str, Callable[[str], None], threading.Event], Outcome]
"""(line, show, cancelled): does what the line says, in a thread of its own. `show` takes a line of progress."""
Show = Callable[[bytes, str], Awaitable[None]]
"""(the cell's header, text): puts the text below that cell."""


class Errands:
    """Takes each shell message before it leaves for the kernel, and lets it pass: an errand once it is done."""

    def __init__(self, carry_out: CarryOut | None, show: Show) -> None:
        self._carry_out, self._show = carry_out, show
        self._open: dict[str, bool] = {}  # cells that the kernel hasn't answered: whether their failing stops the next
        self._stopped = False
        self._settled = asyncio.Event()
        self._cancelled: threading.Event | None = None  # for the errand's thread
        self._interrupted = asyncio.Event()  # the same, for the loop
        self._moving = False

    async def in_turn(self, parts: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """The message to send on. An errand waits for the cells before it, is carried out, and gets its outcome."""
        if self._carry_out is None:
            return parts
        mark = parts.index(DELIMITER)
        header, metadata, content = _json(parts[mark + 2]), _json(parts[mark + 4]), _json(parts[mark + 5])
        name = header.get("msg_id")
        if header.get("msg_type") != "execute_request" or not isinstance(name, str):
            return parts
        line = errand_line(content.get("code"))
        if line is not None:
            outcome = await self._carry(self._carry_out, line, parts[mark + 2])
            metadata[METADATA] = outcome.model_dump(mode="json")
            parts = (*parts[: mark + 4], json.dumps(metadata).encode(), *parts[mark + 5 :])
        if len(self._open) < MAX_OPEN:
            self._open[name] = content.get("stop_on_error", True) is not False
        return parts

    def answered(self, parts: tuple[bytes, ...]) -> None:
        """A shell message of the kernel. What it says can only bring an errand's turn, or end it."""
        if not self._open:
            return
        mark = parts.index(DELIMITER)
        stops = self._open.pop(str(_json(parts[mark + 3]).get("msg_id")), None)
        if stops and _json(parts[mark + 5]).get("status") in ("error", "aborted"):
            self._stopped = True
        if not self._open:
            self._settled.set()

    def cancel(self) -> bool:
        """Interrupt the errand that waits or runs; True where it runs, so that the kernel is idle. In the loop."""
        if self._cancelled is None:
            return False
        self._cancelled.set()
        self._interrupted.set()
        self._settled.set()
        return self._moving

    async def _carry(self, carry_out: CarryOut, line: str, header: bytes) -> Outcome:
        cancelled = self._cancelled = threading.Event()
        self._interrupted.clear()
        self._stopped = False
        kind = _kind(line)
        try:
            while self._open and not self._interrupted.is_set():
                self._settled.clear()
                await self._settled.wait()
            if self._interrupted.is_set():
                return Outcome(kind=kind, interrupted=True)
            if self._stopped:
                error = InvalidRequestError("Nothing was moved.", why="A cell before this one failed.")
                return Outcome(kind=kind, problem=error.to_problem())
            self._moving = True
            return await self._run(carry_out, line, header, cancelled) or Outcome(kind=kind, interrupted=True)
        finally:
            cancelled.set()
            self._cancelled, self._moving = None, False

    async def _run(self, carry_out: CarryOut, line: str, header: bytes, cancelled: threading.Event) -> Outcome | None:
        """In a thread that nobody waits for at the end of the process: the network may keep it for minutes."""
        loop, kind = asyncio.get_running_loop(), _kind(line)
        done: asyncio.Future[Outcome] = loop.create_future()
        shown: set[asyncio.Task[None]] = set()

        def show(text: str) -> None:
            def begin() -> None:
                task = loop.create_task(_awaited(self._show(header, text)))
                shown.add(task)
                task.add_done_callback(shown.discard)

            _from_thread(loop, begin)

        def work() -> None:
            try:
                outcome = carry_out(line, show, cancelled)
            except Exception as error:  # the notebook must go on
                failed = InternalError("Your laptop failed to move the file.", why=f"{type(error).__name__}.")
                outcome = Outcome(kind=kind, problem=failed.to_problem())
            _from_thread(loop, lambda: None if done.done() else done.set_result(outcome))

        threading.Thread(target=work, name="cloister-errand", daemon=True).start()
        interrupted = loop.create_task(_awaited(self._interrupted.wait()))
        try:
            either: set[asyncio.Future[Any]] = {done, interrupted}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                await asyncio.wait({done}, timeout=PATIENCE_SECONDS)
            if shown:
                await asyncio.wait(shown)
            return done.result() if done.done() else None
        finally:
            interrupted.cancel()


def _kind(line: str) -> Any:
    return line.split()[1]


async def _awaited(work: Awaitable[object]) -> None:
    await work


def _from_thread(loop: asyncio.AbstractEventLoop, work: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(work)


def _json(part: bytes) -> dict[str, Any]:
    """Empty where it is too large for an errand's, or no JSON object."""
    if len(part) > MAX_REQUEST:
        return {}
    try:
        found = json.loads(part)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
