"""Which of a kernel's outputs may become one, as long as they have not been sent.

Consecutive pieces of one cell's stdout or stderr are joined: front ends show them as one text, and JupyterLab's server
drops outputs above a thousand a second. An update that a later one replaces whole is left out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from cloister_kernel.signing import DELIMITER

MAX_PIECE = 64 << 10
MAX_HEADER_BYTES = 64 << 10
_STREAMS = tuple(b'{"name": "%s", "text": "' % name for name in (b"stdout", b"stderr"))
_END = b'"}'


def message_type(message: tuple[bytes, ...]) -> str:
    """The `msg_type` of a message's header; "" where it has none that can be read."""
    kind = _object(message[message.index(DELIMITER) + 2]).get("msg_type")
    return kind if isinstance(kind, str) else ""


@dataclass(frozen=True, slots=True)
class Piece:
    """A text of a stream; two of one key that follow each other are one. `text` is still in JSON's escapes."""

    key: tuple[bytes, ...]
    text: bytes


def piece(kind: str, message: tuple[bytes, ...]) -> Piece | None:
    """`message` as a piece of a stream; None where it is none, or too large to be worth it."""
    if kind != "stream" or not _small(message):
        return None
    content = message[-1]
    start = next((start for start in _STREAMS if content.startswith(start)), None)
    if start is None or not content.endswith(_END):
        return None
    # Everything but signature, header and text: where it goes, which cell it is of, and its metadata.
    key = (*message[: message.index(DELIMITER)], message[-3], message[-2], start)
    return Piece(key, content[len(start) : -len(_END)])


def joined(message: tuple[bytes, ...], later: list[bytes]) -> tuple[bytes, ...]:
    """`message`, which is a piece, with the texts that came after it."""
    return (*message[:-1], b"".join([message[-1][: -len(_END)], *later, _END])) if later else message


def replaces(kind: str, message: tuple[bytes, ...]) -> tuple[object, ...] | None:
    """A key: of two messages with the same one, the earlier is stale when the later is there. None: none is.

    Safe for `update_display_data` of one cell and one display, which replaces all data of that display; and for the
    state updates of one widget in one cell where both set the same fields and neither has buffers. What a front end
    shows in the end is the same; it never sees the states between, as after a reload.
    """
    mark = message.index(DELIMITER)
    if kind not in ("update_display_data", "comm_msg") or not _small(message):
        return None
    content = _object(message[-1])
    parent = message[mark + 3]
    if kind == "update_display_data":
        transient = content.get("transient")
        display = transient.get("display_id") if isinstance(transient, dict) else None
        return (kind, parent, display) if isinstance(display, str) else None
    data, comm = content.get("data"), content.get("comm_id")
    if not isinstance(data, dict) or not isinstance(comm, str) or set(data) != {"method", "state", "buffer_paths"}:
        return None
    state = data["state"]
    if data["method"] != "update" or data["buffer_paths"] or not isinstance(state, dict):
        return None
    return (kind, parent, comm, *sorted(state))


def _small(message: tuple[bytes, ...]) -> bool:
    """No buffers, and nothing that would be long to look at."""
    return len(message) == message.index(DELIMITER) + 6 and sum(map(len, message)) <= MAX_PIECE


def _object(document: bytes) -> dict[str, object]:
    if len(document) > MAX_HEADER_BYTES:
        return {}
    try:
        found = json.loads(document)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
