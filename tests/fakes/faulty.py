"""A bad network: a TCP switch that delays, trickles, swallows, half-closes and cuts."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator

from tests.fakes.middle import Passthrough


class FaultyNetwork(Passthrough):
    """What goes through it to `port`. By default it is as good as none.

    Attributes:
        delay, jitter: seconds that each piece of data takes, and up to how many more by chance.
        trickle: where not 0, data goes in pieces of this many bytes at most, with the delay between them.
        swallowing: data is taken and goes nowhere; connections stay open, and new ones are made.
    """

    def __init__(self, port: int) -> None:
        super().__init__([], then=port)
        self.delay = self.jitter = 0.0
        self.trickle = 0
        self.swallowing = False
        self.made = 0
        self._chance = random.Random(5)
        self._lock = threading.Lock()

    def half_close(self, *, towards_laptop: bool) -> None:
        """End one direction of all connections that are open; the other goes on."""
        # Connections are kept in pairs: the laptop's end, the service's end.
        for end in self._open[0 if towards_laptop else 1 :: 2]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_WR)

    @contextlib.contextmanager
    def black_hole(self) -> Iterator[None]:
        """Swallow everything, and cut at the end: what was swallowed is lost with its connection."""
        self.swallowing = True
        try:
            yield
        finally:
            self.cut()
            self.swallowing = False

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        self.made += 1
        with contextlib.suppress(OSError):
            source.settimeout(None)
            while data := source.recv(self.trickle or 65536):
                if self.delay or self.jitter:
                    with self._lock:
                        late = self._chance.random() * self.jitter
                    time.sleep(self.delay + late)
                if not self.swallowing:
                    sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
