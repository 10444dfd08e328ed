"""A kernel service's spawner in a process of its own, for tests: `python -m tests.cloister_kernel.sandbox.scenes NAME`.

Setting one up gives its process a mount namespace, and wants a single thread: pytest's own process is no place for it.
A scene is a coroutine function of a test module that takes a `Stage`; what it returns is printed as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient

from cloister_data.framing import Channel
from cloister_data.kernels import KernelLaunch
from cloister_kernel.sandbox import homes
from cloister_kernel.sandbox.cgroups import Limits
from cloister_kernel.sandbox.confined import ConfinedSpawner
from cloister_kernel.spawner import Prepared, Started
from tests.fakes.kernel_client import run

KEY, OTHER_KEY = "11" * 32, "22" * 32
MIB = 1 << 20

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NOT CHECKED: kernels get uids of their own from root only")


class Stage:
    """`runtime` is the service's directory."""

    def __init__(self, spawner: ConfinedSpawner, runtime: Path) -> None:
        self.spawner, self.runtime = spawner, runtime

    async def start(self, user: str = "ann", key: str = KEY, prepared: Prepared | None = None) -> Cell:
        prepared = prepared or await self.spawner.prepare()
        socket = self.runtime / "g" / prepared.kernel / "guard.sock"
        started = await self.spawner.assign(prepared, user, str(socket), KernelLaunch(home_key=key))
        cell = Cell(self.spawner, started)
        await asyncio.to_thread(cell.meet)
        return cell

    @contextlib.asynccontextmanager
    async def kernel(self, user: str = "ann", key: str = KEY) -> AsyncIterator[Cell]:
        cell = await self.start(user, key)
        try:
            yield cell
        finally:
            await cell.end()

    async def idle(self) -> None:
        """Until no home is in memory."""
        while self.spawner.homes._tasks:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


class Cell:
    """A started kernel and its notebook."""

    def __init__(self, spawner: ConfinedSpawner, started: Started) -> None:
        self.spawner, self.started = spawner, started
        ports = {
            f"{channel.name.lower()}_port": int(path.rpartition("-")[2]) for channel, path in started.paths.items()
        }
        self.client = BlockingKernelClient()
        self.client.load_connection_info(
            {
                "transport": "ipc",
                "ip": started.paths[Channel.SHELL].rpartition("-")[0],
                "key": started.key,
                "signature_scheme": "hmac-sha256",
                "hb_port": 1,
                **ports,
            }
        )
        self.client.start_channels(hb=False)

    def meet(self) -> None:
        """Until its output reaches this side: what was published before is lost."""
        for _ in range(100):
            self.client.kernel_info()
            with contextlib.suppress(queue.Empty):
                self.client.get_iopub_msg(timeout=0.3)
                return
        raise AssertionError("the kernel doesn't answer")

    async def run(self, code: str, seconds: float = 60) -> str:
        """What it printed. Raises AssertionError with what it said where it failed."""
        status, text = await asyncio.to_thread(run, self.client, code, seconds)
        assert status == "ok", text
        return text

    async def end(self) -> int:
        """Its exit code."""
        if self.started.process.returncode is None:
            self.started.process.kill()
        code = await self.started.process.wait()
        self.client.stop_channels()
        self.client.context.destroy(linger=0)
        await self.spawner.end(self.started)
        return code


def play(
    scene: Callable[[Stage], Awaitable[Any]], *, seconds: float = 120, before: Sequence[str] = (), **options: int
) -> Any:
    """Play a scene; what it returns. `before` starts its process. Raises AssertionError with what that wrote."""
    command = [*before, sys.executable, "-m", __name__, scene.__module__, scene.__name__, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def main(module: str, name: str, options: str) -> None:
    chosen = {"memory": 1024, "home": 64, "tmp": 64, "pids": 256} | json.loads(options)
    runtime = Path(tempfile.mkdtemp(prefix="cl-"))
    # What a home holds after its last kernel is what was kept of it on disk.
    homes.LINGER_SECONDS = 0.0
    try:
        spawner = ConfinedSpawner.open(
            runtime,
            runtime / "vault",
            limits=Limits(chosen["memory"] * MIB, chosen["pids"], 2.0),
            home_bytes=chosen["home"] * MIB,
            tmp_bytes=chosen["tmp"] * MIB,
        )
        print(json.dumps(asyncio.run(_play(getattr(importlib.import_module(module), name), spawner, runtime))))
    finally:
        shutil.rmtree(runtime, ignore_errors=True)


async def _play(scene: Callable[[Stage], Awaitable[Any]], spawner: ConfinedSpawner, runtime: Path) -> Any:
    try:
        return await scene(Stage(spawner, runtime))
    finally:
        await spawner.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
