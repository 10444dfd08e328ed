"""Start one notebook kernel as its own uid, and end it with everything that it started."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import socket
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from cloister_data.errors import ConfigurationError, InvalidRequestError, Problem, UnavailableError, from_problem
from cloister_data.framing import Channel
from cloister_data.kernels import KernelLaunch
from cloister_data.policy import Sandbox
from cloister_kernel.launch import LaunchPlan
from cloister_kernel.mounts import Bind, MountPlan, plan_mounts
from cloister_kernel.remains import delete, sweep_session, sweep_uid
from cloister_kernel.uids import UID_FIRST, UID_LAST, UidPool

LAUNCH_SECONDS = 30.0
KILL_SECONDS = 10.0
MAX_SOCKET_PATH = 107
PACKAGES = ("cloister", "cloister_attest", "cloister_budget", "cloister_data", "cloister_kernel")

_DISPLAY = {
    "COLUMNS": re.compile(r"[0-9]{1,5}"),
    "LINES": re.compile(r"[0-9]{1,5}"),
    "NO_COLOR": re.compile(r"[0-9A-Za-z]{0,8}"),
    "LANG": re.compile(r"[A-Za-z0-9_.@-]{1,64}"),
    "TZ": re.compile(r"[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z0-9_+-]+)*"),
}


@dataclass
class Started:
    """A kernel's process and what belongs to it."""

    kernel: str
    uid: int
    sandbox: Sandbox
    process: asyncio.subprocess.Process
    key: bytes
    paths: dict[Channel, str]
    home: Path
    directory: Path
    guard_socket: str


def kernel_environment(launch: KernelLaunch, *, home: Path, user: str, guard_socket: str) -> dict[str, str]:
    """Everything that the kernel finds in its environment: nothing is inherited. Raises InvalidRequestError."""
    environment = {
        "HOME": str(home),
        "USER": user,
        "LOGNAME": user,
        "PATH": f"{os.path.dirname(sys.executable)}:/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "SHELL": "/bin/sh",
        "CLOISTER_GUARD_SOCKET": guard_socket,
        "CLOISTER_VERDICT": launch.verdict,
    }
    for name, value in launch.environment.items():
        if not _DISPLAY[name].fullmatch(value):
            raise InvalidRequestError(f"{name} can't have that value in a kernel.")
        environment[name] = value
    if "\0" in launch.verdict:
        raise InvalidRequestError("The verdict isn't text.")
    return environment


def package_sources() -> list[str]:
    """The directories of the packages that a kernel imports, wherever they are installed."""
    found = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            found += list(spec.submodule_search_locations)
    return found


def sandbox_level() -> Sandbox:
    """How kernels can be kept apart by whoever started this process."""
    return "user" if os.geteuid() == 0 else "none"


