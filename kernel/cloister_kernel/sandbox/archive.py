"""A home as a stream, from inside a sandbox that shows nothing but that home: its content may be hostile.

`save FINGERPRINT BYTES` writes one line, the tree's fingerprint, and then, unless it is FINGERPRINT, a tar archive to
standard output, with at most BYTES of files; `restore` unpacks one from standard input. Standard library only.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import sys
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from typing import BinaryIO

HOME = "/home/cloister"
FINGERPRINT_BYTES = 64
"""Hex digits of a SHA-256."""
COMPLETE = b"complete\n"
"""The end of a stream that holds an archive."""

CHANGED = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP, errno.ENXIO, errno.EINVAL)
"""What an entry fails with that has become something else since it was looked at; the next save sees it."""


def main(arguments: list[str]) -> int:
    if arguments[0] == "save":
        save(sys.stdout.buffer, HOME, arguments[1], int(arguments[2]))
    else:
        restore(sys.stdin.buffer, HOME)
    return 0


def save(target: BinaryIO, home: str, known: str, limit: int) -> None:
    """Files, directories, hard and symbolic links; sockets, pipes and set-id bits aren't kept. Raises OSError.

    A file with holes can claim to be larger than any disk: what doesn't fit into `limit` bytes is left out.
    """
    with _Opened() as opened:
        found = sorted(_entries(home, opened), key=lambda entry: entry[0])
        digest = hashlib.sha256()
        for path, status in found:
            # When it was changed, which nobody can set: not when it was modified.
            facts = (os.fsencode(path), status.st_mode, status.st_size, status.st_ino, status.st_ctime_ns)
            digest.update(repr(facts).encode())
        fingerprint = digest.hexdigest()
        target.write(fingerprint.encode() + b"\n")
        if fingerprint != known:
            with tarfile.open(fileobj=target, mode="w|", format=tarfile.PAX_FORMAT) as archive:
                _add_all(archive, home, found, limit, opened)
            target.write(COMPLETE)
        target.flush()


class _Opened:
    """Files and directories whose owner may not read them: opened for as long as this is entered."""

    def __init__(self) -> None:
        self._before: list[tuple[str, os.stat_result]] = []

    def __enter__(self) -> _Opened:
        return self

    def open(self, path: str, status: os.stat_result) -> None:
        """`status` is its present one. Raises OSError."""
        needed = 0o500 if stat.S_ISDIR(status.st_mode) else 0o400
        if status.st_mode & needed != needed:
            _set_mode(path, status, stat.S_IMODE(status.st_mode) | needed)
            self._before.append((path, status))

    def __exit__(self, *_: object) -> None:
        for path, status in reversed(self._before):
            with suppress(OSError):
                _set_mode(path, status, stat.S_IMODE(status.st_mode))


def _set_mode(path: str, status: os.stat_result, mode: int) -> None:
    """Of what `status` was found for: never of what lies there by now, nor of a link's target. Raises OSError."""
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_ino == status.st_ino:
            os.chmod(f"/proc/self/fd/{descriptor}", mode)
    finally:
        os.close(descriptor)


def _entries(home: str, opened: _Opened) -> Iterator[tuple[str, os.stat_result]]:
    """Paths relative to `home`, and what lies there. What can't be looked at (gone, or too deep) is left out."""
    waiting = [("", os.lstat(home))]
    while waiting:
        directory, own = waiting.pop()
        try:
            opened.open(os.path.join(home, directory), own)
            names = os.listdir(os.path.join(home, directory))
        except OSError:
            continue
        for name in names:
            path = os.path.join(directory, name)
            try:
                status = os.lstat(os.path.join(home, path))
            except OSError:
                continue
            if stat.S_ISDIR(status.st_mode):
                waiting.append((path, status))
            if stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
                yield path, status


def _add_all(
    archive: tarfile.TarFile, home: str, found: list[tuple[str, os.stat_result]], limit: int, opened: _Opened
) -> None:
    links: dict[int, str] = {}  # the files that are in the archive, by their inode
    for path, status in found:
        if stat.S_ISREG(status.st_mode) and status.st_ino not in links:
            if status.st_size > limit:
                continue
            limit -= status.st_size
            with suppress(OSError):
                opened.open(os.path.join(home, path), status)
        _add(archive, home, path, status, links)
        archive.members = []  # type: ignore[attr-defined] # it would remember each


def _add(archive: tarfile.TarFile, home: str, path: str, status: os.stat_result, links: dict[int, str]) -> None:
    """Raises OSError."""
    entry = tarfile.TarInfo(path)
    entry.mode, entry.mtime = stat.S_IMODE(status.st_mode), int(status.st_mtime)
    whole = os.path.join(home, path)
    if stat.S_ISDIR(status.st_mode):
        entry.type = tarfile.DIRTYPE
        archive.addfile(entry)
    elif stat.S_ISLNK(status.st_mode):
        target = _target(whole)
        if target is not None:
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            archive.addfile(entry)
    elif status.st_ino in links:
        entry.type, entry.linkname = tarfile.LNKTYPE, links[status.st_ino]
        archive.addfile(entry)
    else:
        descriptor = _readable(whole)
        if descriptor is None:
            return
        with os.fdopen(descriptor, "rb") as file:
            entry.size = status.st_size
            archive.addfile(entry, _Exactly(file, entry.size))
        links[status.st_ino] = path


def _target(link: str) -> str | None:
    """None where it isn't a link any more."""
    try:
        return os.readlink(link)
    except OSError as error:
        if error.errno in CHANGED:
            return None
        raise


def _readable(file: str) -> int | None:
    """A descriptor; None where it isn't a file any more. Raises OSError."""
    try:
        # Never a pipe that took the file's place: opening it would wait forever.
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in CHANGED:
            return None
        raise
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    return None


class _Exactly(io.RawIOBase):
    """`size` bytes of a file that may be written to at the same time: cut, or filled up with zeros."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, size

    def read(self, size: int = -1) -> bytes:
        wanted = self._left if size < 0 else min(size, self._left)
        data = self._file.read(wanted)
        self._left -= wanted
        return data + bytes(wanted - len(data))


def restore(source: BinaryIO, home: str) -> None:
    """Raises OSError, tarfile.TarError."""
    with tarfile.open(fileobj=source, mode="r|") as archive:
        # Keeps paths below `home`, and takes set-id bits away.
        archive.extractall(home, filter="tar")
