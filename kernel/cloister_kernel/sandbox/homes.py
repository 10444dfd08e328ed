"""The users' homes: in memory while a kernel has one, encrypted on disk always.

A home is a tmpfs of the service's mount namespace: its size is its quota, and its plaintext is nowhere but in the
machine's memory. All kernels of a user share it. It is saved when the last of them ends, and while they run whenever
something in it has changed, as one file, under a key that the user's laptop holds and sends with each start: neither
who has the disk nor the cloister's admin can open it. Who has the disk can delete a home or put an earlier state of it
back, unnoticed: nothing here remembers the last one. A service that is killed loses what changed since the last save.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister_data.crypt import decrypt_stream, encrypt_stream, write_durably
from cloister_data.errors import CloisterError, InvalidRequestError, StorageError, UnavailableError
from cloister_kernel.sandbox.archive import COMPLETE, FINGERPRINT_BYTES
from cloister_kernel.sandbox.cgroups import Cgroups, Limits
from cloister_kernel.sandbox.layers import LayerError
from cloister_kernel.sandbox.mounter import Mounter
from cloister_kernel.sandbox.process import Confinement, Sandboxed
from cloister_kernel.sandbox.view import HOME, Bound

OWNER = 199_999
"""Who owns the files of every home, as they lie in memory; each sandbox shows them as its own uid's."""
ARCHIVE, FILES = "cloister_kernel.sandbox.archive", "cloister_kernel.homefiles"
TRANSFERS = 16
"""How many files go into homes or out of them at the same time."""
BYTES_PER_FILE = 4096
MAX_FILES = 1 << 20
HEADERS_BYTES = 1 << 14
"""The most that an archive needs for one file besides its content: its path and a link's target, 4 KiB each, twice."""
HELPER_BYTES, HELPER_PIDS = 1 << 30, 16
HELPERS = 4
"""How many homes are saved or restored at the same time; a slow one keeps nothing else waiting."""
LINGER_SECONDS = 300.0
"""How long a home stays in memory after its last kernel: a kernel that is restarted finds it there."""
HELPER_SECONDS = 600.0
"""How long that may take."""
_INFO = b"cloister/home/1\n"

Log = Callable[..., None]


@dataclass
class Home:
    """One user's. `key`: 32 bytes, or None for a home that isn't kept."""

    user: str
    path: Path
    file: Path
    key: bytes | None = None
    kernels: int = 0
    left_at: float = 0.0  # monotonic: when its last kernel ended
    mounted: bool = False
    fingerprint: str = ""
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)  # mounted or dropped
    saving: asyncio.Lock = field(default_factory=asyncio.Lock)


