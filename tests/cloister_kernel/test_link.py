"""The channel's exactly-once promise, over connections that break anywhere."""

from __future__ import annotations

import contextlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_data.errors import InvalidRequestError, TooLargeError
from cloister_data.framing import (
    MAX_CHANNEL_FRAME,
    MAX_CHANNEL_MESSAGE,
    MAX_SLICE,
    Channel,
    ChannelFrame,
    FrameKind,
    Slice,
)
from cloister_kernel.holdings import RESERVED_BYTES, Holdings
from cloister_kernel.link import MESSAGE_MARGIN, STREAM_SECONDS, Link
from cloister_kernel.merging import Piece

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
        whole = receiver.accept(ChannelFrame.unpack(frame.pack()))
        if whole is not None:
            new.append(whole.parts[0])
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
                    if receiver.accept(frame) is not None:
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


def test_what_is_held_is_counted_and_given_back() -> None:
    laptop, everyone = Link(BRIDGE), Holdings()
    service = Link(holding=everyone.holding())
    connect(laptop, service)
    for size in (10, 3 << 20, 0):
        service.post(Channel.IOPUB, (bytes(size), b""))
    assert everyone.held > 3 << 20
    carry_all(service, laptop)
    assert everyone.held == 0 == laptop.holding.held
    service.post(Channel.IOPUB, (b"never fetched",))
    service.forget()
    assert everyone.held == 0


def test_a_large_message_travels_in_slices_over_connections_that_break() -> None:
    chance = random.Random(7)
    laptop, service = pair()
    large = (b"id", chance.randbytes(5 << 20), b"", b"x" * MAX_SLICE, bytes(10))
    service.post(Channel.IOPUB, (b"before",))
    service.post(Channel.IOPUB, large)
    service.post(Channel.IOPUB, (b"after",))
    arrived, sent = [], 0
    for _ in range(50):
        connect(laptop, service)
        for _ in range(chance.randrange(5)):
            frame = service.next_frame()
            if frame is None or chance.random() < 0.1:
                break  # sent, and lost with the connection
            sent += 1
            assert len(frame.pack()) <= MAX_CHANNEL_FRAME
            if whole := laptop.accept(ChannelFrame.unpack(frame.pack())):
                arrived.append(whole.parts)
    assert arrived == [(b"before",), large, (b"after",)]
    assert sent < 60  # a break repeats a slice or two, not the message
    service.accept(laptop.acknowledgement())
    assert service.holding.held == laptop.holding.held == 0


def test_a_new_bridge_gets_a_message_whole_whose_first_slices_another_took() -> None:
    first, service = pair()
    connect(first, service)
    large = (bytes(3 << 20),)
    service.post(Channel.IOPUB, large)
    for _ in range(2):
        frame = service.next_frame()
        assert frame is not None
        assert first.accept(frame) is None
    service.accept(first.acknowledgement())
    second = Link(bytes(16)[:15] + b"x")
    connect(second, service)
    assert carry_all(service, second) == list(large)
    assert service.holding.held == 0


def test_slices_that_make_no_message_are_refused() -> None:
    laptop, service = pair()
    connect(laptop, service)
    laptop.accept(ChannelFrame(FrameKind.DATA, Channel.IOPUB, 1, 0, (b"x",), Slice.FURTHER))
    with pytest.raises(InvalidRequestError, match="isn't finished"):
        laptop.accept(ChannelFrame(FrameKind.DATA, Channel.IOPUB, 2, 0, (b"whole",)))
    endless = Link(BRIDGE)
    connect(endless, Link())
    part = (bytes(MAX_SLICE),)
    fitting = MAX_CHANNEL_MESSAGE // MAX_SLICE
    number = 0
    with contextlib.suppress(TooLargeError):
        for number in range(1, 2 * fitting):
            endless.accept(ChannelFrame(FrameKind.DATA, Channel.IOPUB, number, 0, part, Slice.FURTHER))
    assert fitting < number < fitting + 10
    assert endless.holding.held <= MAX_CHANNEL_MESSAGE + MESSAGE_MARGIN


TEXT = Piece((b"stdout", b"cell"), b"x")


def test_pieces_of_a_text_are_one_while_they_wait() -> None:
    laptop, service = pair()
    message = (b'{"name": "stdout", "text": "x"}',)
    for _ in range(5):
        service.post(Channel.IOPUB, message, piece=TEXT)
    service.post(Channel.IOPUB, message, piece=Piece((b"stderr", b"cell"), b"x"))
    service.post(Channel.IOPUB, message, piece=TEXT)
    connect(laptop, service)
    one, five = message[0], b'{"name": "stdout", "text": "xxxxx"}'
    assert carry_all(service, laptop) == [five, one, one]
    assert service.holding.held == 0


def test_the_first_piece_of_a_text_never_waits_and_the_next_ones_wait_for_each_other() -> None:
    laptop, service = pair()
    connect(laptop, service)
    message = (b'{"name": "stdout", "text": "x"}',)
    service.post(Channel.IOPUB, message, piece=TEXT)
    assert service.next_frame() is not None
    service.post(Channel.IOPUB, message, piece=TEXT)
    assert service.next_frame() is None
    assert service.patience is not None
    assert 0 < service.patience <= STREAM_SECONDS
    # Whatever follows takes the text along.
    service.post(Channel.IOPUB, (b"idle",))
    assert service.patience == 0
    assert service.next_frame() is not None
    assert service.next_frame() is not None
    assert service.patience is None


def test_what_was_sent_is_never_changed() -> None:
    laptop, service = pair()
    connect(laptop, service)
    message = (b'{"name": "stdout", "text": "x"}',)
    service.post(Channel.IOPUB, message, piece=TEXT)
    service.post(Channel.IOPUB, (b"one",), replaces=("bar",))
    lost = [service.next_frame(), service.next_frame()]
    service.post(Channel.IOPUB, message, piece=TEXT)
    service.post(Channel.IOPUB, (b"two",), replaces=("bar",))
    connect(laptop, service)
    again = [service.next_frame(), service.next_frame()]
    assert [frame and frame.parts for frame in again] == [frame and frame.parts for frame in lost]
    service._cursor = 0
    assert carry_all(service, laptop) == [message[0], b"one", message[0], b"two"]


def test_only_the_last_of_many_updates_waits() -> None:
    laptop, service = pair()
    for number in range(10_000):
        service.post(Channel.IOPUB, (b"%d" % number,), replaces=("bar",))
        if number == 5000:
            service.post(Channel.IOPUB, (b"between",))
    assert service.holding.held < 2 << 20
    connect(laptop, service)
    assert carry_all(service, laptop) == [b"between", b"9999"]
    assert service.holding.held == 0


def test_however_many_hold_as_much_as_they_may_the_next_kernel_finds_room() -> None:
    everyone = Holdings(limit=1000 << 20, each=250 << 20)
    hogs = [everyone.holding() for _ in range(30)]
    for _ in range(1000):
        for hog in hogs:
            hog.take(1 << 20)
        if hogs[0].held == 100 << 20:
            hogs[0].take(150 << 20)
    assert everyone.held <= everyone.limit + len(hogs) * RESERVED_BYTES
    late = everyone.holding()
    assert late.take(4 << 20)
    assert late.take(16 << 20)
    alone = Holdings(limit=1000 << 20, each=250 << 20).holding()
    assert alone.take(250 << 20)
    assert not alone.take(1)
    assert not alone.over
    alone.hold(RESERVED_BYTES + 1)
    assert alone.over
