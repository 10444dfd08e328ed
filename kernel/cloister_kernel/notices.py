"""What others than the kernel have to say in a notebook, as output of its cells: the bridge, while the kernel can't."""

from __future__ import annotations

import json
import secrets
from datetime import UTC, datetime

from cloister_kernel.signing import DELIMITER

MAX_WAITING = 64
"""Cells that a notice goes to; one that has more of them queued shows it in the first."""
MAX_HEADER = 1 << 16
MAX_PROGRESS = 78
"""Characters of a line of progress."""


def stream(parent: bytes, text: str, session: str, name: str = "stderr", end: str = "\n") -> tuple[bytes, ...]:
    """A message that puts a line of text below the cell whose request has the header `parent`; `{}` is nobody's cell.

    It is the ZeroMQ parts of Jupyter's protocol (version 5) with an empty signature.
    """
    header = {
        "msg_id": secrets.token_hex(16),
        "msg_type": "stream",
        "session": session,
        "username": "cloister",
        "date": datetime.now(UTC).isoformat(),
        "version": "5.3",
    }
    content = {"name": name, "text": text + end}
    return (b"stream", DELIMITER, b"", json.dumps(header).encode(), parent, b"{}", json.dumps(content).encode())


class Notices:
    """Knows which of the notebook's cells wait for the kernel, and makes messages that appear below them."""

    def __init__(self) -> None:
        self._waiting: dict[str, bytes] = {}
        self._last = b"{}"
        self._session = secrets.token_hex(16)

    def asked(self, parts: tuple[bytes, ...]) -> bool:
        """A shell message of the notebook. Whether it wants a cell to be run, which then waits."""
        header = _header(parts, 2)
        name = header.get("msg_id")
        if header.get("msg_type") != "execute_request" or not isinstance(name, str):
            return False
        self._last = parts[parts.index(DELIMITER) + 2]
        if len(self._waiting) < MAX_WAITING:
            self._waiting[name] = self._last
        return True

    def answered(self, parts: tuple[bytes, ...]) -> None:
        """A shell message of the kernel, which may answer a cell."""
        if self._waiting:
            self._waiting.pop(str(_header(parts, 3).get("msg_id")), None)

    def to_all(self, text: str) -> list[tuple[bytes, ...]]:
        """`text` for every cell that waits; where none does, for nobody's cell: JupyterLab shows that in its log."""
        return [self._stream(parent, text) for parent in list(self._waiting.values()) or [b"{}"]]

    def to_last(self, text: str) -> list[tuple[bytes, ...]]:
        """`text` for the cell that was asked last."""
        return [self._stream(parent, text) for parent in list(self._waiting.values())[-1:]]

    def to_one(self, text: str) -> list[tuple[bytes, ...]]:
        """`text` for the cell that runs or waits first; where none does, for the one that was asked last."""
        return [self._stream(next(iter(self._waiting.values()), self._last), text)]

    def progress(self, parent: bytes, text: str) -> tuple[bytes, ...]:
        """`text` for the cell of the header `parent`, in the last one's place; one that ends in a line break stays."""
        if text.endswith("\n"):
            return self._stream(parent, f"\n{text.rstrip()}")
        return stream(parent, f"\r{text[:MAX_PROGRESS].ljust(MAX_PROGRESS)}", self._session, "stdout", end="")

    def _stream(self, parent: bytes, text: str) -> tuple[bytes, ...]:
        return stream(parent, text, self._session)


def shuts_down(parts: tuple[bytes, ...]) -> bool:
    """Whether a notebook's message asks the kernel to end, as Jupyter does before a restart too."""
    return _header(parts, 2).get("msg_type") == "shutdown_request"


def _header(parts: tuple[bytes, ...], place: int) -> dict[str, object]:
    """The header (place 2 after the delimiter) or the parent's (3); empty where it can't be one."""
    try:
        found = json.loads(_bounded(parts[parts.index(DELIMITER) + place]))
    except (ValueError, IndexError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _bounded(part: bytes) -> bytes:
    if len(part) > MAX_HEADER:
        raise ValueError("no header is that long")
    return part
