"""Frames, bodies with a head, and the kernel channel: what goes in comes out, and hostile bytes are refused."""

import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cloister_data.errors import InvalidRequestError, TooLargeError
from cloister_data.framing import (
    MAX_HEAD,
    MAX_JSON_FRAME,
    MAX_PARTS,
    Channel,
    ChannelFrame,
    FrameKind,
    Slice,
    frame_length,
    pack_body,
    pack_frame,
    unpack_body,
)

counters = st.integers(0, 2**64 - 1)
frames = st.builds(
    ChannelFrame,
    kind=st.sampled_from(FrameKind),
    channel=st.sampled_from(Channel),
    sequence=counters,
    acknowledged=counters,
    parts=st.lists(st.binary(max_size=64), max_size=12).map(tuple),
)


@settings(deadline=None)
@given(payload=st.binary(max_size=2000))
def test_frame_round_trip(payload: bytes) -> None:
    packed = pack_frame(payload)
    assert frame_length(packed[:4], MAX_JSON_FRAME) == len(payload)
    assert packed[4:] == payload


def test_a_frame_of_the_largest_size_is_announced_and_a_larger_one_refused() -> None:
    assert frame_length(struct.pack(">I", MAX_JSON_FRAME), MAX_JSON_FRAME) == MAX_JSON_FRAME
    with pytest.raises(TooLargeError, match="announced"):
        frame_length(struct.pack(">I", MAX_JSON_FRAME + 1), MAX_JSON_FRAME)
    with pytest.raises(TooLargeError):
        frame_length(b"\xff\xff\xff\xff", MAX_JSON_FRAME)


@settings(deadline=None)
@given(head=st.binary(max_size=500), blob=st.binary(max_size=500))
def test_body_round_trip(head: bytes, blob: bytes) -> None:
    found_head, found_blob = unpack_body(pack_body(head, blob))
    assert found_head == head
    assert bytes(found_blob) == blob


@pytest.mark.parametrize("body", [b"", b"\x00", b"\x00\x00\x00", b"\x00\x00\x00\x01", b"\x00\x00\x00\x05abcd"])
def test_a_body_that_ends_too_early(body: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        unpack_body(body)


def test_a_body_with_a_huge_head() -> None:
    with pytest.raises(TooLargeError):
        unpack_body(struct.pack(">I", MAX_HEAD + 1) + b"x")


@settings(deadline=None)
@given(body=st.binary(max_size=64))
def test_any_body_is_read_or_refused(body: bytes) -> None:
    try:
        head, blob = unpack_body(body)
    except (InvalidRequestError, TooLargeError):
        return
    assert pack_body(head, bytes(blob)) == body


@settings(deadline=None)
@given(frame=frames)
def test_channel_frame_round_trip(frame: ChannelFrame) -> None:
    assert ChannelFrame.unpack(frame.pack()) == frame


@settings(deadline=None)
@given(frame=frames, cut=st.integers(1, 200))
def test_a_shortened_channel_frame_is_refused(frame: ChannelFrame, cut: int) -> None:
    packed = frame.pack()
    with pytest.raises(InvalidRequestError):
        ChannelFrame.unpack(packed[: max(0, len(packed) - cut)])


@settings(deadline=None)
@given(frame=frames, extra=st.binary(min_size=1, max_size=16))
def test_bytes_after_a_channel_frame_are_refused(frame: ChannelFrame, extra: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        ChannelFrame.unpack(frame.pack() + extra)


@settings(deadline=None)
@given(data=st.binary(max_size=80))
@example(data=b"\x01\x01\x01" + b"\x00" * 17 + b"\xff\xff\xff\xff")
@example(data=b"\x01\x01\x01" + b"\x00" * 17 + b"\x00\x00\x00\x01\xff\xff\xff\xff")
def test_any_bytes_are_one_frame_or_refused(data: bytes) -> None:
    try:
        frame = ChannelFrame.unpack(data)
    except InvalidRequestError:
        return
    assert frame.pack() == data


@pytest.mark.parametrize(
    ("offset", "value"),
    [(0, 0), (0, 2), (1, 4), (1, 255), (2, 4), (2, 255), (3, 3), (3, 255)],
    ids=lambda value: str(value),
)
def test_a_header_of_another_kind_is_refused(offset: int, value: int) -> None:
    packed = bytearray(ChannelFrame(FrameKind.DATA, Channel.SHELL, 1, 0, (b"x",)).pack())
    assert ChannelFrame.unpack(bytes(packed)).parts == (b"x",)
    packed[offset] = value
    with pytest.raises(InvalidRequestError):
        ChannelFrame.unpack(bytes(packed))


@pytest.mark.parametrize("slice", [Slice.FURTHER, Slice.LAST])
def test_a_slice_is_data_with_parts(slice: Slice) -> None:
    one = ChannelFrame(FrameKind.DATA, Channel.SHELL, 1, 0, (b"x",), slice)
    assert ChannelFrame.unpack(one.pack()) == one
    for kind, parts in ((FrameKind.EXIT, (b"0",)), (FrameKind.ACK, ()), (FrameKind.DATA, ())):
        with pytest.raises(InvalidRequestError, match="slice of nothing"):
            ChannelFrame.unpack(ChannelFrame(kind, Channel.SHELL, 1, 0, parts, slice).pack())


def test_the_number_of_parts_is_bounded() -> None:
    most = ChannelFrame(FrameKind.DATA, Channel.SHELL, 1, 0, (b"",) * MAX_PARTS)
    assert ChannelFrame.unpack(most.pack()) == most
    with pytest.raises(InvalidRequestError):
        ChannelFrame.unpack(ChannelFrame(FrameKind.DATA, Channel.SHELL, 1, 0, (b"",) * (MAX_PARTS + 1)).pack())
