"""What is left out when a laptop has been away for so long that its kernel's output no longer fits.

Outputs go; what a front end waits for (replies, status, errors) stays, and a note in the notebook says what is missing.
"""

from __future__ import annotations

import json
import secrets
from datetime import UTC, datetime

from cloister_data.framing import Channel
from cloister_kernel.signing import DELIMITER

OUTPUTS = frozenset({"stream", "display_data", "update_display_data", "execute_result", "comm_msg", "clear_output"})
MAX_HEADER_BYTES = 64 << 10


def message_type(message: tuple[bytes, ...]) -> str:
    """The `msg_type` of a message's header; "" where it has none that can be read."""
    header = message[message.index(DELIMITER) + 2]
    if len(header) > MAX_HEADER_BYTES:
        return ""
    try:
        found = json.loads(header)
    except (ValueError, RecursionError):
        return ""
    kind = found.get("msg_type") if isinstance(found, dict) else None
    return kind if isinstance(kind, str) else ""


class Overflow:
    """Decides, message by message, what a full outbox still takes."""

    def __init__(self) -> None:
        self.dropped = 0
        self._parent = b"{}"

    def admit(self, channel: Channel, message: tuple[bytes, ...], full: bool) -> list[tuple[bytes, ...]]:
        """The messages to post for `message`: none where it is left out; the note first where some were."""
        if full and channel is Channel.IOPUB and message_type(message) in OUTPUTS | {""}:
            self.drop(message)
            return []
        if self.dropped and channel is Channel.IOPUB:
            note = _note(self.dropped, self._parent)
            self.dropped = 0
            return [note, message]
        return [message]

    def drop(self, message: tuple[bytes, ...] | list[bytes]) -> None:
        """Count a message that is left out, and remember which cell it belonged to."""
        self.dropped += 1
        mark = message.index(DELIMITER)
        if len(message[mark + 3]) <= MAX_HEADER_BYTES:
            self._parent = message[mark + 3]


def _note(count: int, parent: bytes) -> tuple[bytes, ...]:
    header = {
        "msg_id": secrets.token_hex(16),
        "msg_type": "stream",
        "username": "cloister",
        "session": "cloister",
        "date": datetime.now(UTC).isoformat(),
        "version": "5.3",
    }
    outputs = "1 output" if count == 1 else f"{count} outputs"
    text = f"[cloister] {outputs} of this kernel didn't fit into what is kept while the connection is slow or down.\n"
    content = {"name": "stderr", "text": text}
    return (b"stream.stderr", DELIMITER, b"", _json(header), parent, b"{}", _json(content))


def _json(value: dict[str, str]) -> bytes:
    return json.dumps(value).encode()
