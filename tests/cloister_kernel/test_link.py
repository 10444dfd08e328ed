"""The channel's exactly-once promise, over connections that break anywhere."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_data.errors import InvalidRequestError
from cloister_data.framing import Channel, ChannelFrame, FrameKind
from cloister_kernel.link import Link

BRIDGE = bytes(range(16))


def pair() -> tuple[Link, Link]:
    return Link(BRIDGE), Link()


def connect(laptop: Link, service: Link) -> None:
    service.greeted_by_laptop(laptop.hello())
    laptop.greeted_by_service(service.hello())


def carry_all(sender: Link, receiver: Link) -> list[bytes]:
    """Everything that can be sent now, with the new frames' first parts."""
    new = []
    while (frame := sender.next_frame()) is not None:
        if receiver.accept(ChannelFrame.unpack(frame.pack())):
            new.append(frame.parts[0])
    sender.accept(receiver.acknowledgement())
    return new


def test_in_order_and_pruned_once_acknowledged() -> None:
    laptop, service = pair()
    connect(laptop, service)
    for number in range(5):
        service.post(Channel.IOPUB, (b"%d" % number,))
    assert carry_all(service, laptop) == [b"0", b"1", b"2", b"3", b"4"]
    assert service.empty
    assert laptop.received == 5


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 60), st.floats(0, 0.6))
def test_exactly_once_over_broken_connections(seed: int, messages: int, loss: float) -> None:
    chance = random.Random(seed)
    laptop, service = pair()
    posted = {"down": 0, "up": 0}
    arrived: dict[str, list[int]] = {"down": [], "up": []}

    def connection(reliable: bool) -> None:
        connect(laptop, service)
        while True:
            moved = False
            for name, sender, receiver in (("down", service, laptop), ("up", laptop, service)):
                frame = sender.next_frame()
                if frame is not None:
                    moved = True
                    if not reliable and chance.random() < loss:
                        return  # sent, and lost with the connection
                    if receiver.accept(frame):
                        arrived[name].append(int(frame.parts[0]))
                if receiver.owed and chance.random() < 0.3:
                    if not reliable and chance.random() < loss:
                        return
                    sender.accept(receiver.acknowledgement())
            if not moved:
                return

    while posted["down"] < messages or posted["up"] < messages:
        for name, link in (("down", service), ("up", laptop)):
            if posted[name] < messages and chance.random() < 0.7:
                link.post(Channel.SHELL, (b"%d" % posted[name],))
                posted[name] += 1
        if chance.random() < 0.4:
            connection(reliable=False)
    connection(reliable=True)
    assert arrived == {"down": list(range(messages)), "up": list(range(messages))}


def test_a_new_bridge_gets_what_no_bridge_has_acknowledged() -> None:
    first, service = pair()
    connect(first, service)
    service.post(Channel.IOPUB, (b"old",))
    assert carry_all(service, first) == [b"old"]
    first.post(Channel.SHELL, (b"request",))
    assert carry_all(first, service) == [b"request"]
    service.post(Channel.IOPUB, (b"new",))
    second = Link(bytes(16)[:15] + b"x")
    connect(second, service)
    assert carry_all(service, second) == [b"new"]
    second.post(Channel.SHELL, (b"again",))
    assert carry_all(second, service) == [b"again"]


def test_a_gap_and_a_forged_acknowledgement_are_refused() -> None:
    laptop, service = pair()
    connect(laptop, service)
    with pytest.raises(InvalidRequestError, match="missing"):
        laptop.accept(ChannelFrame(FrameKind.DATA, Channel.IOPUB, 2, 0, (b"x",)))
    with pytest.raises(InvalidRequestError, match="never sent"):
        service.accept(ChannelFrame(FrameKind.ACK, Channel.SHELL, 0, 7))
    with pytest.raises(InvalidRequestError, match="second HELLO"):
        service.accept(laptop.hello())


def test_a_channel_begins_with_hello_alone() -> None:
    _, service = pair()
    for frame in (
        ChannelFrame(FrameKind.DATA, Channel.SHELL, 1, 0, (BRIDGE,)),
        ChannelFrame(FrameKind.HELLO, Channel.SHELL, 0, 0, (b"short",)),
        ChannelFrame(FrameKind.HELLO, Channel.SHELL, 0, 0, ()),
        ChannelFrame(FrameKind.HELLO, Channel.SHELL, 0, 9, (BRIDGE,)),
    ):
        with pytest.raises(InvalidRequestError):
            service.greeted_by_laptop(frame)


def test_a_full_outbox_says_so_and_recovers() -> None:
    laptop, _ = pair()
    small = Link(limit=1000)
    connect(laptop, small)
    small.post(Channel.IOPUB, (bytes(1000),))
    assert small.full
    assert small.room.is_set()
    small.post(Channel.IOPUB, (bytes(1000),))
    assert not small.room.is_set()
    carry_all(small, laptop)
    assert not small.full
    assert small.room.is_set()
