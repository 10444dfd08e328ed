"""Kernels without a sandbox, for trying Cloister out where none can be had: `--unsafe-no-sandbox`.

Where the service runs as root each gets a fresh uid (sandbox "user"); else all share the service's ("none"). Network,
system calls, memory and CPU time aren't confined, and a home ends with its kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import secrets
import shutil
import signal
import sys
import sysconfig
import tempfile
from pathlib import Path

from pydantic import ValidationError

import cloister_kernel.homefiles
from cloister_data.errors import ConfigurationError, InvalidRequestError, Problem, UnavailableError, from_problem
from cloister_data.kernels import KernelLaunch
from cloister_data.policy import Sandbox
from cloister_data.transfers import MAX_TRANSFER_FRAME
from cloister_kernel.kernel_files import KernelSockets, check_socket_length, kernel_environment, named
from cloister_kernel.launch import LaunchPlan
from cloister_kernel.mounts import Bind, MountPlan, plan_mounts
from cloister_kernel.remains import delete, sweep_session, sweep_uid
from cloister_kernel.sandbox.view import package_sources
from cloister_kernel.spawner import HomeOperation, HomeProcess, Prepared, Started
from cloister_kernel.uids import UID_FIRST, UID_LAST, UidPool

LAUNCH_SECONDS = 30.0
KILL_SECONDS = 10.0


def sandbox_level() -> Sandbox:
    """How kernels are kept apart by whoever started this process."""
    return "user" if os.geteuid() == 0 else "none"


class UnconfinedSpawner:
    """`homes` and `runtime` are directories of the cloister's own; no kernel may see what is in `hidden`."""

    def __init__(
        self, *, homes: Path, runtime: Path, hidden: tuple[Path, ...] = (), python: str = sys.executable
    ) -> None:
        if importlib.util.find_spec("ipykernel") is None:
            raise ConfigurationError(
                "This installation can't run kernels: ipykernel is missing.",
                next_step="Install the guard's packages: pip install 'cloister[guard]'.",
            )
        self.sandbox = sandbox_level()
        self._homes, self._runtime, self._hidden, self._python = homes, runtime / "k", hidden, python
        self._uids = UidPool()
        check_socket_length(runtime)
        for directory in (homes, runtime, self._runtime):
            directory.mkdir(mode=0o711, parents=True, exist_ok=True)
            directory.chmod(0o711 if self.sandbox == "user" else 0o700)

    async def prepare(self, *, warm: bool = False) -> Prepared:
        """Nothing runs yet: without a sandbox there is nothing that could be started before its user is known."""
        return Prepared(secrets.token_hex(16), self._uids.take() if self.sandbox == "user" else os.geteuid())

    def ready(self, prepared: Prepared) -> bool:
        return True

    async def discard(self, prepared: Prepared) -> None:
        self._give_back(prepared.uid)

    def _give_back(self, uid: int) -> None:
        if self.sandbox == "user":
            self._uids.give_back(uid)

    async def assign(self, prepared: Prepared, user: str, guard_socket: str, launch: KernelLaunch) -> Started:
        home, uid = self._homes / prepared.kernel, prepared.uid
        sockets = KernelSockets(self._runtime / prepared.kernel[:12])
        try:
            environment = kernel_environment(launch, home=str(home), user=user, guard_socket=guard_socket)
            home.mkdir(mode=0o700)
            self._own(home, uid)
            sockets.open(lambda path: self._own(path, uid))
            connection = sockets.directory / "connection.json"
            descriptor = os.open(connection, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o400)
            with os.fdopen(descriptor, "w") as file:
                file.write(sockets.connection(str(sockets.directory)))
            self._own(connection, uid)
            process = await self._spawn(self._plan(uid, home, connection, guard_socket, environment, sockets))
        except BaseException as error:
            for path in (home, sockets.directory):
                shutil.rmtree(path, ignore_errors=True)
            self._give_back(uid)
            if isinstance(error, OSError):
                raise UnavailableError(
                    "The kernel can't be started.", why=f"{type(error).__name__}: {error}"
                ) from error
            raise
        finally:
            paths = sockets.paths
            sockets.close()
        return Started(prepared.kernel, uid, user, self.sandbox, process, sockets.key, paths, guard_socket)

    def _own(self, path: Path, uid: int) -> None:
        if self.sandbox == "user":
            os.chown(path, uid, uid, follow_symlinks=False)

    def _plan(
        self,
        uid: int,
        home: Path,
        connection: Path,
        guard_socket: str,
        environment: dict[str, str],
        sockets: KernelSockets,
    ) -> LaunchPlan:
        apart = self.sandbox == "user"
        mounts = MountPlan()
        must_read: list[str] = []
        if apart:
            interpreter = [sys.base_prefix, sys.prefix, self._python, sysconfig.get_path("stdlib")]
            sources = package_sources()
            mounts = plan_mounts(
                [
                    *(Bind(path=path) for path in [*interpreter, *sources]),
                    # The directory, not the socket in it: a guard that restarts makes another one.
                    Bind(path=os.path.dirname(guard_socket)),
                    Bind(path=str(sockets.directory)),
                    Bind(path=str(home), writable=True),
                ],
                [str(path) for path in self._hidden],
            )
            must_read = [self._python, os.__file__, *sources, str(connection)]
        return LaunchPlan(
            uid=uid if apart else None,
            parent=os.getpid(),
            mounts=mounts,
            home=str(home),
            arguments=(self._python, "-m", "cloister_kernel.notebook", "-f", str(connection)),
            environment=environment,
            must_read=tuple(must_read),
            closed_to=tuple(str(path) for path in self._hidden) if apart else (),
            keep=sockets.descriptors,
        )

    async def _spawn(self, plan: LaunchPlan) -> asyncio.subprocess.Process:
        """Run the trampoline and wait until it has become the kernel. Raises what it reports."""
        status_read, status_write = os.pipe()
        try:
            with tempfile.TemporaryFile() as stdin:
                stdin.write(plan.to_json())
                stdin.seek(0)
                process = await asyncio.create_subprocess_exec(
                    self._python,
                    "-I",
                    "-m",
                    "cloister_kernel.launch",
                    str(status_write),
                    stdin=stdin,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.DEVNULL,
                    env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
                    cwd="/",
                    pass_fds=(status_write, *plan.keep),
                    start_new_session=True,
                )
            os.close(status_write)
            status_write = -1
            report = await _read_pipe(status_read)
        finally:
            for descriptor in (status_read, status_write):
                if descriptor >= 0:
                    os.close(descriptor)
        if report is None or report:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            if report is None:
                raise UnavailableError("The kernel took too long to start.")
            try:
                raise from_problem(Problem.from_json(report))
            except ValidationError:
                raise UnavailableError("The kernel ended before it had started.") from None
        return process

    async def home_process(self, started: Started, operation: HomeOperation) -> HomeProcess:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", cloister_kernel.homefiles.__file__, operation),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=MAX_TRANSFER_FRAME,
            cwd="/",
            env={"LANG": "C.UTF-8"},
        )
        into, output = process.stdin, process.stdout
        if into is None or output is None:
            raise UnavailableError("A file can't be moved.", why="What does it has no pipes.")
        uid = started.uid if self.sandbox == "user" else None
        return HomeProcess(process, into, output, str(self._homes / started.kernel), uid, lambda: _ended(process))

    def interrupt(self, started: Started) -> None:
        if started.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                # Its whole session's first group, as a terminal's Ctrl-C does.
                os.killpg(started.process.pid, signal.SIGINT)

    def exit_code(self, code: int) -> int:
        return code

    async def end(self, started: Started) -> None:
        with contextlib.suppress(ProcessLookupError):
            started.process.kill()
        home = self._homes / started.kernel
        async with asyncio.timeout(KILL_SECONDS):
            if self.sandbox == "user":
                await sweep_uid(started.uid)
            else:
                await sweep_session(started.process.pid, home)
            await started.process.wait()
        self._give_back(started.uid)
        await delete(home, self._runtime / started.kernel[:12])

    async def wipe(self, user: str) -> None:
        raise InvalidRequestError("There is nothing to wipe.", why="Without a sandbox a home ends with its kernel.")

    async def save(self) -> None:
        """Nothing is kept."""

    async def recover(self) -> None:
        """Only what bears a kernel's name goes: `homes` may be a directory that others use too."""
        for home in await asyncio.to_thread(named, self._homes, 32):
            owner = home.lstat().st_uid
            if UID_FIRST <= owner <= UID_LAST and self.sandbox == "user":
                await sweep_uid(owner)
            elif self.sandbox == "none" and owner == os.geteuid():
                await sweep_session(None, home)
            await delete(home)
        await delete(*await asyncio.to_thread(named, self._runtime, 12))

    async def close(self) -> None:
        """Nothing but its kernels is held."""


async def _ended(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()


async def _read_pipe(descriptor: int) -> bytes | None:
    """What the trampoline reports until the exec closes its end; None when that takes too long."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(os.dup(descriptor), "rb")
    )
    try:
        async with asyncio.timeout(LAUNCH_SECONDS):
            return await reader.read(-1)
    except TimeoutError:
        return None
    finally:
        transport.close()
