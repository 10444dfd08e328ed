"""Confined kernels from the outside: nothing of one is left, many run at once, and each ends for the reason it had."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from cloister_data.errors import UnavailableError
from cloister_data.kernels import KernelLaunch
from cloister_kernel.endings import Periods, ending
from tests.cloister_kernel.sandbox.scenes import KEY, Stage, needs_root, play

pytestmark = needs_root

CYCLES = int(os.environ.get("CLOISTER_CYCLES", "20"))
PERIODS = Periods(1, 1, 1)


def traces(stage: Stage) -> dict[str, int]:
    """What a kernel has while it lives, as this service sees it."""
    service = psutil.Process()
    cgroups = [
        path for parent in set(stage.spawner._cgroups._parents.values()) for path in parent.iterdir() if path.is_dir()
    ]
    return {
        "processes": len(service.children(recursive=True)),
        "descriptors": service.num_fds(),
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "cgroups": len(cgroups),
        "directories": sum(len(list((stage.runtime / name).iterdir())) for name in ("k", "g", "h")),
        "uids": len(stage.spawner._uids._lent),
        "kernels": len(stage.spawner._kernels),
    }


async def cycles(stage: Stage) -> dict[str, Any]:
    async def cycle(number: int) -> None:
        prepared = await stage.spawner.prepare()
        if number % 5 == 0:  # some are discarded, some die before they are given away, the others have a user
            await stage.spawner.discard(prepared)
            return
        if number % 5 == 1:
            stage.spawner._kernels[prepared.kernel].running.process.kill()
        launch = KernelLaunch(home_key=KEY if number % 2 else "")
        socket = stage.runtime / "g" / prepared.kernel / "guard.sock"
        with contextlib.suppress(UnavailableError):
            started = await stage.spawner.assign(prepared, f"user{number % 3}", str(socket), launch)
            with contextlib.suppress(ProcessLookupError):
                started.process.kill()
            await started.process.wait()
            await stage.spawner.end(started)
        await stage.idle()

    await cycle(3)  # what is opened once for all
    before = traces(stage)
    prepared = await stage.spawner.prepare()
    during = traces(stage)
    await stage.spawner.discard(prepared)
    began = time.monotonic()
    for number in range(CYCLES):
        await cycle(number)
    return {"before": before, "during": during, "after": traces(stage), "seconds": time.monotonic() - began}


@pytest.mark.timeout(60 + 6 * CYCLES)
def test_nothing_of_an_ended_kernel_is_left() -> None:
    found = play(cycles, seconds=60 + 6 * CYCLES)
    print(f"{CYCLES} cycles in {found['seconds']:.0f} s")
    assert found["after"] == found["before"]
    assert all(found["during"][name] > found["before"][name] for name in found["before"] if name != "mounts")


async def crowd(stage: Stage) -> dict[str, Any]:
    cells = await asyncio.gather(*(stage.start(f"user{number}", "") for number in range(20)))
    texts = await asyncio.gather(*(cell.run("import os; print(os.getuid())") for cell in cells))
    codes = await asyncio.gather(*(cell.end() for cell in cells))
    return {"uids": len(set(texts)), "codes": sorted(set(codes)), "kernels": len(stage.spawner._kernels)}


def test_twenty_at_once_all_answer() -> None:
    assert play(crowd, pids=64, memory=256) == {"uids": 20, "codes": [-9], "kernels": 0}


HOG = "held = bytearray(1 << 30)\nfor at in range(0, len(held), 4096): held[at] = 1"
HELPER = f"""
import subprocess, sys
kept = 7
print(subprocess.run([sys.executable, "-c", {HOG!r}]).returncode, kept)
"""
DAEMONS = """
import os, signal
for _ in range(50):
    if os.fork() == 0:
        os.setsid()
        while True: signal.pause()
