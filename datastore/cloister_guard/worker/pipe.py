"""The worker's end of the two pipes. What libraries print to stdout goes nowhere near it."""

from __future__ import annotations

import os
from typing import Self

from cloister_data.base import Wire
from cloister_data.errors import InvalidRequestError
from cloister_data.framing import frame_length, unpack_body
from cloister_guard.worker.protocol import MAX_FRAME, ORDERS, Order, pack_message

_READ = 1 << 20


class GuardPipe:
    """Frames to and from the guard, blocking."""

    def __init__(self, reader: int, writer: int) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    def take_over(cls) -> Self:
        """Move the pipes off descriptors 0 and 1: these become the null device and a copy of stderr."""
        reader, writer = os.dup(0), os.dup(1)
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        os.dup2(null, 0)
        os.close(null)
        os.dup2(2, 1)
        return cls(reader, writer)

    @property
    def descriptors(self) -> frozenset[int]:
        return frozenset({self._reader, self._writer})

    def receive(self) -> tuple[Order, bytes] | None:
        """The next order and its blob; None when the guard has hung up between two orders.

        Raises InvalidRequestError, TooLargeError or ValidationError for anything but a whole frame.
        """
        prefix = self._read(4)
        if not prefix:
            return None
        if len(prefix) < 4:
            raise InvalidRequestError("The pipe ended inside a frame.")
        length = frame_length(prefix, MAX_FRAME)
        body = self._read(length)
        if len(body) < length:
            raise InvalidRequestError("The pipe ended inside a frame.")
        head, blob = unpack_body(body)
        return ORDERS.validate_json(head), bytes(blob)

    def send(self, report: Wire, blob: bytes = b"") -> None:
        view = memoryview(pack_message(report, blob))
        while view:
            view = view[os.write(self._writer, view) :]

    def _read(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            piece = os.read(self._reader, min(_READ, length - len(data)))
            if not piece:
                break
            data += piece
        return bytes(data)
