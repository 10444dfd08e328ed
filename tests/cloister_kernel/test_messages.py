"""Signatures at the link's two ends, and what an overflowing outbox leaves out."""

from __future__ import annotations

import json

from jupyter_client.session import Session

from cloister_data.framing import MAX_PARTS
from cloister_kernel.merging import joined, message_type, piece, replaces
from cloister_kernel.overflow import OUTPUTS, Overflow
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


def test_a_note_says_what_was_left_out() -> None:
    overflow = Overflow()
    assert overflow.note() is None
    for _ in range(3):
        overflow.drop(serialized("stream", text="x"))
    note = overflow.note()
    assert note is not None
    assert message_type(note) == "stream"
    assert "3 outputs" in json.loads(note[6])["text"]
    assert overflow.note() is None
    overflow.drop((b"only", b"fragments"))
    assert overflow.note() is not None


def test_a_hostile_header_has_no_type() -> None:
    for header in (b"", b"[]", b"{}", b'{"msg_type":1}', b"[" * 60_000, b'"' + b"x" * 70_000 + b'"', b"\xff"):
        message = (b"<IDS|MSG>", b"", header, b"{}", b"{}", b"{}")
        assert message_type(message) == ""
        assert message_type(message) in OUTPUTS


def stream(text: str, name: str = "stdout", parent: bytes = b"{}", metadata: bytes = b"{}") -> tuple[bytes, ...]:
    """As ipykernel writes it."""
    content = json.dumps({"name": name, "text": text}, ensure_ascii=False).encode()
    return (b"stream." + name.encode(), b"<IDS|MSG>", b"", b'{"msg_type": "stream"}', parent, metadata, content)


def test_a_cells_text_is_joined_as_it_was_written() -> None:
    texts = ["one\n", 'a "quoted" \\ end\\', "\u00e4\U0001f600", "", "\x00\x1b[0m", '"}', "last"]
    pieces = [piece("stream", stream(text)) for text in texts]
    assert all(found is not None and found.key == pieces[0].key for found in pieces if pieces[0])
    whole = joined(stream(texts[0]), [found.text for found in pieces[1:] if found])
    assert json.loads(whole[-1]) == {"name": "stdout", "text": "".join(texts)}
    assert whole[:-1] == stream(texts[0])[:-1]


def test_what_isnt_the_same_text_stays_apart() -> None:
    keys = set()
    for message in (
        stream("x"),
        stream("x", name="stderr"),
        stream("x", parent=b'{"a":1}'),
        stream("x", metadata=b"{1}"),
    ):
        found = piece("stream", message)
        assert found is not None
        keys.add(found.key)
    assert len(keys) == 4
    assert piece("display_data", stream("x")) is None
    assert piece("stream", (*stream("x"), b"a buffer")) is None
    assert piece("stream", stream("x" * 70_000)) is None
    assert piece("stream", (*stream("x")[:-1], b'{"text": "x", "name": "stdout"}')) is None


def update(data: object, parent: bytes = b"{}", comm: object = "c", *buffers: bytes) -> tuple[bytes, ...]:
    content = json.dumps({"comm_id": comm, "data": data}).encode()
    return (b"comm", b"<IDS|MSG>", b"", b'{"msg_type": "comm_msg"}', parent, b"{}", content, *buffers)


def test_only_updates_that_a_later_one_replaces_whole_are_stale() -> None:
    def state(**fields: object) -> dict[str, object]:
        return {"method": "update", "state": fields, "buffer_paths": []}

    one = replaces("comm_msg", update(state(value=1)))
    assert one is not None
    assert replaces("comm_msg", update(state(value=2))) == one
    others = [
        update(state(value=2, max=3)),
        update(state(max=3)),
        update(state(value=2), parent=b'{"a":1}'),
        update(state(value=2), comm="d"),
    ]
    assert one not in {replaces("comm_msg", message) for message in others}
    never = [
        update(state(value=2), b"{}", "c", b"a buffer"),
        update({"method": "update", "state": {"value": 2}, "buffer_paths": [["value"]]}),
        update({"method": "custom", "content": {}}),
        update({"method": "echo_update", "state": {"value": 2}, "buffer_paths": []}),
        update(state(value=2), comm=5),
        update([]),
    ]
    assert {replaces("comm_msg", message) for message in never} == {None}
    shown = {"data": {"text/plain": "1"}, "metadata": {}, "transient": {"display_id": "bar"}}
    message = (*update(None)[:-1], json.dumps(shown).encode())
    assert replaces("update_display_data", message) == ("update_display_data", b"{}", "bar")
    assert replaces("display_data", message) is None
    assert replaces("update_display_data", (*message[:-1], b'{"transient": {}}')) is None
