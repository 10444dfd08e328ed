"""The kernel service's part of a file's way: between the guard's connection and a kernel's home.

The home is the kernel's, so the service itself touches nothing in it: `homefiles.py` does, as the kernel's uid.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import platform
import sys

from cloister_data.errors import (
    CloisterError,
    InvalidRequestError,
    NotFoundError,
    StorageError,
    TooLargeError,
    UnavailableError,
)
from cloister_data.kernels import KernelAnswer, KernelGet, KernelPut
from cloister_data.transfers import MAX_TRANSFER_BYTES, MAX_TRANSFER_FRAME, TransferTerms
from cloister_kernel.frames import read_frame, write_frame
from cloister_kernel.homefiles import COMMIT
from cloister_kernel.spawner import HomeProcess

STALLED_SECONDS = 60.0
"""Longest silence of either side: a kernel may stop what runs under its uid."""
MAX_LINE = 4096


def runtime() -> TransferTerms:
    """What the kernels run on: the interpreter that runs this service."""
    library, glibc = platform.libc_ver()
    return TransferTerms(
        max_bytes=MAX_TRANSFER_BYTES,
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        machine=platform.machine().lower(),
        glibc=glibc if library == "glibc" else "",
    )


def _begin(at_home: HomeProcess, path: str, size: int) -> None:
    # Not in the arguments: every user of the machine can read those.
    head = {"home": at_home.home, "uid": at_home.uid, "path": path, "size": size}
    at_home.into.write(json.dumps(head).encode() + b"\n")


async def put(
    at_home: HomeProcess,
    order: KernelPut,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    ready: KernelAnswer,
) -> None:
    """Answer `ready` once the file can be written, then take its frames. Raises CloisterError; nothing remains then."""
    try:
        _begin(at_home, order.path, order.size)
        await _told(at_home, order.path)
        await write_frame(writer, ready.to_json())
        left = order.size
        async with asyncio.timeout(STALLED_SECONDS) as patience:
            while chunk := await read_frame(reader, MAX_TRANSFER_FRAME):
                left -= len(chunk)
                if left < 0:
                    raise InvalidRequestError("A file was longer than announced.")
                at_home.into.write(chunk)
                with contextlib.suppress(ConnectionError):  # it has ended: what it said about that is read below
                    await at_home.into.drain()
                patience.reschedule(asyncio.get_running_loop().time() + STALLED_SECONDS)
        if left:
            raise InvalidRequestError("A file was shorter than announced.")
        at_home.into.write(COMMIT)
        await _told(at_home, order.path)
    finally:
        await _end(at_home)


async def get(at_home: HomeProcess, order: KernelGet, writer: asyncio.StreamWriter) -> None:
    """Answer the file's size, then its bytes. Raises CloisterError before the answer; after it the connection ends."""
    try:
        _begin(at_home, order.path, MAX_TRANSFER_BYTES)
        size = left = await _told(at_home, order.path)
        await write_frame(writer, KernelAnswer(size=size).to_json())
        async with asyncio.timeout(STALLED_SECONDS) as patience:
            while left:
                chunk = await at_home.output.read(min(left, MAX_TRANSFER_FRAME))
                if not chunk:
                    raise ConnectionResetError("the file became shorter, or its reader was killed")
                left -= len(chunk)
                await write_frame(writer, chunk)
                patience.reschedule(asyncio.get_running_loop().time() + STALLED_SECONDS)
    finally:
        await _end(at_home)


async def _told(at_home: HomeProcess, path: str) -> int:
    """The size that the process says. Raises what it says otherwise; its words are believed by nobody."""
    try:
        async with asyncio.timeout(STALLED_SECONDS):
            line = await at_home.output.readline()
        told = json.loads(line[:MAX_LINE])
        size = told.get("size")
        if isinstance(size, int) and not isinstance(size, bool) and 0 <= size <= MAX_TRANSFER_BYTES:
            return size
        error = told.get("error")
    except (ValueError, AttributeError, TimeoutError, ConnectionError):
        error = None
    raise _refusal(error, path)


def _refusal(word: object, path: str) -> CloisterError:
    shown = repr(path)
    match word:
        case "not-found":
            return NotFoundError(f"There is no {shown} in the kernel's home.", next_step="Check the path: %ls there.")
        case "no-directory":
            return InvalidRequestError(
                f"The way to {shown} in the kernel's home leads over something that is no directory.",
                why="Links aren't followed.",
            )
        case "not-a-file":
            return InvalidRequestError(
                f"{shown} in the kernel's home is no ordinary file.",
                why="Directories, links, pipes and devices aren't moved.",
                next_step="Give a file's path. A directory: pack it with shutil.make_archive first.",
            )
        case "no-access":
            return InvalidRequestError(f"{shown} in the kernel's home may not be opened.", why="By its own mode.")
        case "too-large":
            return TooLargeError(
                f"{shown} is too large.", why=f"A file may have {MAX_TRANSFER_BYTES >> 30} GiB.", next_step="Split it."
            )
        case "disk-full":
            return StorageError(
                f"There is no room for {shown} in the kernel's home.", next_step="Delete what isn't needed there."
            )
        case "bad-path":
            return InvalidRequestError(f"{shown} can't be a path in the kernel's home.")
    return UnavailableError(
        f"{shown} can't be moved.", why="What does it in the kernel's home was stopped.", next_step="Try again."
    )


async def _end(at_home: HomeProcess) -> None:
    """Let it see that nobody writes any more, so that it takes away what is half written; then see that it ends."""
    at_home.into.close()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(2):
            while await at_home.output.read(MAX_TRANSFER_FRAME):  # a full pipe would keep it from ending
                pass
            await at_home.process.wait()
    await at_home.release()
