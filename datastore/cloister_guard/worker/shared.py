"""Memory that the guard lends a worker: anonymous files (memfd_create(2)), given by descriptor and never copied.

A worker can't hand one on, for it makes neither sockets nor processes; its end is the end of its access.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Iterator

from cloister_data.errors import UnavailableError

_PIECE = 64 << 20


@contextlib.contextmanager
def lend_bytes(content: bytes | memoryview) -> Iterator[int]:
    """The descriptor of a file that holds `content` and that nobody can change. Raises UnavailableError."""
    with _anonymous("cloister-upload") as descriptor:
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(descriptor, rest[:_PIECE]) :]
            _seal(descriptor, fcntl.F_SEAL_WRITE)
        except OSError as error:
            raise _no_memory(error) from error
        yield descriptor


@contextlib.contextmanager
def lend_room(size: int) -> Iterator[int]:
    """The descriptor of a file of `size` zero bytes, which takes memory where it is written. Raises UnavailableError.

    Its size is fixed: whoever looks at it can't be made to look past its end.
    """
    with _anonymous("cloister-answer") as descriptor:
        try:
            os.ftruncate(descriptor, size)
            _seal(descriptor, 0)
        except OSError as error:
            raise _no_memory(error) from error
        yield descriptor


def view(descriptor: int) -> memoryview:
    """All of a lent file, to be read. It lives as long as the view does."""
    size = os.fstat(descriptor).st_size
    # A private mapping: before Linux 6.7 no other is possible of a file that is sealed against writing.
    return memoryview(mmap.mmap(descriptor, size, mmap.MAP_PRIVATE, mmap.PROT_READ) if size else b"")


def writable(descriptor: int, size: int) -> memoryview:
    """The first `size` bytes of a lent room, to be written: by mapping, because a worker may not write to files."""
    return memoryview(mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE))


@contextlib.contextmanager
def _anonymous(name: str) -> Iterator[int]:
    try:
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise _no_memory(error) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _seal(descriptor: int, more: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL | more)


def _no_memory(error: OSError) -> UnavailableError:
    return UnavailableError(
        "The cloister has no memory for this upload.",
        why=f"{error.strerror}.",
        next_step="Nothing was stored. Try again later, or ask the admin for a larger machine.",
    )
