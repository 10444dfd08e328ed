"""A Jupyter message's signature is made and checked where the key is; on the link it is empty.

Messages are ZeroMQ parts: identities, `<IDS|MSG>`, signature, header, parent header, metadata, content, buffers
(the wire protocol of Jupyter messaging, version 5).
"""

from __future__ import annotations

import hashlib
import hmac

from cloister_data.framing import MAX_CHANNEL_FRAME, MAX_PARTS

DELIMITER = b"<IDS|MSG>"


def with_signature(parts: tuple[bytes, ...], key: bytes) -> list[bytes] | None:
    """The message signed anew with `key`, or None if it is malformed.

    HMAC-SHA256 over header, parent header, metadata and content.
    """
    try:
        mark = parts.index(DELIMITER)
    except ValueError:
        return None
    if len(parts) < mark + 6:
        return None
    digest = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts[mark + 2 : mark + 6]:
        digest.update(part)
    return [*parts[: mark + 1], digest.hexdigest().encode(), *parts[mark + 2 :]]


def without_signature(parts: list[bytes]) -> tuple[bytes, ...] | None:
    """The message with an empty signature, or None if it is malformed or too large for one frame."""
    try:
        mark = parts.index(DELIMITER)
    except ValueError:
        return None
    size = sum(len(part) + 4 for part in parts)
    if len(parts) < mark + 6 or len(parts) > MAX_PARTS or size > MAX_CHANNEL_FRAME - 64:
        return None
    return (*parts[: mark + 1], b"", *parts[mark + 2 :])
