"""A kernel's guard socket against a kernel that wants all of it."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cloister_guard.http.servers import KERNEL_CONNECTIONS, KernelSockets
from cloister_guard.metrics import Metrics

REQUEST = b"GET /api/v1/nothing HTTP/1.1\r\nhost: cloister\r\nconnection: close\r\n\r\n"


async def answers(path: Path) -> bool:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(REQUEST)
        return (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 404")
    finally:
        writer.close()


def test_a_kernel_that_only_connects_takes_a_bounded_part_of_the_guards_descriptors() -> None:
    async def scenario(folder: Path) -> None:
        guard: Any = SimpleNamespace(
            config=SimpleNamespace(kernel_socket=lambda kernel: folder / kernel / "s"),
            kernels=SimpleNamespace(registered=0),
            metrics=Metrics("0", "simulated"),
        )
        caller: Any = SimpleNamespace(user="ann")
        sockets = KernelSockets(guard)
        greedy, other = [await sockets.open(kernel, os.geteuid(), caller, "s") for kernel in ("a", "b")]
        before = len(os.listdir("/proc/self/fd"))
        held = [await asyncio.open_unix_connection(greedy) for _ in range(KERNEL_CONNECTIONS + 100)]
        refused = held[KERNEL_CONNECTIONS:]
        assert [await asyncio.wait_for(reader.read(), 5) for reader, _ in refused] == [b""] * 100
        assert len(os.listdir("/proc/self/fd")) - before <= KERNEL_CONNECTIONS + len(held) + 1
        assert await answers(other)
        for _, writer in held:
            writer.close()
        async with asyncio.timeout(5):
            while len(os.listdir("/proc/self/fd")) > before + 1:  # noqa: ASYNC110 - other tasks close them
                await asyncio.sleep(0.01)
        assert await answers(greedy)
        await sockets.close_all(remove=True)
        await asyncio.sleep(0.05)

    with tempfile.TemporaryDirectory(prefix="clo-") as folder:
        asyncio.run(scenario(Path(folder)))
