"""Looking for byte patterns in a process: its memory, its open files, its directories."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

BLOCK = 1 << 20
ZEROS = bytes(BLOCK)


def search_memory(pid: int, patterns: Iterable[bytes]) -> set[bytes]:
    """The patterns that lie anywhere in the readable memory of `pid`. Raises PermissionError where it can't be read."""
    wanted = list(patterns)
    found: set[bytes] = set()
    overlap = max(map(len, wanted)) - 1
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, flags, *rest = line.split()
            backed = len(rest) == 4 and rest[3].startswith("/")
            # A private mapping that can't be written holds its file's own bytes: the libraries.
            if "r" not in flags or (backed and "w" not in flags and "p" in flags) or rest[-1].startswith("[v"):
                continue
            start, end = (int(part, 16) for part in span.split("-"))
            tail = b""
            while start < end:
                try:
                    memory.seek(start)
                    block = memory.read(min(BLOCK, end - start))
                except (OSError, ValueError, OverflowError):
                    break
                if not block:
                    break
                start += len(block)
                if block == ZEROS:  # never touched: most of a large process
                    tail = b""
                    continue
                data = tail + block
                found |= {pattern for pattern in wanted if pattern not in found and pattern in data}
                tail = data[-overlap:]
    return found


def search_files(paths: Iterable[Path], patterns: Iterable[bytes]) -> set[bytes]:
    """The patterns that lie in these files, and in the files below these directories."""
    wanted = list(patterns)
    found: set[bytes] = set()
    for path in paths:
        files = (
            [Path(folder) / name for folder, _, names in os.walk(path) for name in names] if path.is_dir() else [path]
        )
        for file in files:
            try:
                if not file.is_file():
                    continue
                data = file.read_bytes()
            except OSError:
                continue
            found |= {pattern for pattern in wanted if pattern in data}
    return found


def open_files(pid: int) -> list[Path]:
    """The regular files that `pid` holds open, also deleted ones and memory files, as paths that can be read."""
    folder = Path(f"/proc/{pid}/fd")
    return [path for path in folder.iterdir() if path.exists() and path.is_file()]
