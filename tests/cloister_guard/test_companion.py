"""The guard and its kernel service: sockets that come back in their places, and entries that are written once."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import func, select

from cloister_budget.tables import Leaf
from cloister_data.control import ControlAnswer, ControlOrder, EndKernel, RegisterKernel
from cloister_data.errors import ConflictError, ForbiddenError
from cloister_data.framing import MAX_JSON_FRAME, pack_frame
from cloister_guard import companion
from cloister_guard.config import GuardConfig
from cloister_guard.control import ControlServer
from cloister_guard.guard import Guard
from cloister_guard.http.servers import KernelSockets
from cloister_guard.identity import Caller
from cloister_guard.kernels import read_frame
from cloister_guard.metrics import Metrics

KERNEL, OTHER = "1" * 32, "2" * 32
ANN, BEN = Caller("ann", "scientist", "user"), Caller("ben", "scientist", "user")
UID = 200_001 if os.geteuid() == 0 else os.geteuid()


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="clo-") as folder:
        yield Path(folder)


def sockets_in(folder: Path) -> KernelSockets:
    guard: Any = SimpleNamespace(
        config=SimpleNamespace(kernel_socket=lambda kernel: folder / kernel / "guard.sock"),
        kernels=SimpleNamespace(registered=0),
        metrics=Metrics("0", "simulated"),
    )
    return KernelSockets(guard)


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(path))
        except OSError:
            return False
    return True


def test_the_next_guard_makes_its_socket_in_the_same_directory(place: Path) -> None:
    async def scenario() -> None:
        first, second = sockets_in(place), sockets_in(place)
        path = await first.open(KERNEL, UID, ANN, "s")
        directory = path.parent.stat().st_ino
        await first.close_all(remove=False)  # as a guard leaves it that is killed, or stopped beside a service apart
        assert path.exists()
        assert not listens(path)
        assert await second.open(KERNEL, UID, ANN, "s") == path
        assert listens(path)
        assert path.parent.stat().st_ino == directory
        if os.geteuid() == 0:
            assert (path.stat().st_uid, path.parent.stat().st_uid, path.parent.stat().st_gid) == (UID, 0, UID)
            assert path.parent.stat().st_mode & 0o777 == 0o710
        await second.close(KERNEL)
        assert not path.parent.exists()

    asyncio.run(scenario())


def test_a_directory_that_was_made_before_is_used_and_one_of_another_is_not(place: Path) -> None:
    async def scenario() -> None:
        sockets = sockets_in(place)
        (place / KERNEL).mkdir(mode=0o700)
        inode = (place / KERNEL).stat().st_ino
        await sockets.open(KERNEL, UID, ANN, "s")
        assert (place / KERNEL).stat().st_ino == inode
        (place / "elsewhere").mkdir()
        (place / OTHER).symlink_to(place / "elsewhere")
        with pytest.raises(ForbiddenError):
            await sockets.open(OTHER, UID, ANN, "s")
        if os.geteuid() == 0:
            (place / OTHER).unlink()
            (place / OTHER).mkdir()
            os.chown(place / OTHER, UID, UID)
            with pytest.raises(ForbiddenError):
                await sockets.open(OTHER, UID, ANN, "s")
        assert not list((place / "elsewhere").iterdir())
        await sockets.close_all(remove=True)

    asyncio.run(scenario())


def test_a_kernel_is_registered_once_and_never_as_anothers(place: Path) -> None:
    async def scenario() -> None:
        sockets = sockets_in(place)
        path = await sockets.open(KERNEL, UID, ANN, "s")
        inode = path.stat().st_ino
        assert await sockets.open(KERNEL, UID, ANN, "s") == path
        assert path.stat().st_ino == inode
        for uid, caller in ((UID, BEN), (UID + 1, ANN), (UID, Caller("ann", "scientist", "none"))):
            with pytest.raises(ConflictError):
                await sockets.open(KERNEL, uid, caller, "s")
        # The kernels of a service that was started anew: those of the one before died with it.
        other = await sockets.open(OTHER, UID, BEN, "t")
        assert not path.exists()
        assert listens(other)
        await sockets.keep("t")
        assert listens(other)
        await sockets.close_all(remove=True)

    asyncio.run(scenario())


async def say(config: GuardConfig, order: ControlOrder) -> ControlAnswer:
    reader, writer = await asyncio.open_unix_connection(config.control_socket)
    writer.write(pack_frame(order.to_json()))
    answer = ControlAnswer.from_json(await read_frame(reader, MAX_JSON_FRAME))
    writer.close()
    return answer


def test_a_kernel_that_is_met_again_is_in_the_log_once(place: Path, tmp_path: Path) -> None:
    """Also where the guard that started it was killed before it could write that."""
    config = GuardConfig(
        name="again", listen="127.0.0.1:0", state_dir=tmp_path / "state", runtime_dir=place, platform="simulated"
    )

    def written(guard: Guard) -> int:
        with guard.database.read() as session:
            return session.scalar(select(func.count()).select_from(Leaf).where(Leaf.kind == "kernel")) or 0

    def order(kernel: str, again: bool) -> RegisterKernel:
        return RegisterKernel(kernel=kernel, uid=UID, user="ann", sandbox="user", service="5" * 32, again=again)

    async def a_guard(kernels: dict[str, bool], expected: int, log: str | None = None) -> None:
        guard = Guard(config)
        guard.recover()
        sockets = KernelSockets(guard)
        control = ControlServer(guard, sockets)
        await control.start()
        for kernel, again in kernels.items():
            answers = await asyncio.gather(*(say(config, order(kernel, again)) for _ in range(3)))
            assert {answer.socket for answer in answers} == {str(config.kernel_socket(kernel))}
        if log is not None:
            await guard.kernel_log.started(ANN, log, "user")
        assert written(guard) == expected
        await say(config, EndKernel(kernel=OTHER))
        await sockets.close_all(remove=False)
        await control.stop()
        guard.database.close()

    # It registers both, and writes about one of them before it is killed.
    asyncio.run(a_guard({KERNEL: False, OTHER: False}, 1, log=KERNEL))
    asyncio.run(a_guard({KERNEL: True, OTHER: True}, 2))
    asyncio.run(a_guard({KERNEL: True, OTHER: True}, 2))


LISTENER = """
import signal, socket, sys
door = socket.socket(socket.AF_UNIX)
door.bind(sys.argv[1])
door.listen()
print("ready", flush=True)
signal.pause()
"""


def process_of(descriptor: int) -> int:
    return int(Path(f"/proc/self/fdinfo/{descriptor}").read_text().split("Pid:")[1].split()[0])


def test_a_service_that_runs_is_found_watched_and_ended(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(companion, "RESTART_SECONDS", 0.0)
    door = place / "kernels.sock"
    command = [sys.executable, "-c", LISTENER, str(door)]

    async def listening() -> int:
        while not listens(door):  # noqa: ASYNC110 - another process makes it
            await asyncio.sleep(0.02)
        found = companion._find(door)
        assert found is not None
        pid = process_of(found._descriptor)
        asyncio.get_running_loop().remove_reader(found._descriptor)
        os.close(found._descriptor)
        return pid

    async def scenario() -> None:
        stop = asyncio.Event()
        assert companion._find(door) is None
        first = asyncio.create_task(companion.supervise(command, door, stop))
        pid = await listening()
        # A guard that is killed takes nothing along.
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        os.kill(pid, 0)
        # The next one finds it, starts another when it ends, and ends that one.
        second = asyncio.create_task(companion.supervise(command, door, stop))
        await asyncio.sleep(0.3)
        assert await listening() == pid
        door.unlink()
        os.kill(pid, signal.SIGKILL)
        again = await listening()
        assert again != pid
        stop.set()
        await second
        with pytest.raises(ProcessLookupError):
            os.kill(again, 0)

    async def bounded() -> None:
        async with asyncio.timeout(30):
            await scenario()

    asyncio.run(bounded())
