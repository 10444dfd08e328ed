"""Linux's namespace and mount calls, as the sandbox needs them. Standard library only.

mount(2), umount2(2), unshare(2), setns(2), open_tree(2), mount_setattr(2), move_mount(2), user_namespaces(7).
"""

from __future__ import annotations

import ctypes
import os
import struct

# linux/sched.h
CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
# linux/mount.h
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND = 1, 2, 4, 32, 4096
MS_REC, MS_SLAVE = 16384, 1 << 19
MNT_DETACH = 2
MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_IDMAP = 0x2, 0x4, 0x00100000
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 4
AT_FDCWD, AT_EMPTY_PATH = -100, 0x1000
# The same numbers on every architecture since Linux 5.2.
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, doing: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{doing}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """Raises OSError."""
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def setns(descriptor: int, kind: int) -> None:
    """Raises OSError."""
    _check(_libc.setns(ctypes.c_int(descriptor), ctypes.c_int(kind)), "setns")


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """Raises OSError."""
    _check(
        _libc.mount(
            os.fsencode(source),
            os.fsencode(target),
            kind.encode() if kind else None,
            ctypes.c_ulong(flags),
            options.encode() if options else None,
        ),
        f"mount {target}",
    )


def bind_read_only(source: str, target: str) -> None:
    """Show `source` (a file or a directory, without what is mounted below it) at `target`. Raises OSError."""
    mount(source, target, None, MS_BIND)
    mount("none", target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def unmount(target: str) -> None:
    """Also while it is in use: it goes when the last user does. Raises OSError."""
    _check(_libc.umount2(os.fsencode(target), ctypes.c_int(MNT_DETACH)), f"unmount {target}")


def detached_copy(path: str, id_map: int | None) -> int:
    """A descriptor of a mount that shows the tree at `path`, attached nowhere yet. Raises OSError.

    `id_map` is the descriptor of a user namespace by which owners are translated (mount_setattr(2), ID-mapped mounts).
    """
    tree = _check(
        _libc.syscall(
            ctypes.c_long(_OPEN_TREE),
            ctypes.c_int(AT_FDCWD),
            os.fsencode(path),
            ctypes.c_uint(OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC),
        ),
        f"open_tree {path}",
    )
    try:
        flags = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
        # struct mount_attr: attr_set, attr_clr, propagation, userns_fd (u64 each)
        if id_map is None:
            attributes = struct.pack("=QQQQ", flags, 0, 0, 0)
        else:
            attributes = struct.pack("=QQQQ", flags | MOUNT_ATTR_IDMAP, 0, 0, id_map)
        _check(
            _libc.syscall(
                ctypes.c_long(_MOUNT_SETATTR),
                ctypes.c_int(tree),
                b"",
                ctypes.c_uint(AT_EMPTY_PATH),
                attributes,
                ctypes.c_size_t(len(attributes)),
            ),
            f"mount_setattr {path}",
        )
    except BaseException:
        os.close(tree)
        raise
    return tree


def attach(tree: int, target: str) -> None:
    """Put a detached mount over `target` in the present mount namespace. Raises OSError."""
    _check(
        _libc.syscall(
            ctypes.c_long(_MOVE_MOUNT),
            ctypes.c_int(tree),
            b"",
            ctypes.c_int(AT_FDCWD),
            os.fsencode(target),
            ctypes.c_uint(MOVE_MOUNT_F_EMPTY_PATH),
        ),
        f"move_mount {target}",
    )


def enter_service_namespace() -> None:
    """Give this process a mount namespace of its own: what is mounted in it ends with the last process in it.

    Root keeps its user namespace. Anybody else gets one, too, in which the same uid may mount. To be called while the
    process has a single thread. Raises OSError.
    """
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        unshare(CLONE_NEWNS)
    else:
        unshare(CLONE_NEWUSER | CLONE_NEWNS)
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{uid} {uid} 1")
        _write("/proc/self/gid_map", f"{gid} {gid} 1")
    # Slave: what the machine unmounts goes here as well, and nothing of ours shows there.
    mount("none", "/", None, MS_REC | MS_SLAVE)


def owner_map(on_disk: int, seen: int) -> int:
    """A user namespace that translates one owner (uid and gid alike) to another, as a descriptor. Raises OSError.

    To be called by a process with a single thread and CAP_SETUID and CAP_SETGID.
    """
    ready_read, ready_write = os.pipe()
    done_read, done_write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(done_write)
            unshare(CLONE_NEWUSER)
            os.write(ready_write, b"1")
            os.read(done_read, 1)
        finally:
            os._exit(0)
    try:
        os.close(ready_write)
        ready_write = -1
        if os.read(ready_read, 1) != b"1":
            raise OSError("unshare: no user namespace could be made")
        for name in ("uid_map", "gid_map"):
            _write(f"/proc/{child}/{name}", f"{on_disk} {seen} 1")
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        for descriptor in (ready_read, ready_write, done_read, done_write):
            if descriptor >= 0:
                os.close(descriptor)
        os.waitpid(child, 0)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