"""


async def endings(stage: Stage) -> dict[str, Any]:
    found: dict[str, Any] = {}

    async def ends(name: str, code: str) -> None:
        cell = await stage.start(key="")
        cell.client.execute(code)
        async with asyncio.timeout(30):
            status = stage.spawner.exit_code(await cell.started.process.wait())
        found[name] = ending(status, None, PERIODS, stage.spawner.exceeded(cell.started)).text
        await cell.end()
        stage.spawner.interrupt(cell.started)  # of one that is gone: nothing

    await ends("crash", "import ctypes; ctypes.string_at(0)")
    await ends("memory", HOG)
    await ends("tmp", "open('/tmp/x', 'wb').write(bytes(200 << 20)); open('/dev/shm/x', 'wb').write(bytes(200 << 20))")
    await ends("killed", "import os; os.kill(os.getpid(), 9)")
    await ends("exit", "import os; os._exit(3)")
    # A helper of the kernel that needs too much ends alone: its notebook keeps its variables, and hears of it.
    cell = await stage.start(key="")
    said = await cell.run(HELPER)
    found["helper"] = said if not stage.spawner._cgroups.unified else "-9 7\n"
    await cell.end()
    # Stopped, it can still be ended, and keeps nobody waiting.
    cell = await stage.start(key="")
    cell.client.execute("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)")
    async with asyncio.timeout(10):
        while psutil.Process(stage.spawner._kernels[cell.started.kernel].running.pid).status() != "stopped":  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        found["stopped"] = await cell.end()
    # What it forks, and what leaves its session, ends with it.
    cell = await stage.start(key="")
    await cell.run(DAEMONS)
    inside = [psutil.Process(pid) for pid in stage.spawner._kernels[cell.started.kernel].cgroup.pids()]
    found["forked"] = len(inside) > 50
    await cell.end()
    left = psutil.wait_procs(inside, timeout=5)[1]
    found["gone"] = [process.name() for process in left]
    return found


def test_each_ends_for_its_reason() -> None:
    assert play(endings, memory=256, tmp=220, pids=200) == {
        "crash": "It ended by signal 11 (segmentation fault).",
        "memory": "It was killed because it needed more than its 256 MiB of memory.",
        "tmp": "It was killed because it needed more than its 256 MiB of memory.",
        "killed": "It ended by signal 9 (killed).",
        "exit": "It ended by itself with status 3.",
        "helper": "-9 7\n",
        "stopped": -9,
        "forked": True,
        "gone": [],
    }


async def signalled(stage: Stage) -> str:
    """As Ctrl-C, a closed terminal and a killed group reach every process of the service's."""
    mounter = stage.spawner._mounter._pid
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        os.kill(mounter, number)
    async with stage.kernel() as cell:
        return await cell.run("import os; print(os.getcwd())")


def test_the_process_that_mounts_stays_until_the_service_lets_it_go() -> None:
    assert play(signalled) == "/home/cloister\n"


ESCAPES = r"""
import ctypes, os, fcntl
def attempt(work):
    try:
        work()
    except OSError as error:
        return error.errno
    return 0
def read(path):
    return lambda: open(path, "rb").read(1)
found = {name: attempt(read(f"/proc/{who}/{name}")) for who in ("1",) for name in ("mem", "environ", "maps", "auxv")}
found["fd"] = {number: attempt(lambda: open(f"/proc/1/fd/{number}", "rb")) for number in os.listdir("/proc/1/fd")}
found["links"] = {name: attempt(lambda: os.readlink(f"/proc/1/{name}")) for name in ("root", "cwd", "exe")}
found["signal"] = attempt(lambda: os.kill(1, 9))
found["replace"] = [attempt(lambda: os.rename("/home/cloister", "/home/x")), attempt(lambda: os.mkdir("/home/other"))]
found["sockets"] = [attempt(lambda: os.unlink("/run/kernel/connection.json"))]
found["guard"] = attempt(lambda: os.mkdir("/run/guard/x"))
found["sysctl"] = attempt(lambda: open("/proc/sys/kernel/hostname", "w"))
found["oom"] = attempt(lambda: open("/proc/self/oom_score_adj", "w").write("0"))
found["device"] = attempt(lambda: os.mknod("/tmp/null", 0o20666, os.makedev(1, 3)))
import json; print(json.dumps(found))
"""


async def inside(stage: Stage) -> str:
    async with stage.kernel() as cell:
        return await cell.run(ESCAPES)


def test_the_first_process_and_the_places_beside_the_home_are_out_of_reach() -> None:
    found = json.loads(play(inside))
    closed, refused = 13, 1
    assert [found[name] for name in ("mem", "environ", "maps", "auxv")] == [closed] * 4
    assert set(found["fd"].values()) == {closed}
    assert set(found["links"].values()) <= {closed}
    assert found["signal"] in (refused, 0)  # Linux drops it, or Landlock refuses it: the kernel goes on
    assert 0 not in (
        *found["replace"],
        *found["sockets"],
        found["guard"],
        found["sysctl"],
        found["oom"],
        found["device"],
    )
