"""The users' homes: in memory while a kernel has one, encrypted on disk always.

A home is a tmpfs of the service's mount namespace: its size is its quota, and its plaintext is nowhere but in the
machine's memory. All kernels of a user share it. It is saved when the last of them ends, and while they run whenever
something in it has changed, as one file, under a key that the user's laptop holds and sends with each start: neither
who has the disk nor the cloister's admin can open it. A service that is killed loses what changed since the last save.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister_data.crypt import decrypt_stream, encrypt_stream, write_durably
from cloister_data.errors import CloisterError, InvalidRequestError, StorageError, UnavailableError
from cloister_kernel.sandbox.archive import COMPLETE, FINGERPRINT_BYTES
from cloister_kernel.sandbox.layers import LayerError
from cloister_kernel.sandbox.mounter import Mounter
from cloister_kernel.sandbox.process import Confinement, Sandboxed
from cloister_kernel.sandbox.view import HOME, Bound

OWNER = 199_999
"""Who owns the files of every home, as they lie in memory; each sandbox shows them as its own uid's."""
ARCHIVE = "cloister_kernel.sandbox.archive"
BYTES_PER_FILE = 4096
MAX_FILES = 1 << 20
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
        size: int,
        log: Log | None = None,
    ) -> None:
        self.owner = os.geteuid() if confinement.rootless else OWNER
        self._directory, self._vault, self._size = directory, vault, size
        self._confinement, self._mounter = confinement, mounter
        self._log = log or (lambda *_, **__: None)
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
        home.path.mkdir(mode=0o700, exist_ok=True)
        files = min(MAX_FILES, self._size // BYTES_PER_FILE)
        await asyncio.to_thread(self._mounter.home, str(home.path), owner=self.owner, size=self._size, inodes=files)
        home.mounted, home.key, home.fingerprint = True, key, ""
        if key is None or not home.file.exists():
            return
        try:
            await self._restore(home, key)
        except BaseException:
            await self._drop(home)
            raise

    async def _drop(self, home: Home) -> None:
        await asyncio.to_thread(self._mounter.drop, str(home.path))
        home.mounted, home.key = False, None
        with contextlib.suppress(OSError):
            home.path.rmdir()

    def path(self, user: str) -> Path:
        """Where the home of a user who has a kernel is mounted."""
        return self._homes[user].path

    async def release(self, user: str) -> None:
        """One kernel less. After the last one the home is saved, in the background, and leaves memory."""
        home = self._homes[user]
        home.kernels -= 1
        if home.kernels == 0:
            self._in_background(self._leave(home))

    async def _leave(self, home: Home) -> None:
        try:
            await self._save(home)
        except (CloisterError, LayerError, OSError) as error:
            # It stays in memory, and the next round tries again.
            self._log("home not saved", user=home.user, error=type(error).__name__)
            return
        async with home.changing:
            if home.kernels == 0 and home.mounted:
                await self._drop(home)

    async def save_changed(self) -> None:
        """Save what has changed, drop what nobody uses any more. A failure is logged; nothing is dropped then."""
        for home in list(self._homes.values()):
            if home.mounted and home.kernels == 0:
                await self._leave(home)
            elif home.mounted:
                try:
                    await self._save(home)
                except (CloisterError, LayerError, OSError) as error:
                    self._log("home not saved", user=home.user, error=type(error).__name__)

    async def wipe(self, user: str) -> None:
        """Delete the user's home, for good. Raises InvalidRequestError while a kernel of the user runs."""
        home = self._homes.setdefault(user, self._home(user))
        async with home.changing, home.saving:
            if home.kernels:
                raise InvalidRequestError(
                    "Your home is in use.", why="A kernel of yours runs.", next_step="Shut your kernels down first."
                )
            if home.mounted:
                await self._drop(home)
            try:
                await asyncio.to_thread(home.file.unlink, missing_ok=True)
            except OSError as error:
                raise StorageError("The home can't be deleted.", why=f"{error.strerror}.") from error

    async def close(self) -> None:
        """Save every home and let go of it. What can't be saved is lost, and logged."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.save_changed()
        for home in self._homes.values():
            if home.mounted:
                await self._drop(home)

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
            with os.fdopen(read, "rb") as pipe:
                try:
                    running = await self.run(home.path, ARCHIVE, ["save", home.fingerprint], stdout=write)
                finally:
                    os.close(write)
                fingerprint = await asyncio.to_thread(_keep, pipe, home.file, key, home.fingerprint)
            await _finished(running, "saved")
            home.fingerprint = fingerprint

    async def _restore(self, home: Home, key: bytes) -> None:
        read, write = os.pipe()
        with os.fdopen(write, "wb") as pipe:
            try:
                running = await self.run(home.path, ARCHIVE, ["restore"], writable=True, stdin=read)
            finally:
                os.close(read)
            try:
                await asyncio.to_thread(_bring_back, home.file, pipe, key)
            except StorageError as error:
                running.process.kill()
                await running.process.wait()
                running.close()
                raise InvalidRequestError(
                    "Your home in this cloister can't be opened.",
                    why="This computer has another key than the one that it was saved with, or the file was altered.",
                    next_step="Take the key along from your other computer (cloister home key), or wipe the home: "
                    "cloister home wipe.",
                ) from error
        await _finished(running, "unpacked: it may be larger than the quota")

    async def run(
        self,
        home: Path,
        program: str,
        arguments: list[str],
        *,
        writable: bool = False,
        stdin: int = asyncio.subprocess.DEVNULL,
        stdout: int = asyncio.subprocess.DEVNULL,
    ) -> Sandboxed:
        """A module with a `main`, in a sandbox of its own that shows nothing but one home. Raises LayerError."""
        readable = [*self._confinement.view.readable, "/usr", "/etc", "/proc", "/dev"]
        return await self._confinement.start(
            self.owner,
            order={
                "program": program,
                "arguments": arguments,
                "readable": readable if writable else [*readable, "/home"],
                "writable": ["/home", "/tmp"] if writable else ["/tmp"],  # noqa: S108 - the sandbox's own
            },
            environment={"HOME": HOME, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
            bound=(Bound(str(home), HOME, writable),),
            stdin=stdin,
            stdout=stdout,
        )


async def _finished(running: Sandboxed, what: str) -> None:
    code = await running.process.wait()
    running.close()
    if code != 0:
        raise UnavailableError(f"The home can't be {what}.", next_step="Try again; then tell the admin.")


def _keep(pipe: BinaryIO, file: Path, key: bytes, known: str) -> str:
    """The tree's fingerprint; the archive that follows it, where the tree isn't the known one, replaces `file`."""
    fingerprint = pipe.read(FINGERPRINT_BYTES + 1).decode("ascii", errors="replace").strip()
    if len(fingerprint) != FINGERPRINT_BYTES:
        raise UnavailableError("The home can't be read.")

    def write(target: BinaryIO) -> None:
        source = _Watched(pipe)
        encrypt_stream(source, target, key)  # type: ignore[arg-type]
        if source.end != COMPLETE:
            raise OSError(0, "the archive isn't complete")

    if fingerprint != known:
        write_durably(file, write)
    return fingerprint


class _Watched:
    """Remembers the last bytes that went through: an archive that broke off must not replace a whole one."""

    def __init__(self, source: BinaryIO) -> None:
        self._source, self.end = source, b""

    def read(self, size: int) -> bytes:
        data = self._source.read(size)
        self.end = (self.end + data)[-len(COMPLETE) :]
        return data


def _bring_back(file: Path, pipe: BinaryIO, key: bytes) -> None:
    try:
        with file.open("rb") as source:
            decrypt_stream(source, pipe, key)
        pipe.close()
    except BrokenPipeError:
        return  # the sandbox has ended; its status says why


def _key(home_key: str, user: str) -> bytes | None:
    """A key for this user's home alone, whatever else the laptop's key is used for."""
    if not home_key:
        return None
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=_INFO + user.encode()).derive(bytes.fromhex(home_key))
