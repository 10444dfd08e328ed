"""One entry of the audit log for each kernel that starts, whatever becomes of the guard meanwhile."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloister_budget.entries import KernelStarted
from cloister_budget.journal import Journal
from cloister_budget.tables import Leaf
from cloister_data.policy import Sandbox
from cloister_guard.charging import Charging
from cloister_guard.identity import Caller


class KernelLog:
    def __init__(self, charging: Charging, journal: Journal) -> None:
        self._charging, self._journal = charging, journal
        self._written: set[str] = set()

    async def started(self, caller: Caller, kernel: str, sandbox: Sandbox) -> None:
        """Write that a kernel has started. Raises StorageError; then it must not go on."""
        if kernel in self._written:
            return  # it was met again in the same moment
        # Before the transaction: writes follow one another, and the second must know of the first.
        self._written.add(kernel)
        try:
            await self._charging.write(lambda session: self._append(session, caller, kernel, sandbox))
        except BaseException:
            self._written.discard(kernel)
            raise

    async def started_before(self, caller: Caller, kernel: str) -> None:
        """Write that a kernel has started which an earlier guard knew, unless that guard did. Raises StorageError."""
        if kernel in self._written:
            return
        if await self._charging.read(lambda session: _is_written(session, kernel)):
            self._written.add(kernel)
            return
        if caller.sandbox is None:
            raise ValueError("a kernel's caller has a sandbox")
        await self.started(caller, kernel, caller.sandbox)

    def _append(self, session: Session, caller: Caller, kernel: str, sandbox: Sandbox) -> None:
        user = self._journal.ref(session, "user", caller.user)
        self._journal.append(session, KernelStarted(kernel=kernel, user=user, sandbox=sandbox))


def _is_written(session: Session, kernel: str) -> bool:
    """Where the database lies about it, the log holds the kernel twice or lacks it; no balance depends on that."""
    mark = f'"kernel":"{kernel}"'.encode()
    kernels = select(Leaf.payload).where(Leaf.kind == "kernel").order_by(Leaf.index.desc())
    return any(mark in payload for payload in session.scalars(kernels.execution_options(yield_per=500)))
