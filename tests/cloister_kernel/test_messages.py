"""Signatures at the link's two ends, and what an overflowing outbox leaves out."""

from __future__ import annotations

import json

from jupyter_client.session import Session

from cloister_data.framing import MAX_PARTS, Channel
from cloister_kernel.overflow import Overflow, message_type
from cloister_kernel.signing import with_signature, without_signature

KEY = b"a key of this test"


def serialized(kind: str, **content: object) -> tuple[bytes, ...]:
    session = Session(key=KEY)
    parts = session.serialize(session.msg(kind, content=content), ident=b"client")
    return tuple(bytes(part) for part in parts)


def test_signed_as_jupyter_signs() -> None:
    message = serialized("execute_request", code="1")
    bare = without_signature(list(message))
    assert bare is not None
    assert bare[2] == b""
    assert tuple(with_signature(bare, KEY) or ()) == message
    reader = Session(key=KEY)
    _, rest = reader.feed_identities(with_signature(bare, KEY))
    assert reader.deserialize(rest)["content"] == {"code": "1"}


def test_another_key_signs_otherwise() -> None:
    message = serialized("execute_request", code="1")
    assert tuple(with_signature(message, b"another") or ()) != message


def test_what_is_no_message_is_refused() -> None:
    for parts in ([], [b"x"], [b"<IDS|MSG>", b"", b"{}"], [b"a"] * 10):
        assert without_signature(parts) is None
        assert with_signature(tuple(parts), KEY) is None
    assert without_signature([b"<IDS|MSG>", *[b""] * (MAX_PARTS + 1)]) is None


def test_only_outputs_are_left_out_and_a_note_says_so() -> None:
    overflow = Overflow()
    stream, status = serialized("stream", text="x"), serialized("status", execution_state="idle")
    assert overflow.admit(Channel.IOPUB, stream, full=False) == [stream]
    for _ in range(3):
        assert overflow.admit(Channel.IOPUB, stream, full=True) == []
    # A reply is never left out, whatever its type is called.
    assert overflow.admit(Channel.SHELL, stream, full=True) == [stream]
    note, kept = overflow.admit(Channel.IOPUB, status, full=True)
    assert kept == status
    assert message_type(note) == "stream"
    assert "3 outputs" in json.loads(note[6])["text"]
    assert overflow.admit(Channel.IOPUB, status, full=False) == [status]


def test_a_hostile_header_has_no_type() -> None:
    for header in (b"", b"[]", b"{}", b'{"msg_type":1}', b"[" * 60_000, b'"' + b"x" * 70_000 + b'"', b"\xff"):
        message = (b"<IDS|MSG>", b"", header, b"{}", b"{}", b"{}")
        assert message_type(message) == ""
        assert Overflow().admit(Channel.IOPUB, message, full=True) == []
