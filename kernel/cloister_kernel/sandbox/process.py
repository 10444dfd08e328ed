"""Start a process in a sandbox: the steps from the service's rights down to none, and what the sandbox reports.

/bin/sh enters the cgroup while it still may, setpriv(1) gives up uid, groups and capabilities for good, bubblewrap
makes the namespaces and the view, and the shim closes the rest.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import struct
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Literal

from pydantic import Field, ValidationError

from cloister_data.base import Text, Wire
from cloister_data.errors import UnavailableError
from cloister_kernel.sandbox.layers import LayerError
from cloister_kernel.sandbox.view import Bound, View, bubblewrap, contents, import_path

LOCK_SECONDS = 30.0
MAX_REPORT = 64 << 10
ISOLATED = ("-s", "-P", "-Xfrozen_modules=off")
"""Python imports nothing from the home, which may be there already, nor from the current directory."""
SHIM = "from cloister_kernel.sandbox.shim import main; main()"
ENTER = 'for group in $1; do echo 0 > "$group" || exit 71; done; echo 500 > /proc/self/oom_score_adj; shift; exec "$@"'
_CREDENTIALS = struct.Struct("3i")


class Report(Wire):
    """What a sandbox says before anything of a user runs in it."""

    state: Literal["locked", "ready", "refused"]
    layer: Annotated[str, Field(max_length=100)] = ""
    why: Text = ""
    mend: Text = ""


@dataclass
class Sandboxed:
    """A process in a sandbox, and the service's end of the socket to it.

    `pid` is the Python process itself, as the service sees it; it leads a process group. `descriptors` are its mount
    namespace, and the pipe on which bubblewrap tells its end: it would die of a closed one, and its status with it.
    """

    process: asyncio.subprocess.Process
    control: socket.socket
    descriptors: list[int]
    pid: int

    @property
    def namespace(self) -> int:
        """A descriptor of the sandbox's mount namespace."""
        return self.descriptors[0]

    def close(self) -> None:
        """Let go of the descriptors; the process isn't touched."""
        self.control.close()
        while self.descriptors:
            os.close(self.descriptors.pop())


@dataclass(frozen=True)
class Confinement:
    """What all sandboxes of one service have in common. `rootless`: the service is an ordinary user's."""

    view: View
    bwrap: str
    python: str
    rootless: bool
    tmp_bytes: int

    async def start(
        self,
        uid: int,
        *,
        order: dict[str, Any],
        environment: dict[str, str],
        bound: Sequence[Bound] = (),
        groups: Sequence[Path] = (),
        keep: Sequence[int] = (),
        stdin: int = asyncio.subprocess.DEVNULL,
        stdout: int = asyncio.subprocess.DEVNULL,
    ) -> Sandboxed:
        """A process whose layers hold. Raises LayerError where one doesn't, UnavailableError where it ends before."""
        with ExitStack() as stack:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.callback(theirs.close)
            failed = stack.enter_context(ExitStack())
            failed.callback(ours.close)
            ours.setblocking(False)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            status_read, status_write = os.pipe()
            failed.callback(os.close, status_read)
            closing = stack.enter_context(ExitStack())
            closing.callback(os.close, status_write)
            data = {path: _sealed(text, stack) for path, text in contents(uid).items()}
            command = self._command(uid, status_write, data, bound)
            said = stack.enter_context(tempfile.TemporaryFile())
            complete = order | {
                "uid": uid,
                "gid": os.getegid() if self.rootless else uid,
                "rootless": self.rootless,
                "control": theirs.fileno(),
                "descriptors": list(keep),
            }
            for name, value in {"PYTHONPATH": import_path(), **environment}.items():
                command[-1:-1] = ["--setenv", name, value]
            process = await asyncio.create_subprocess_exec(
                *("/bin/sh", "-c", ENTER, "sh", " ".join(map(os.fspath, groups))),
                *command,
                *(self.python, *ISOLATED, "-c", SHIM, json.dumps(complete)),
                stdin=stdin,
                stdout=stdout,
                stderr=said,
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
                cwd="/",
                pass_fds=(theirs.fileno(), status_write, *data.values(), *keep),
                start_new_session=True,
            )
            failed.callback(_kill, process)
            closing.close()
            theirs.close()
            namespace = await _mount_namespace(process, status_read, said)
            failed.callback(os.close, namespace)
            pid = await _locked(process, ours, said)
            failed.pop_all()
            return Sandboxed(process, ours, [namespace, status_read], pid)

    def _command(self, uid: int, status: int, data: dict[str, int], bound: Sequence[Bound]) -> list[str]:
        inside = bubblewrap(
            self.view, bwrap=self.bwrap, status=status, data=data, bound=bound, tmp_bytes=self.tmp_bytes
        )
        if self.rootless:
            return ["setpriv", "--inh-caps=-all", "--no-new-privs", "--", *inside]
        drop = ["--clear-groups", "--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all", "--no-new-privs"]
        return ["setpriv", f"--reuid={uid}", f"--regid={uid}", *drop, "--", *inside]


