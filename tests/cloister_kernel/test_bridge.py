"""The bridge's thread ends when it is told to, whatever comes at the same moment."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cloister_data.errors import UnreachableError
from cloister_kernel.bridge import Bridge, LocalAddress


def away() -> object:
    raise UnreachableError("Nobody is there.")


def after(loop: asyncio.AbstractEventLoop, turns: int, then: Callable[[], object]) -> None:
    """Call `then` after so many turns of the loop."""
    if turns:
        loop.call_soon(after, loop, turns - 1, then)
    else:
        then()


@pytest.mark.parametrize("turns", range(8))
def test_a_bridge_stops_also_where_its_kernel_ends_at_that_moment(tmp_path: Path, turns: int) -> None:
    """Its own wait is over in the same turn of the loop in which it is cancelled: neither may hide the other."""
    ports = {f"{name}_port": number for number, name in enumerate(("shell", "iopub", "stdin", "control", "hb"), 1)}
    bridge = Bridge(LocalAddress("ipc", str(tmp_path / "k"), ports, b"key"), away)  # type: ignore[arg-type]
    bridge._thread.start()
    deadline = time.monotonic() + 30
    while bridge.trouble is None or bridge._loop is None or bridge._main is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    loop, main = bridge._loop, bridge._main
    bridge.exit_code = 0

    def end() -> None:
        bridge._over.set()
        after(loop, turns, main.cancel)

    loop.call_soon_threadsafe(end)
    bridge._thread.join(timeout=5)
    alive = bridge._thread.is_alive()
    if alive:
        bridge.stop()
    assert not alive
    assert bridge._thread not in threading.enumerate()