class Spawner:
    """Makes kernels. Started by root, each gets a fresh uid (sandbox "user"); else all share the service's ("none")."""

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
        longest = runtime / "k" / ("0" * 12) / "k-9999"
        if len(os.fsencode(longest)) > MAX_SOCKET_PATH:
            raise ConfigurationError(
                f"The path {runtime} is too long for sockets.",
                why=f"A Unix socket's path holds {MAX_SOCKET_PATH} bytes.",
                next_step="Set runtime_dir to a short directory, such as /run/cloister.",
            )
        for directory in (homes, runtime, self._runtime):
            directory.mkdir(mode=0o711, parents=True, exist_ok=True)
            directory.chmod(0o711 if self.sandbox == "user" else 0o700)

    def take_uid(self) -> int:
        return self._uids.take() if self.sandbox == "user" else os.geteuid()

    def give_uid_back(self, uid: int) -> None:
        if self.sandbox == "user":
            self._uids.give_back(uid)

    async def start(self, kernel: str, uid: int, user: str, guard_socket: str, launch: KernelLaunch) -> Started:
        """A running ipykernel whose sockets listen. Raises CloisterError; then nothing is left behind."""
        home, directory = self._homes / kernel, self._runtime / kernel[:12]
        environment = kernel_environment(launch, home=home, user=user, guard_socket=guard_socket)
        listening: dict[Channel, socket.socket] = {}
        try:
            home.mkdir(mode=0o700)
            directory.mkdir(mode=0o711)
            directory.chmod(0o711)
            self._own(home, uid)
            for channel in Channel:
                listening[channel] = self._listen(directory, uid)
            paths = {channel: _socket_path(directory, bound) for channel, bound in listening.items()}
            key = secrets.token_hex(32).encode()
            connection = directory / "connection.json"
            self._write_connection(connection, uid, directory, key, listening)
            plan = self._plan(uid, home, directory, connection, guard_socket, environment, listening)
            process = await self._spawn(plan)
        except OSError as error:
            self.remove(home, directory)
            raise UnavailableError("The kernel can't be started.", why=f"{type(error).__name__}: {error}") from error
        except BaseException:
            self.remove(home, directory)
            raise
        finally:
            for bound in listening.values():
                bound.close()
        return Started(kernel, uid, self.sandbox, process, key, paths, home, directory, guard_socket)

    def _own(self, path: Path, uid: int) -> None:
        if self.sandbox == "user":
            os.chown(path, uid, uid, follow_symlinks=False)

    def _listen(self, directory: Path, uid: int) -> socket.socket:
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path = _socket_path(directory, bound)
        bound.bind(path)
        # The kernel itself may connect (its debugger does); the directory stays the spawner's.
        os.chmod(path, 0o600)
        self._own(Path(path), uid)
        bound.listen(16)
        return bound

    def _write_connection(
        self, path: Path, uid: int, directory: Path, key: bytes, listening: dict[Channel, socket.socket]
    ) -> None:
        numbers = {f"{channel.name.lower()}_port": bound.fileno() for channel, bound in listening.items()}
        connection = {
            "transport": "ipc",
            "ip": str(directory / "k"),
            "signature_scheme": "hmac-sha256",
            "key": key.decode(),
            "hb_port": 1,
            **numbers,
        }
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o400)
        with os.fdopen(descriptor, "w") as file:
            json.dump(connection, file)
        self._own(path, uid)

    def _plan(
        self,
        uid: int,
        home: Path,
        directory: Path,
        connection: Path,
        guard_socket: str,
        environment: dict[str, str],
        listening: dict[Channel, socket.socket],
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
                    Bind(path=str(directory)),
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
            keep=tuple(bound.fileno() for bound in listening.values()),
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

    async def end(self, started: Started) -> None:
        """Kill the kernel and everything that it left. Raises UnavailableError where something survives."""
        with contextlib.suppress(ProcessLookupError):
            started.process.kill()
        async with asyncio.timeout(KILL_SECONDS):
            if self.sandbox == "user":
                await sweep_uid(started.uid)
            else:
                await sweep_session(started.process.pid, started.home)
            await started.process.wait()
        self.give_uid_back(started.uid)
        await delete(started.home, started.directory)

    async def recover(self) -> None:
        """Kill and delete what an earlier kernel service left, if it was killed itself. To be called before a start.

        Only what bears a kernel's name goes: `homes` may be a directory that others use too.
        """
        for home in await asyncio.to_thread(_named, self._homes, 32):
            owner = home.lstat().st_uid
            if UID_FIRST <= owner <= UID_LAST and self.sandbox == "user":
                await sweep_uid(owner)
            elif self.sandbox == "none" and owner == os.geteuid():
                await sweep_session(None, home)
            await delete(home)
        await delete(*await asyncio.to_thread(_named, self._runtime, 12))

    def remove(self, home: Path, directory: Path) -> None:
        """Undo a start that failed."""
        for path in (home, directory):
            shutil.rmtree(path, ignore_errors=True)


def _named(directory: Path, digits: int) -> list[Path]:
    """What lies in `directory` under the first `digits` hex digits of a kernel's id."""
    return sorted(path for path in directory.iterdir() if re.fullmatch(f"[0-9a-f]{{{digits}}}", path.name))


def _socket_path(directory: Path, bound: socket.socket) -> str:
    return str(directory / f"k-{bound.fileno()}")


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