def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()


def _sealed(text: str, stack: ExitStack) -> int:
    file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the stack
    stack.callback(file.close)
    file.write(text.encode())
    file.seek(0)
    return file.fileno()


async def _mount_namespace(process: asyncio.subprocess.Process, status: int, said: IO[bytes]) -> int:
    """A descriptor of the sandbox's mount namespace, from bubblewrap's word on the descriptor `status`."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=MAX_REPORT)
    pipe, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(os.dup(status), "rb")
    )
    try:
        async with asyncio.timeout(LOCK_SECONDS):
            told = await reader.readuntil(b"}")
    except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        code = await _ended(process)
        if code == 71:
            raise LayerError(
                "cgroup", "The kernel couldn't enter its own.", "Look at the cgroup's permissions."
            ) from error
        raise LayerError(
            "bubblewrap",
            f"It ended with status {code} before the namespaces stood: {_last_words(said)}",
            "Look whether `bwrap --unshare-all --ro-bind / / true` works as the same user; where user namespaces are "
            "forbidden (user.max_user_namespaces, AppArmor on Ubuntu 24.04), allow them to bubblewrap.",
        ) from error
    finally:
        pipe.close()
    found = {name: int(number) for name, number in re.findall(rb'"([a-z-]+)":\s*(\d+)', told)}
    namespace = os.open(f"/proc/{found[b'child-pid']}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    # The pid could have ended, and be another's by now.
    if os.fstat(namespace).st_ino != found.get(b"mnt-namespace"):
        os.close(namespace)
        raise UnavailableError("The kernel ended before it had started.")
    return namespace


async def _ended(process: asyncio.subprocess.Process) -> int:
    try:
        async with asyncio.timeout(5):
            return await process.wait()
    except TimeoutError:
        process.kill()
        return await process.wait()


async def _locked(process: asyncio.subprocess.Process, control: socket.socket, said: IO[bytes]) -> int:
    """Wait until the sandbox's layers hold; the pid of the process in it. Raises LayerError, UnavailableError."""
    report, pid = await receive(control)
    if report is None:
        code = await _ended(process)
        raise UnavailableError("The kernel ended before it had started.", why=f"Status {code}: {_last_words(said)}")
    if report.state == "refused":
        raise LayerError(report.layer, report.why, report.mend)
    return pid


def _last_words(said: IO[bytes]) -> str:
    """The end of what was written to standard error; no user's code has run by then."""
    said.seek(max(0, said.seek(0, os.SEEK_END) - 500))
    return " ".join(said.read().decode(errors="replace").split())


async def receive(control: socket.socket, seconds: float = LOCK_SECONDS) -> tuple[Report | None, int]:
    """One report and its sender's pid, which Linux vouches for; None where the other side has closed."""
    loop = asyncio.get_running_loop()
    arrived = loop.create_future()
    loop.add_reader(control, lambda: None if arrived.done() else arrived.set_result(None))
    try:
        async with asyncio.timeout(seconds):
            await arrived
    except TimeoutError:
        raise UnavailableError("The kernel took too long to start.") from None
    finally:
        loop.remove_reader(control)
    message, ancillary, _, _ = control.recvmsg(MAX_REPORT, socket.CMSG_SPACE(_CREDENTIALS.size))
    if not message:
        return None, 0
    sender = [data for level, kind, data in ancillary if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)]
    try:
        return Report.from_json(message), int(_CREDENTIALS.unpack(sender[0])[0])
    except (ValidationError, IndexError, struct.error) as error:
        raise UnavailableError("The kernel's sandbox can't be understood.") from error
