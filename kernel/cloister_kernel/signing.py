"""A Jupyter message's signature is made and checked where the key is; on the link it is empty.

Messages are ZeroMQ parts: identities, `<IDS|MSG>`, signature, header, parent header, metadata, content, buffers
(the wire protocol of Jupyter messaging, version 5).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from cloister_data.framing import MAX_CHANNEL_MESSAGE, MAX_PARTS

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


def without_signature(parts: Sequence[bytes]) -> tuple[bytes, ...] | None:
    """The message with an empty signature, or None if it is malformed or too large for the channel."""
    try:
        mark = parts.index(DELIMITER)
    except ValueError:
        return None
    if len(parts) < mark + 6 or len(parts) > MAX_PARTS or sum(map(len, parts)) > MAX_CHANNEL_MESSAGE:
        return None
    return (*parts[: mark + 1], b"", *parts[mark + 2 :])
