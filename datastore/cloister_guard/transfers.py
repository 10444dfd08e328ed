"""Files between laptops and kernels: who may move them, and no byte of one arrives anywhere before its entry is logged.

A file to a kernel is streamed through, and gets its name there after its entry is written. One from a kernel is kept
here, without a name, until it is whole and its entry is written; only then its first byte leaves.
"""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import IO

import anyio.to_thread
from sqlalchemy import select
from sqlalchemy.orm import Session

from cloister_budget.entries import Transferred
from cloister_budget.journal import Journal
from cloister_budget.policy import decide_transfer
from cloister_budget.tables import Dataset
from cloister_data.errors import InvalidRequestError, PolicyRefusedError, StorageError, TooLargeError
from cloister_data.transfers import MAX_TRANSFER_BYTES, TransferRequest, TransferTerms, TransferView
from cloister_guard.access import load_policy
from cloister_guard.charging import Charging
from cloister_guard.identity import Caller
from cloister_guard.kernels import Kernels

AT_ONCE = 8
"""Files that are kept here at the same time, each on the disk of the state."""


class Spool:
    """A whole file that is in the log, without a name: it is gone when it is closed, or this process ends."""

    def __init__(self, file: IO[bytes], size: int, held: AsyncExitStack) -> None:
        self.size = size
        self._file, self._held = file, held

    async def read(self, most: int) -> bytes:
        return await anyio.to_thread.run_sync(self._file.read, most)

    async def close(self) -> None:
        await self._held.aclose()


class Transfers:
    """The files that go to and from the kernels of one guard. Each user moves one after the other."""

    def __init__(self, kernels: Kernels, charging: Charging, journal: Journal, spool: Path) -> None:
        self._kernels, self._charging, self._journal, self._spool = kernels, charging, journal, spool
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._kept = asyncio.Semaphore(AT_ONCE)

    async def terms(self, caller: Caller, kernel: str) -> TransferTerms:
        """What may be moved to and from a kernel of the caller's. Raises as `put` and `get` do."""
        await self._check(caller)
        return await self._kernels.runtime(caller, kernel)

    async def _check(self, caller: Caller) -> None:
        """Raises PolicyRefusedError where an owner's policy forbids the caller to move files."""
        await self._charging.read(lambda session: _admit(session, caller.user))

    async def put(
        self, caller: Caller, request: TransferRequest, size: int, body: AsyncIterator[bytes]
    ) -> TransferView:
        """Take a file of `size` bytes into the kernel's home. Raises CloisterError; then nothing of it remains there.

        Its entry remains where the kernel's home refused it at the very last: the log says more rather than less.
        """
        if size > MAX_TRANSFER_BYTES:
            raise _too_large()
        digest = hashlib.sha256()
        async with self._turn(caller):
            await self._check(caller)

            async def chunks() -> AsyncIterator[bytes]:
                left = size
                async for chunk in body:
                    left -= len(chunk)
                    digest.update(chunk)
                    if left < 0:
                        break
                    yield chunk
                if left:
                    raise InvalidRequestError("The file isn't as long as its request said.", next_step="Send it again.")

            await self._kernels.put(
                caller, request, size, chunks(), lambda: self._log(caller, request, size, digest.hexdigest())
            )
        return TransferView(path=request.path, size=size, sha256=digest.hexdigest())

    async def get(self, caller: Caller, request: TransferRequest) -> Spool:
        """A file of the kernel's home, once it is here whole and in the log. The caller closes it."""
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._turn(caller))
            await self._check(caller)
            await stack.enter_async_context(self._kept)
            digest = hashlib.sha256()
            async with self._kernels.get(caller, request) as (size, chunks):
                try:
                    file = stack.enter_context(tempfile.TemporaryFile(dir=self._spool))  # noqa: SIM115
                    async for chunk in chunks:
                        digest.update(chunk)
                        await anyio.to_thread.run_sync(file.write, chunk)
                    await anyio.to_thread.run_sync(file.seek, 0)
                except OSError as error:
                    raise StorageError(
                        "The cloister has no room to keep the file on its way.",
                        why=f"{error.strerror}.",
                        next_step="Tell the admin. Nothing was moved.",
                    ) from error
            await self._log(caller, request, size, digest.hexdigest())
            return Spool(file, size, stack.pop_all())

    @asynccontextmanager
    async def _turn(self, caller: Caller) -> AsyncIterator[None]:
        async with self._turns[caller.user]:
            yield

    async def _log(self, caller: Caller, request: TransferRequest, size: int, content: str) -> None:
        """Write the entry, where the policies in force still admit it. Raises PolicyRefusedError or StorageError."""

        def work(session: Session) -> None:
            _admit(session, caller.user)
            self._journal.append(
                session,
                Transferred(
                    direction=request.direction,
                    kernel=request.kernel,
                    user=self._journal.ref(session, "user", caller.user),
                    file=self._journal.ref(session, "file", request.path),
                    size=size,
                    content=content,
                ),
            )

        await self._charging.write(work)


def _admit(session: Session, user: str) -> None:
    policies = [load_policy(session, row) for row in session.scalars(select(Dataset))]
    decision = decide_transfer(user, policies)
    if not decision.allowed:
        raise PolicyRefusedError(
            "Files may not be moved between your laptop and your kernels.",
            why=decision.reason,
            next_step="Ask that owner. Nothing was moved.",
        )


def _too_large() -> TooLargeError:
    return TooLargeError(
        "The file is too large.", why=f"A file may have {MAX_TRANSFER_BYTES >> 30} GiB.", next_step="Split it."
    )
