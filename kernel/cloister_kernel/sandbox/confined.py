"""Confined kernels: each in a sandbox of its own with every layer, or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cloister_data.errors import CloisterError, ConfigurationError, ConflictError, UnavailableError
from cloister_data.framing import Channel
from cloister_data.kernels import KernelLaunch
from cloister_data.policy import Sandbox
from cloister_kernel.journal import log
from cloister_kernel.kernel_files import KernelSockets, check_socket_length, kernel_environment, named
from cloister_kernel.remains import delete
from cloister_kernel.sandbox.cgroups import Cgroups, Limits, find
from cloister_kernel.sandbox.check import REPORT
from cloister_kernel.sandbox.homes import Homes
from cloister_kernel.sandbox.kernel_cgroup import KernelCgroup
from cloister_kernel.sandbox.layers import LayerError
from cloister_kernel.sandbox.mounter import Mounter
from cloister_kernel.sandbox.process import Confinement, Sandboxed, receive
from cloister_kernel.sandbox.stage import as_configuration_error, find_bubblewrap, open_stage
from cloister_kernel.sandbox.view import HOME, RUN_GUARD, RUN_KERNEL, Bound
from cloister_kernel.spawner import HomeOperation, HomeProcess, Prepared, Started
from cloister_kernel.uids import UidPool

READY_SECONDS = 120.0
KILL_SECONDS = 10.0
WRITABLE = ("/home", "/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - the sandbox's own


@dataclass
class _Kernel:
    """What belongs to one kernel, from the first step to the last."""

    prepared: Prepared
    cgroup: KernelCgroup
    sockets: KernelSockets
    guard_directory: Path
    sandboxed: Sandboxed | None = None
    user: str | None = None  # whose it is, from the start of its assignment
    holds_home: bool = False
    paths: dict[Channel, str] = field(default_factory=dict)

    @property
    def running(self) -> Sandboxed:
        if self.sandboxed is None:
            raise UnavailableError("The kernel hasn't been started.")
        return self.sandboxed


class ConfinedSpawner:
    """Kernels with all layers. `runtime` is the cloister's runtime directory."""

    sandbox: Sandbox = "confined"

    def __init__(
        self, confinement: Confinement, mounter: Mounter, cgroups: Cgroups, homes: Homes, runtime: Path, limits: Limits
    ) -> None:
        self.homes = homes
        self._confinement, self._mounter, self._cgroups, self._limits = confinement, mounter, cgroups, limits
        self._directories, self._guard = runtime / "k", runtime / "g"
        self._uids = UidPool()
        self._kernels: dict[str, _Kernel] = {}

    @classmethod
    def open(cls, runtime: Path, vault: Path, *, limits: Limits, home_bytes: int, tmp_bytes: int) -> ConfinedSpawner:
        """Set everything up. To be called while the process has a single thread.

        Raises ConfigurationError, which names the layer that is missing and the mend.
        """
        if importlib.util.find_spec("ipykernel") is None:
            raise ConfigurationError(
                "This installation can't run kernels: ipykernel is missing.",
                next_step="Install the guard's packages: pip install 'cloister[guard]'.",
            )
        check_socket_length(runtime)
        rootless = os.geteuid() != 0
        try:
            bwrap = find_bubblewrap()
            stage = runtime / "s"
            for directory in (runtime, runtime / "k", runtime / "g", stage):
                directory.mkdir(mode=0o711, parents=True, exist_ok=True)
                directory.chmod(0o711)
            view, mounter = open_stage(stage)
            cgroups = find("cloister-" + hashlib.sha256(os.fsencode(runtime)).hexdigest()[:12])
        except LayerError as error:
            raise as_configuration_error(error) from error
        confinement = Confinement(view, bwrap, sys.executable, rootless=rootless, tmp_bytes=tmp_bytes)
        homes = Homes(runtime / "h", vault, confinement, mounter, cgroups, home_bytes, log)
        return cls(confinement, mounter, cgroups, homes, runtime, limits)

    async def check(self) -> None:
        """Start one sandbox and end it. Raises ConfigurationError where a layer is missing."""
        prepared = await self._locked(warm=False)
        kernel = self._kernels[prepared.kernel]
        try:
            if kernel.running.pid not in kernel.cgroup.pids():
                raise as_configuration_error(LayerError("cgroup", "A kernel didn't enter its own.", REPORT))
            try:
                await self.homes.try_out(lambda home: self._attach(kernel, home))
            except (OSError, CloisterError) as error:
                why = f"None can be shown to a kernel ({error})."
                raise as_configuration_error(LayerError("home", why, "Use Linux 6.3 or newer.")) from error
            except LayerError as error:
                raise as_configuration_error(error) from error
        finally:
            await self.discard(prepared)

    async def prepare(self, *, warm: bool = False) -> Prepared:
        """A cold one may still be getting ready when this returns: `assign` waits for that beside the rest."""
        prepared = await self._locked(warm=warm)
        if warm:
            kernel = self._kernels[prepared.kernel]
            try:
                await self._until_ready(kernel)
            except BaseException:
                with contextlib.suppress(CloisterError):
                    await self._bury(kernel)
                raise
        return prepared

    async def _until_ready(self, kernel: _Kernel) -> None:
        """Raises UnavailableError."""
        report, _ = await receive(kernel.running.control, READY_SECONDS)
        if report is None or report.state != "ready":
            raise UnavailableError("The kernel ended before it was ready.")

    async def _locked(self, *, warm: bool) -> Prepared:
        """A kernel whose layers hold, and that goes on to get ready. Raises CloisterError."""
        identifier = secrets.token_hex(16)
        uid = os.geteuid() if self._confinement.rootless else self._uids.take()
        prepared = Prepared(identifier, uid, warm)
        kernel: _Kernel | None = None
        try:
            kernel = _Kernel(
                prepared,
                self._cgroups.make(identifier, self._limits),
                KernelSockets(self._directories / identifier[:12]),
                self._guard / identifier,
            )
            self._kernels[identifier] = kernel
            await self._start(kernel)
        except BaseException as error:
            if kernel is None:
                self._uids.give_back(uid)
            else:
                with contextlib.suppress(CloisterError):
                    await self._bury(kernel)
            if isinstance(error, LayerError):
                raise as_configuration_error(error) from error
            if isinstance(error, OSError):
                raise UnavailableError("The kernel can't be started.", why=f"{error}.") from error
            raise
        return prepared

    async def _start(self, kernel: _Kernel) -> None:
        sockets, uid = kernel.sockets, kernel.prepared.uid
        try:
            sockets.open(lambda path: self._own(path, uid))
            kernel.paths = sockets.paths
            connection = sockets.directory / "connection.json"
            descriptor = os.open(connection, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o400)
            with os.fdopen(descriptor, "w") as file:
                file.write(sockets.connection(RUN_KERNEL))
            self._own(connection, uid)
            # The guard makes the kernel's socket in it, and makes it anew when it restarts.
            kernel.guard_directory.mkdir(mode=0o710)
            if not self._confinement.rootless:
                os.chown(kernel.guard_directory, 0, uid)
            kernel.sandboxed = await self._confinement.start(
                uid,
                order={
                    "connection": f"{RUN_KERNEL}/connection.json",
                    "warm": kernel.prepared.warm,
                    "readable": [*self._confinement.view.readable, "/usr", "/etc", "/proc", "/dev", "/run"],
                    "writable": list(WRITABLE),
                },
                environment=_early_environment(),
                bound=(Bound(str(kernel.guard_directory), RUN_GUARD), Bound(str(sockets.directory), RUN_KERNEL)),
                groups=kernel.cgroup.procs,
                keep=sockets.descriptors,
            )
        finally:
            sockets.close()

    def _own(self, path: Path, uid: int) -> None:
        if not self._confinement.rootless:
            os.chown(path, uid, uid, follow_symlinks=False)

    async def assign(self, prepared: Prepared, user: str, guard_socket: str, launch: KernelLaunch) -> Started:
        kernel = self._kernels[prepared.kernel]
        try:
            if not self.ready(prepared):
                raise UnavailableError("The kernel ended before it was given away.", next_step="Start another one.")
            inside = f"{RUN_GUARD}/{os.path.basename(guard_socket)}"
            if Path(guard_socket).parent != kernel.guard_directory:
                raise UnavailableError("The guard made the kernel's socket in another directory.")
            environment = kernel_environment(launch, home=HOME, user=user, guard_socket=inside)
            self._refuse_second_user(user)
            kernel.user = user
            home = await self.homes.acquire(user, launch.home_key)
            kernel.holds_home = True
            await self._attach(kernel, home)
            if not prepared.warm:
                await self._until_ready(kernel)
            message = json.dumps({"environment": environment}).encode()
            await asyncio.get_running_loop().sock_sendall(kernel.running.control, message)
        except BaseException as error:
            with contextlib.suppress(CloisterError):
                await self._bury(kernel)
            if isinstance(error, OSError):
                raise UnavailableError("The kernel can't be started.", why=f"{error}.") from error
            raise
        return Started(
            prepared.kernel,
            prepared.uid,
            user,
            self.sandbox,
            kernel.running.process,
            kernel.sockets.key,
            kernel.paths,
            guard_socket,
        )

    async def _attach(self, kernel: _Kernel, home: Path) -> None:
        """Raises OSError."""
        owners = None if self._confinement.rootless else (self.homes.owner, kernel.prepared.uid)
        await asyncio.to_thread(self._mounter.attach, str(home), HOME, kernel.running.namespace, owners)

    def _refuse_second_user(self, user: str) -> None:
        """Without root. Raises ConflictError."""
        others = {kernel.user for kernel in self._kernels.values()} - {None, user}
        if self._confinement.rootless and others:
            raise ConflictError(
                "Somebody else's kernels run in this cloister, which serves one user at a time.",
                why="An ordinary user of its machine runs it, so all kernels have the same uid and nothing but their "
                "sandboxes between them.",
                next_step="Wait until those kernels have ended, or ask the admin to run the cloister as root: then "
                "each kernel gets a uid of its own.",
            )

    def used(self, kernels: Sequence[Started]) -> int:
        """Bytes of memory that these kernels hold together; see `cloister_kernel.usage.Memory`."""
        total = 0
        for started in kernels:
            with contextlib.suppress(OSError, KeyError):
                total += self._kernels[started.kernel].cgroup.memory()
        return total

    def exceeded(self, kernel: Started) -> int | None:
        """The memory limit in MiB where Linux killed something of this kernel for it, else None."""
        with contextlib.suppress(OSError, KeyError):
            if self._kernels[kernel.kernel].cgroup.oom_kills():
                return self._limits.memory_bytes >> 20
        return None

    def ready(self, prepared: Prepared) -> bool:
        sandboxed = self._kernels[prepared.kernel].sandboxed
        return sandboxed is not None and sandboxed.process.returncode is None

    async def discard(self, prepared: Prepared) -> None:
        await self._bury(self._kernels[prepared.kernel])

    async def home_process(self, started: Started, operation: HomeOperation) -> HomeProcess:
        try:
            running, release = await self.homes.at_home(started.user, operation)
        except LayerError as error:
            raise UnavailableError("A file can't be moved now.", why=str(error)) from error
        into, output = running.process.stdin, running.process.stdout
        if into is None or output is None:
            raise UnavailableError("A file can't be moved.", why="What does it has no pipes.")
        return HomeProcess(running.process, into, output, HOME, None, release)

    def interrupt(self, started: Started) -> None:
        kernel = self._kernels.get(started.kernel)
        # What has ended is still known for a while; and its pid may be another's by now.
        if kernel is not None and kernel.running.pid in kernel.cgroup.pids():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(kernel.running.pid, signal.SIGINT)

    def exit_code(self, code: int) -> int:
        # bubblewrap passes a signal on as a shell does.
        return 128 - code if code > 128 else code

    async def end(self, started: Started) -> None:
        async with asyncio.timeout(KILL_SECONDS):
            await self._bury(self._kernels[started.kernel])

    async def _bury(self, kernel: _Kernel) -> None:
        """Every step is tried; a uid whose processes might go on stays lent."""
        prepared = kernel.prepared
        if kernel.sandboxed is not None:
            if kernel.sandboxed.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    kernel.sandboxed.process.kill()
            kernel.sandboxed.close()
        try:
            await kernel.cgroup.kill()
            if kernel.sandboxed is not None:
                await kernel.sandboxed.process.wait()
            await kernel.cgroup.remove()
        except LayerError as error:
            raise UnavailableError("Processes of an ended kernel go on.", why=str(error)) from error
        finally:
            if kernel.user is not None and kernel.holds_home:
                kernel.holds_home = False
                await self.homes.release(kernel.user)
            await asyncio.to_thread(shutil.rmtree, kernel.sockets.directory, ignore_errors=True)
            with contextlib.suppress(OSError):
                kernel.guard_directory.rmdir()
        self._kernels.pop(prepared.kernel, None)
        if not self._confinement.rootless:
            self._uids.give_back(prepared.uid)

    async def wipe(self, user: str) -> None:
        await self.homes.wipe(user)

    async def save(self) -> None:
        await self.homes.save_changed()

    async def recover(self) -> None:
        await self._cgroups.recover()
        await delete(*await asyncio.to_thread(named, self._directories, 12))

    async def close(self) -> None:
        for kernel in list(self._kernels.values()):
            with contextlib.suppress(CloisterError):
                await self._bury(kernel)
        await self.homes.close()
        self._mounter.close()
        self._cgroups.close()


def _early_environment() -> dict[str, str]:
    """What Python finds before the kernel is somebody's; its home isn't there yet."""
    return {
        "HOME": HOME,
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "TMPDIR": "/tmp",  # noqa: S108 - libzmq would make its own sockets in the current directory
        "IPYTHONDIR": "/tmp/.ipython",  # noqa: S108 - the sandbox's own
    }
