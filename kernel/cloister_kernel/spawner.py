"""What the kernel service asks of whatever starts and ends kernels for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from cloister_data.framing import Channel
from cloister_data.kernels import KernelLaunch
from cloister_data.policy import Sandbox


@dataclass(frozen=True)
class Prepared:
    """A kernel that is nobody's yet. `kernel` is its id; `uid` has no other process."""

    kernel: str
    uid: int
    warm: bool = False


@dataclass
class Started:
    """A user's kernel, and what its relay needs: the key of its messages, and where its sockets are.

    Attributes:
        process: ends when the kernel does.
        guard_socket: where the guard listens for it; it may see that under another path.
    """

    kernel: str
    uid: int
    user: str
    sandbox: Sandbox
    process: asyncio.subprocess.Process
    key: bytes
    paths: dict[Channel, str]
    guard_socket: str


HomeOperation = Literal["put", "get"]


@dataclass(frozen=True)
class HomeProcess:
    """`homefiles.py` at work in a kernel's home: what it is fed, and what it says.

    `home` is the home's path as that process sees it; `uid` is whom it has to become first, or None. `release` ends
    it, where it hasn't ended.
    """

    process: asyncio.subprocess.Process
    into: asyncio.StreamWriter
    output: asyncio.StreamReader
    home: str
    uid: int | None
    release: Callable[[], Awaitable[None]]


class Spawner(Protocol):
    """Makes kernels in two steps, so that the guard knows whose kernel it is before a line of its user's runs."""

    sandbox: Sandbox

    async def prepare(self, *, warm: bool = False) -> Prepared:
        """A kernel that nobody has. A warm one is complete, with the usual imports done. Raises CloisterError."""
        ...

    def ready(self, prepared: Prepared) -> bool:
        """Whether a kernel that waits still can be given to somebody."""
        ...

    async def discard(self, prepared: Prepared) -> None:
        """End a kernel that nobody gets."""
        ...

    async def assign(self, prepared: Prepared, user: str, guard_socket: str, launch: KernelLaunch) -> Started:
        """Give it to a user, for good. Raises CloisterError; then nothing of it is left."""
        ...

    async def home_process(self, started: Started, operation: HomeOperation) -> HomeProcess:
        """Start `homefiles.py` where it reaches this kernel's home and nothing else of worth. Raises CloisterError."""
        ...

    def interrupt(self, started: Started) -> None:
        """As Ctrl-C in a terminal does: to the kernel and what it started."""
        ...

    def exit_code(self, code: int) -> int:
        """The kernel's own exit code, from that of `process`; a negative one is a signal."""
        ...

    async def end(self, started: Started) -> None:
        """Kill the kernel and everything that it left. Raises UnavailableError where something survives."""
        ...

    async def wipe(self, user: str) -> None:
        """Delete what is kept of the user's home. Raises InvalidRequestError while a kernel of the user runs."""
        ...

    async def save(self) -> None:
        """Keep what has changed in the homes."""
        ...

    async def recover(self) -> None:
        """Kill and delete what an earlier kernel service left, if it was killed itself. To be called first."""
        ...

    async def close(self) -> None:
        """Every kernel has ended: let go of the rest."""
        ...
