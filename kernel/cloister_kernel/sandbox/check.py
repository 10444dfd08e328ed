"""What a sandbox looks at in itself before anything of the user runs in it. Standard library only.

`before_filter` and `after_filter` raise LayerError for the first layer that didn't take hold. What only the service can
see, the cgroup, it looks at itself.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Collection

from cloister_kernel.sandbox.layers import LayerError

CLONE_NEWUSER = 0x10000000
REPORT = "This is a fault of the sandbox: tell the people who maintain Cloister."


def before_filter(uid: int, gid: int, descriptors: Collection[int], *, rootless: bool) -> None:
    """Uid, capabilities, namespaces, view, descriptors. Without root nobody can give groups up: they show as 65534."""
    groups = {gid, 65534} if rootless else {gid}
    if set(os.getresuid()) != {uid} or set(os.getresgid()) != {gid} or set(os.getgroups()) - groups:
        raise LayerError("own uid", "The kernel runs as another user or in other groups.", REPORT)
    status = _status()
    held = [name for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb") if int(status[name], 16) != 0]
    if held:
        raise LayerError("capabilities", f"The kernel keeps some ({', '.join(held)}).", REPORT)
    if status["NoNewPrivs"] != "1":
        raise LayerError("no_new_privs", "It didn't take hold.", REPORT)
    if os.getpid() > 8 or [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) > 8]:
        raise LayerError("pid namespace", "The kernel sees other processes.", REPORT)
    if socket.gethostname() != "cloister":
        raise LayerError("UTS namespace", "The kernel sees the machine's name.", REPORT)
    _no_network()
    _own_view()
    if ctypes.CDLL(None, use_errno=True).unshare(ctypes.c_int(CLONE_NEWUSER)) == 0:
        raise LayerError("user namespace", "The kernel could make another one.", "Install bubblewrap 0.8 or newer.")
    strangers = _open_descriptors() - {0, 1, 2, *descriptors}
    if strangers:
        raise LayerError("descriptors", f"The kernel inherited {sorted(strangers)}.", REPORT)


def after_filter() -> None:
    """The filter and Landlock: that Linux says so, and that what they forbid fails."""
    if _status()["Seccomp"] != "2":
        raise LayerError("seccomp", "Linux doesn't report a filter.", REPORT)
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()
    except OSError:
        pass
    else:
        raise LayerError("seccomp", "An internet socket can be made.", REPORT)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(ctypes.c_int(CLONE_NEWUSER)) == 0 or ctypes.get_errno() != errno.EPERM:
        raise LayerError("seccomp", "unshare(2) isn't refused by the filter.", REPORT)
    try:
        os.listdir("/")
    except PermissionError:
        return
    raise LayerError("Landlock", "A directory without a rule can be read.", REPORT)


def _no_network() -> None:
    with open("/proc/self/net/dev", encoding="ascii") as file:
        devices = [line.partition(":")[0].strip() for line in file if ":" in line]
    if [name for name in devices if name != "lo"]:
        raise LayerError("network namespace", "The kernel sees the machine's network.", REPORT)


def _own_view() -> None:
    if not os.statvfs("/").f_flag & os.ST_RDONLY:
        raise LayerError("read-only root", "The kernel could write to it.", REPORT)
    for path in ("/sys", "/etc/shadow", "/root/.ssh", "/var/lib", "/boot"):
        if os.path.lexists(path):
            raise LayerError("own view", f"The kernel sees {path}.", REPORT)


def _status() -> dict[str, str]:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}


def _open_descriptors() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            os.fstat(int(name))
        except OSError:
            continue  # the directory's own, closed by now
        found.add(int(name))
    return found
