"""What an ended kernel leaves is swept: all of it, and nothing else."""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from cloister_kernel.remains import sweep_uid
from cloister_kernel.uids import UidPool, uids_of
from cloister_kernel.unconfined import UnconfinedSpawner

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NOT CHECKED: changing the uid needs root")

HEADLESS = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
print(flush=True)
ctypes.CDLL(None).pthread_exit(0)
"""


def start(uid: int, *command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, user=uid, group=uid, extra_groups=[], cwd="/", stdout=subprocess.PIPE)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def until_zombie(pid: int) -> None:
    deadline = time.monotonic() + 10
    while state(pid) != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


@needs_root
def test_a_zombie_that_nobody_waits_for_is_no_process_that_goes_on() -> None:
    """As under an init that reaps nothing, in many containers."""
    uid = UidPool().take()
    with start(uid, "/bin/true") as zombie:
        until_zombie(zombie.pid)
        asyncio.run(sweep_uid(uid))
        assert uids_of(zombie.pid) == set()


@needs_root
def test_a_process_whose_first_thread_has_ended_is_swept() -> None:
    uid = UidPool().take()
    with start(uid, "/usr/bin/env", "python3", "-I", "-S", "-c", HEADLESS) as headless:
        assert headless.stdout is not None
        headless.stdout.readline()
        until_zombie(headless.pid)
        assert headless.poll() is None
        assert uids_of(headless.pid) == {uid}
        asyncio.run(sweep_uid(uid))
        assert headless.wait(5) == -9


def test_only_what_bears_a_kernels_name_is_cleared_at_a_start(tmp_path: Path) -> None:
    homes = tmp_path / "homes"
    with tempfile.TemporaryDirectory(prefix="cl-") as runtime:
        spawner = UnconfinedSpawner(homes=homes, runtime=Path(runtime))
        for name in ("alice", "ab" * 16):
            (homes / name).mkdir()
            (homes / name / "thesis.tex").write_text("years of work")
        (Path(runtime) / "k" / "notes").mkdir()
        (Path(runtime) / "k" / ("ab" * 6)).mkdir()
        asyncio.run(spawner.recover())
        assert [path.name for path in homes.iterdir()] == ["alice"]
        assert [path.name for path in (Path(runtime) / "k").iterdir()] == ["notes"]
