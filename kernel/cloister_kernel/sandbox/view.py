"""What of the machine's files a sandbox shows: the plan of a stage, and bubblewrap's command line (bwrap(1)).

The stage is a directory in the service's own mount namespace. What a kernel needs to read stands there read-only, where
every uid can reach it: Python may lie below a directory that is closed to others, such as /root. The sandbox then shows
each piece under the path that it has on the machine.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cloister_data.errors import ConfigurationError
from cloister_kernel.mounts import Link, follow, within

PACKAGES = ("cloister", "cloister_attest", "cloister_budget", "cloister_data", "cloister_kernel")
HOME = "/home/cloister"
RUN_GUARD, RUN_KERNEL = "/run/guard", "/run/kernel"

SYSTEM = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
"""Links into /usr on most systems, directories on some."""
SETTINGS = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "fonts", "mime.types", "alternatives")
"""What of /etc is shown: nothing in it is secret or says whose machine it is."""
MASKED = (
    *(
        "diskstats",
        "interrupts",
        "softirqs",
        "schedstat",
        "vmstat",
        "zoneinfo",
        "buddyinfo",
        "pagetypeinfo",
        "slabinfo",
    ),
    *("timer_list", "kallsyms", "kcore", "keys", "key-users", "sched_debug", "modules", "iomem", "ioports", "cmdline"),
)
"""Files of /proc that count what the whole machine does, the guard's work too, or say how its kernel is laid out."""
FIXED = {
    "stat": "cpu 0 0 0 0 0 0 0 0 0 0\nintr 0\nctxt 0\nbtime 0\nprocesses 0\nprocs_running 1\nprocs_blocked 0\n",
    "loadavg": "0.00 0.00 0.00 1/1 1\n",
}
"""Files of /proc that programs expect to be able to read, with the same content for everybody."""
USERS = "cloister:x:{uid}:{uid}:notebook kernel:/home/cloister:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
GROUPS = "cloister:x:{uid}:\nnogroup:x:65534:\n"


@dataclass(frozen=True)
class Piece:
    """A file or directory: where it stands on the stage, and the path under which the sandbox shows it."""

    staged: str
    path: str


@dataclass(frozen=True)
class View:
    """What every sandbox of one service shows."""

    pieces: tuple[Piece, ...]
    links: tuple[Link, ...]

    @property
    def readable(self) -> list[str]:
        """The pieces, and the directories that they lie in: Python lists those. Nothing else is in them here."""
        parents = dict.fromkeys(os.path.dirname(piece.path) for piece in self.pieces)
        return [*(path for path in parents if path != "/"), *(piece.path for piece in self.pieces)]


def package_sources() -> list[str]:
    """The directories of the packages that a kernel imports, wherever they are installed."""
    found = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            found += list(spec.submodule_search_locations)
    return found


def import_path() -> str:
    """PYTHONPATH for a sandbox: where this service has Cloister's packages from, if not from its installation."""
    parents = dict.fromkeys(os.path.dirname(source) for source in package_sources())
    return os.pathsep.join(parent for parent in parents if not within(parent, os.path.realpath(sys.prefix)))


def interpreter(python: str) -> list[str]:
    """What Python needs to start and to import."""
    return [sys.base_prefix, sys.prefix, python, sysconfig.get_path("stdlib")]


def plan_view(needed: Sequence[str], stage: str) -> View:
    """Where each of `needed` goes. Raises ConfigurationError where one is missing or would show the whole machine."""
    real: list[str] = []
    links: dict[str, Link] = {}
    for path in needed:
        trail = follow(path)
        if trail.real == "/":
            raise ConfigurationError(f"A kernel can't be shown {path}: that is the whole machine.")
        real.append(trail.real)
        links.update({link.path: link for link in trail.links})
    tops = [path for path in dict.fromkeys(real) if not any(path != other and within(path, other) for other in real)]
    tops = [path for path in tops if not within(path, "/usr")]
    pieces = tuple(Piece(os.path.join(stage, str(number)), path) for number, path in enumerate(tops))
    shown = [*tops, "/usr"]
    kept = tuple(link for link in links.values() if not any(within(link.path, top) for top in shown))
    return View(pieces, tuple(link for link in kept if link.path not in SYSTEM))


@dataclass(frozen=True)
class Bound:
    """A directory of the machine that one sandbox shows under another path."""

    source: str
    path: str
    writable: bool = False


def bubblewrap(
    view: View, *, bwrap: str, status: int, data: dict[str, int], bound: Sequence[Bound], tmp_bytes: int
) -> list[str]:
    """The command up to the program that runs inside.

    `status` is the descriptor on which bubblewrap tells the pid of the sandbox's first process; `data` maps paths
    inside to descriptors that are read to the end for their content.
    """
    command = [bwrap, "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    command += ["--unshare-cgroup", "--disable-userns", "--cap-drop", "ALL", "--die-with-parent", "--new-session"]
    command += ["--clearenv", "--hostname", "cloister", "--json-status-fd", str(status)]
    command += ["--perms", "0755", "--size", str(16 << 20), "--tmpfs", "/", "--ro-bind", "/usr", "/usr"]
    for path in SYSTEM:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            command += ["--ro-bind", path, path]
    for name in SETTINGS:
        if os.path.exists(f"/etc/{name}"):
            command += ["--ro-bind", f"/etc/{name}", f"/etc/{name}"]
    command += ["--proc", "/proc", "--dev", "/dev"]
    for path in ("/dev/shm", "/tmp", "/var/tmp"):  # noqa: S108 - the sandbox's own
        command += ["--perms", "1777", "--size", str(tmp_bytes), "--tmpfs", path]
    # Later, for Cloister may be installed below /tmp.
    for piece in view.pieces:
        command += ["--ro-bind", piece.staged, piece.path]
    for link in view.links:
        command += ["--symlink", link.target, link.path]
    command += [
        "--dir",
        HOME,
    ]
    for each in bound:
        command += ["--bind" if each.writable else "--ro-bind", each.source, each.path]
    for path, descriptor in data.items():
        command += ["--ro-bind-data", str(descriptor), path]
    for name in MASKED:
        if os.path.exists(f"/proc/{name}"):
            command += ["--ro-bind", "/dev/null", f"/proc/{name}"]
    for path in ("/proc/pressure", "/proc/scsi", "/proc/acpi", "/proc/driver", "/proc/bus"):
        if os.path.isdir(path):
            command += ["--size", "4096", "--tmpfs", path, "--remount-ro", path]
    return [*command, "--remount-ro", "/", "--chdir", "/", "--"]


def contents(uid: int) -> dict[str, str]:
    """The small files that a sandbox gets, by their path in it."""
    proc = {f"/proc/{name}": text for name, text in FIXED.items() if os.path.exists(f"/proc/{name}")}
    return {"/etc/passwd": USERS.format(uid=uid), "/etc/group": GROUPS.format(uid=uid), **proc}


def stage_pieces(view: View) -> None:
    """Make the mount points of the stage. Raises OSError."""
    for piece in view.pieces:
        if os.path.isdir(piece.path):
            os.mkdir(piece.staged, 0o755)
        else:
            Path(piece.staged).touch(mode=0o644)
