"""What a kernel's process is given, confined or not: its sockets, its connection file, its environment."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cloister_data.errors import ConfigurationError, InvalidRequestError
from cloister_data.framing import Channel
from cloister_data.kernels import KernelLaunch

MAX_SOCKET_PATH = 107
_DISPLAY = {
    "COLUMNS": re.compile(r"[0-9]{1,5}"),
    "LINES": re.compile(r"[0-9]{1,5}"),
    "NO_COLOR": re.compile(r"[0-9A-Za-z]{0,8}"),
    "LANG": re.compile(r"[A-Za-z0-9_.@-]{1,64}"),
    "TZ": re.compile(r"[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z0-9_+-]+)*"),
}


def kernel_environment(launch: KernelLaunch, *, home: str, user: str, guard_socket: str) -> dict[str, str]:
    """Everything that the kernel finds in its environment: nothing is inherited. Raises InvalidRequestError."""
    environment = {
        "HOME": home,
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


def check_socket_length(runtime: Path) -> None:
    """Raises ConfigurationError where the sockets below `runtime` would get a path that is too long."""
    longest = runtime / "k" / ("0" * 12) / "k-9999"
    if len(os.fsencode(longest)) > MAX_SOCKET_PATH:
        raise ConfigurationError(
            f"The path {runtime} is too long for sockets.",
            why=f"A Unix socket's path holds {MAX_SOCKET_PATH} bytes.",
            next_step="Set runtime_dir to a short directory, such as /run/cloister.",
        )


def named(directory: Path, digits: int) -> list[Path]:
    """What lies in `directory` under the first `digits` hex digits of a kernel's id."""
    return sorted(path for path in directory.iterdir() if re.fullmatch(f"[0-9a-f]{{{digits}}}", path.name))


@dataclass
class KernelSockets:
    """The listening sockets of one kernel in a directory of its own, and the key of its messages.

    The service binds them and the kernel inherits them: it never binds a name of its own, and nothing that it could put
    in a socket's place is ever connected to. A descriptor's number is the port number of the connection file.
    """

    directory: Path
    key: bytes = field(default_factory=lambda: secrets.token_hex(32).encode())
    listening: dict[Channel, socket.socket] = field(default_factory=dict)

    def open(self, own: Callable[[Path], None]) -> None:
        """`own` gives a path to the kernel's uid. Raises OSError."""
        self.directory.mkdir(mode=0o711)
        self.directory.chmod(0o711)
        for channel in Channel:
            bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.listening[channel] = bound
            path = self._path(bound)
            bound.bind(str(path))
            # The kernel itself may connect (its debugger does); the directory stays the service's.
            path.chmod(0o600)
            own(path)
            bound.listen(16)

    @property
    def paths(self) -> dict[Channel, str]:
        """Where the service connects."""
        return {channel: str(self._path(bound)) for channel, bound in self.listening.items()}

    @property
    def descriptors(self) -> tuple[int, ...]:
        return tuple(bound.fileno() for bound in self.listening.values())

    def connection(self, directory: str) -> str:
        """The Jupyter connection file's content for a kernel that sees the sockets' directory as `directory`."""
        numbers = {f"{channel.name.lower()}_port": bound.fileno() for channel, bound in self.listening.items()}
        return json.dumps(
            {
                "transport": "ipc",
                "ip": f"{directory}/k",
                "signature_scheme": "hmac-sha256",
                "key": self.key.decode(),
                "hb_port": 1,
                **numbers,
            }
        )

    def close(self) -> None:
        """The service's copies; the kernel keeps its own."""
        for bound in self.listening.values():
            bound.close()

    def _path(self, bound: socket.socket) -> Path:
        return self.directory / f"k-{bound.fileno()}"
