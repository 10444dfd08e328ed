"""What is left out when a kernel's output no longer fits into what is held for a laptop that is away or slow.

Outputs go; what a front end waits for (replies, status, errors) stays, and a note in the notebook says what is missing.
"""

from __future__ import annotations

import json
import secrets
from datetime import UTC, datetime

from cloister_kernel.merging import MAX_HEADER_BYTES
from cloister_kernel.signing import DELIMITER

OUTPUTS = frozenset({"", "stream", "display_data", "update_display_data", "execute_result", "comm_msg", "clear_output"})


class Overflow:
    """Counts what was left out."""

    def __init__(self) -> None:
        self.dropped = 0
        self._parent = b"{}"

    def note(self) -> tuple[bytes, ...] | None:
        """What the notebook has to be told before its kernel's next message; None where nothing was left out."""
        if not self.dropped:
            return None
        note = _note(self.dropped, self._parent)
        self.dropped = 0
        return note

    def drop(self, message: tuple[bytes, ...] | list[bytes]) -> None:
        """Count a message that is left out, and remember which cell it belonged to."""
        self.dropped += 1
        place = message.index(DELIMITER) + 3 if DELIMITER in message else len(message)
        if place < len(message) and len(message[place]) <= MAX_HEADER_BYTES:
            self._parent = message[place]


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