class Homes:
    """`directory` is where homes get mounted, `vault` where they are kept encrypted, `size` the quota in bytes."""

    def __init__(
        self,
        directory: Path,
        vault: Path,
        confinement: Confinement,
        mounter: Mounter,
        cgroups: Cgroups,
        size: int,
        log: Log,
    ) -> None:
        self.owner = os.geteuid() if confinement.rootless else OWNER
        self._directory, self._vault, self._size = directory, vault, size
        self._files = min(MAX_FILES, size // BYTES_PER_FILE)
        self._confinement, self._mounter, self._cgroups, self._log = confinement, mounter, cgroups, log
        # Of its own: what waits for a hostile home must not keep kernels from starting and ending.
        self._threads = ThreadPoolExecutor(HELPERS, "home")
        self._places = {ARCHIVE: asyncio.Semaphore(HELPERS), FILES: asyncio.Semaphore(TRANSFERS)}
        self._homes: dict[str, Home] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        for path, mode in ((directory, 0o711), (vault, 0o700)):
            path.mkdir(mode=mode, parents=True, exist_ok=True)
            path.chmod(mode)

    async def acquire(self, user: str, home_key: str) -> Path:
        """The user's home, mounted, for one kernel more; from disk where it isn't in memory.

        `home_key` is 64 hex digits, or "" for a home that ends with its last kernel. Raises InvalidRequestError for
        another key than the home's, StorageError where what was saved can't be read.
        """
        home = self._homes.setdefault(user, self._home(user))
        key = _key(home_key, user)
        async with home.changing:
            if home.mounted and home.key != key:
                if home.kernels == 0 and await self._saved(home):
                    await self._drop(home)  # nobody uses it any more
                else:
                    raise InvalidRequestError(
                        "Your kernels in this cloister have a home under another key.",
                        why="Another computer of yours started them, with a key of its own for your home.",
                        next_step="End those kernels, or take the key along: cloister home key.",
                    )
            if not home.mounted:
                await self._mount(home, key)
            home.kernels += 1
        return home.path

    def _home(self, user: str) -> Home:
        name = hashlib.sha256(user.encode()).hexdigest()[:32]
        return Home(user, self._directory / name, self._vault / f"{name}.home")

    async def _mount(self, home: Home, key: bytes | None) -> None:
        """It counts as mounted once it is complete: nothing half restored is ever saved."""
        async with home.saving:
            home.path.mkdir(mode=0o700, exist_ok=True)
            await asyncio.to_thread(
                self._mounter.home, str(home.path), owner=self.owner, size=self._size, inodes=self._files
            )
            try:
                if key is not None and home.file.exists():
                    await self._restore(home, key)
            except BaseException:
                await self._unmount(home)
                raise
            home.mounted, home.key, home.fingerprint = True, key, ""

    async def _drop(self, home: Home) -> None:
        """Not while it is being saved."""
        async with home.saving:
            if home.mounted:
                home.mounted, home.key = False, None
                await self._unmount(home)

    async def _unmount(self, home: Home) -> None:
        await asyncio.to_thread(self._mounter.drop, str(home.path))
        with contextlib.suppress(OSError):
            home.path.rmdir()

    async def release(self, user: str) -> None:
        """One kernel less. After the last one the home is saved, in the background; it leaves memory a little later."""
        home = self._homes[user]
        home.kernels -= 1
        if home.kernels == 0:
            home.left_at = time.monotonic()
            self._in_background(self._leave(home))

    async def _leave(self, home: Home, *, at_once: bool = False) -> None:
        # Where it can't be saved it stays in memory, and the next round tries again.
        if await self._saved(home):
            async with home.changing:
                over = home.key is None or at_once or time.monotonic() - home.left_at >= LINGER_SECONDS
                if home.kernels == 0 and home.mounted and over:
                    await self._drop(home)

    async def save_changed(self) -> None:
        """Save what has changed, drop what nobody uses any more. A failure is logged; nothing is dropped then."""
        mounted = [home for home in self._homes.values() if home.mounted]
        await asyncio.gather(*(self._saved(home) if home.kernels else self._leave(home) for home in mounted))

    async def _saved(self, home: Home) -> bool:
        try:
            await self._save(home)
        except (CloisterError, LayerError, OSError, TimeoutError) as error:
            self._log("home not saved", user=home.user, error=type(error).__name__)
            return False
        return True

    async def try_out(self, attach: Callable[[Path], Awaitable[None]]) -> None:
        """Mount a home, attach it, save it and drop it. Raises OSError, LayerError, CloisterError, TimeoutError."""
        home = self._home("")  # nobody's name
        try:
            await self._mount(home, secrets.token_bytes(32))
            await attach(home.path)
            await self._save(home)
        finally:
            await self._drop(home)
            home.file.unlink(missing_ok=True)

    async def wipe(self, user: str) -> None:
        """Delete the user's home, for good. Raises InvalidRequestError while a kernel of the user runs."""
        home = self._homes.setdefault(user, self._home(user))
        async with home.changing:
            if home.kernels:
                raise InvalidRequestError(
                    "Your home is in use.", why="A kernel of yours runs.", next_step="Shut your kernels down first."
                )
            await self._drop(home)
            try:
                await asyncio.to_thread(home.file.unlink, missing_ok=True)
            except OSError as error:
                raise StorageError("The home can't be deleted.", why=f"{error.strerror}.") from error

    async def close(self) -> None:
        """Save every home and let go of it. What can't be saved is lost, and logged."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(self._leave(home, at_once=True) for home in self._homes.values() if home.mounted))
        for home in self._homes.values():
            with contextlib.suppress(OSError):
                await self._drop(home)
        self._threads.shutdown()

    def _in_background(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _save(self, home: Home) -> None:
        async with home.saving:
            key = home.key
            if key is None or not home.mounted:
                return
            read, write = os.pipe()
            arguments = ["save", home.fingerprint, str(self._size)]
            limit = self._size + self._files * HEADERS_BYTES
            with os.fdopen(read, "rb") as pipe, os.fdopen(write, "wb") as theirs:
                async with self._helper(home, ARCHIVE, arguments, stdout=theirs.fileno()) as running:
                    theirs.close()
                    fingerprint = await self._thread(_keep, pipe, home.file, key, home.fingerprint, limit)
                    if await running.process.wait() != 0:
                        raise UnavailableError("The home can't be saved.")
            home.fingerprint = fingerprint

    async def _restore(self, home: Home, key: bytes) -> None:
        read, write = os.pipe()
        with os.fdopen(read, "rb") as theirs, os.fdopen(write, "wb") as pipe:
            async with self._helper(home, ARCHIVE, ["restore"], stdin=theirs.fileno()) as running:
                theirs.close()
                try:
                    await self._thread(_bring_back, home.file, pipe, key)
                except StorageError as error:
                    raise InvalidRequestError(
                        "Your home in this cloister can't be opened.",
                        why="This computer has another key than the one that it was saved with, or the file was "
                        "altered.",
                        next_step="Take the key along from your other computer (cloister home key), or wipe the home: "
                        "cloister home wipe.",
                    ) from error
                if await running.process.wait() != 0:
                    raise UnavailableError(
                        "The home can't be unpacked.",
                        why="It may be larger than the quota.",
                        next_step="Ask the admin to raise home_mb, or wipe the home: cloister home wipe.",
                    )

    async def at_home(self, user: str, operation: str) -> tuple[Sandboxed, Callable[[], Awaitable[None]]]:
        """`homefiles` in the home of a user who has a kernel, with pipes, and how it is ended. Raises LayerError."""
        pipe = asyncio.subprocess.PIPE
        async with contextlib.AsyncExitStack() as stack:
            helper = self._helper(self._homes[user], FILES, [operation], stdin=pipe, stdout=pipe)
            running = await stack.enter_async_context(helper)
            return running, stack.pop_all().aclose

    async def _thread(self, work: Callable[..., Any], *arguments: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    @contextlib.asynccontextmanager
    async def _helper(
        self,
        home: Home,
        program: str,
        arguments: list[str],
        *,
        stdin: int = asyncio.subprocess.DEVNULL,
        stdout: int = asyncio.subprocess.DEVNULL,
    ) -> AsyncIterator[Sandboxed]:
        """A program in a sandbox and a cgroup of its own that shows nothing but one home. Ended with the context.

        Raises LayerError, and TimeoutError where it takes too long.
        """
        everything = [*self._confinement.view.readable, "/usr", "/etc", "/proc", "/dev"]
        async with self._places[program], asyncio.timeout(HELPER_SECONDS):
            # What is unpacked counts, too.
            cgroup = self._cgroups.make(secrets.token_hex(16), Limits(HELPER_BYTES + self._size, HELPER_PIDS, 1.0))
            running: Sandboxed | None = None
            try:
                running = await self._confinement.start(
                    self.owner,
                    order={
                        "program": program,
                        "arguments": arguments,
                        "readable": everything,
                        # Also to save: what is closed to its owner has to be opened.
                        "writable": ["/home", "/tmp"],  # noqa: S108 - the sandbox's own
                    },
                    # Nothing that Python could start from: the home is there already.
                    environment={"HOME": "/", "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
                    bound=(Bound(str(home.path), HOME, writable=True),),
                    groups=cgroup.procs,
                    stdin=stdin,
                    stdout=stdout,
                )
                yield running
            finally:
                await cgroup.kill()
                if running is not None:
                    await running.process.wait()
                    running.close()
                await cgroup.remove()


def _keep(pipe: BinaryIO, file: Path, key: bytes, known: str, limit: int) -> str:
    """The tree's fingerprint; the archive that follows it, where the tree isn't the known one, replaces `file`."""
    fingerprint = pipe.read(FINGERPRINT_BYTES + 1).decode("ascii", errors="replace").strip()
    if len(fingerprint) != FINGERPRINT_BYTES:
        raise UnavailableError("The home can't be read.")

    def write(target: BinaryIO) -> None:
        source = _Watched(pipe, limit)
        encrypt_stream(source, target, key)  # type: ignore[arg-type]
        if source.end != COMPLETE:
            raise OSError(errno.EPIPE, "the archive isn't complete")

    if fingerprint != known:
        write_durably(file, write)
    return fingerprint


class _Watched:
    """Remembers the last bytes that went through: an archive that broke off must not replace a whole one.

    It lets `limit` bytes through and no more, whatever the sandbox writes: the disk is everybody's.
    """

    def __init__(self, source: BinaryIO, limit: int) -> None:
        self._source, self._left, self.end = source, limit, b""

    def read(self, size: int) -> bytes:
        data = self._source.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise OSError(errno.EFBIG, "the archive is too long")
        self.end = (self.end + data)[-len(COMPLETE) :]
        return data


def _bring_back(file: Path, pipe: BinaryIO, key: bytes) -> None:
    """Raises StorageError, and then what came through isn't to be used; OSError."""
    with file.open("rb") as source, contextlib.suppress(BrokenPipeError):  # the sandbox has ended; its status says why
        try:
            decrypt_stream(source, pipe, key)
        finally:
            pipe.close()


def _key(home_key: str, user: str) -> bytes | None:
    """A key for this user's home alone, whatever else the laptop's key is used for."""
    if not home_key:
        return None
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=_INFO + user.encode()).derive(bytes.fromhex(home_key))
