"""A home as a stream, from inside a sandbox that shows nothing but that home: its content may be hostile.

`save [FINGERPRINT]` writes one line, the tree's fingerprint, and then, unless it is FINGERPRINT, a tar archive to
standard output; `restore` unpacks one from standard input. Standard library only.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import sys
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

HOME = "/home/cloister"
FINGERPRINT_BYTES = 64
"""Hex digits of a SHA-256."""
COMPLETE = b"complete\n"
"""The end of a stream that holds an archive."""


def main(arguments: list[str]) -> int:
    if arguments[0] == "save":
        save(sys.stdout.buffer, HOME, arguments[1] if len(arguments) > 1 else "")
    else:
        restore(sys.stdin.buffer, HOME)
    return 0


def save(target: BinaryIO, home: str, known: str) -> None:
    """Files, directories and symbolic links; sockets, pipes and hard links' sameness aren't kept. Raises OSError."""
    found = sorted(_entries(home))
    digest = hashlib.sha256()
    for path, status in found:
        facts = (os.fsencode(path), status.st_mode, status.st_size, status.st_mtime_ns)
        digest.update(repr(facts).encode())
    fingerprint = digest.hexdigest()
    target.write(fingerprint.encode() + b"\n")
    if fingerprint != known:
        with tarfile.open(fileobj=target, mode="w|", format=tarfile.PAX_FORMAT) as archive:
            for path, status in found:
                _add(archive, home, path, status)
        target.write(COMPLETE)
    target.flush()


def _entries(home: str) -> Iterator[tuple[str, os.stat_result]]:
    """Paths relative to `home`, and what lies there. What can't be looked at (gone, or too deep) is left out."""
    waiting = [""]
    while waiting:
        directory = waiting.pop()
        try:
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
                waiting.append(path)
            if stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
                yield path, status


def _add(archive: tarfile.TarFile, home: str, path: str, status: os.stat_result) -> None:
    entry = tarfile.TarInfo(path)
    entry.mode, entry.mtime = stat.S_IMODE(status.st_mode), int(status.st_mtime)
    whole = os.path.join(home, path)
    try:
        if stat.S_ISDIR(status.st_mode):
            entry.type = tarfile.DIRTYPE
            archive.addfile(entry)
        elif stat.S_ISLNK(status.st_mode):
            entry.type, entry.linkname = tarfile.SYMTYPE, os.readlink(whole)
            archive.addfile(entry)
        else:
            # Never a pipe that took the file's place: opening it would wait forever.
            descriptor = os.open(whole, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(descriptor, "rb") as file:
                entry.size = status.st_size
                archive.addfile(entry, _Exactly(file, entry.size))
    except FileNotFoundError:
        return  # deleted meanwhile


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
        archive.extractall(home, filter="tar")
