"""What a kernel of its own uid can reach of the file system: the plan (pure but for looking), and carrying it out.

A directory that the uid can't traverse hides what lies below it, and sometimes what the kernel needs lies there: Python
under `/root`, a home under a closed directory. Then, in a mount namespace of the kernel's own, an empty tmpfs covers
that directory and only what is needed is bound back into it. The same covers hide what must not be seen.
"""

from __future__ import annotations

import ctypes
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from cloister_data.base import Text, Wire
from cloister_data.errors import ConfigurationError

# linux/sched.h, linux/mount.h
CLONE_NEWNS = 0x00020000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT = 1, 2, 4, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18

SCRATCH = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - the kernel's own, see Cover
MAX_LINKS = 40


class Bind(Wire):
    """A directory or file that stays reachable under its own path."""

    path: Text
    writable: bool = False


class Cover(Wire):
    """A directory that gets replaced by an empty one. `needed`: without it the kernel can't start at all."""

    path: Text
    mode: int
    needed: bool


class Link(Wire):
    """A symbolic link that is put back into a covered directory."""

    path: Text
    target: Text


class MountPlan(Wire):
    covers: tuple[Cover, ...] = ()
    binds: tuple[Bind, ...] = ()
    links: tuple[Link, ...] = ()


@dataclass(frozen=True)
class Trail:
    """Where a path really lies, and the links passed on the way there."""

    real: str
    links: tuple[Link, ...]


def follow(path: str) -> Trail:
    """Resolve `path` link by link. Raises ConfigurationError where it leads nowhere."""
    todo = list(reversed(Path(os.path.abspath(path)).parts[1:]))
    real, links = "/", []
    while todo:
        part = todo.pop()
        if part == "..":
            real = os.path.dirname(real)
            continue
        here = os.path.join(real, part)
        try:
            is_link = stat.S_ISLNK(os.lstat(here).st_mode)
        except OSError as error:
            raise ConfigurationError(f"The kernel needs {path}, which can't be found.", why=str(error)) from error
        if not is_link:
            real = here
            continue
        target = os.readlink(here)
        links.append(Link(path=here, target=target))
        if len(links) > MAX_LINKS:
            raise ConfigurationError(f"The kernel needs {path}, which is a circle of symbolic links.")
        if target.startswith("/"):
            real = "/"
        todo += reversed([piece for piece in target.split("/") if piece not in ("", ".")])
    return Trail(real, tuple(links))


def within(path: str, directory: str) -> bool:
    """Whether `path` lies below `directory` or is it (both real paths)."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _closed_ancestor(path: str) -> str | None:
    """The topmost directory above `path` that others can't traverse."""
    for ancestor in reversed(Path(path).parents):
        if not os.stat(ancestor).st_mode & stat.S_IXOTH:
            return str(ancestor)
    return None


def plan_mounts(needed: list[Bind], hidden: list[str], scratch: tuple[str, ...] = SCRATCH) -> MountPlan:
    """Which directories to cover, and what to bind back.

    `needed` must stay reachable for a fresh uid; `hidden` must not be seen; `scratch` is replaced by the kernel's own.
    """
    covers: dict[str, Cover] = {}
    for directory in scratch:
        if os.path.isdir(directory):
            real = os.path.realpath(directory)
            covers[real] = Cover(path=real, mode=0o1777, needed=False)
    for directory in hidden:
        if os.path.isdir(directory):
            real = os.path.realpath(directory)
            covers[real] = Cover(path=real, mode=0o711, needed=False)
    binds: dict[str, Bind] = {}
    links: dict[str, Link] = {}
    for bind in needed:
        trail = follow(bind.path)
        writable = bind.writable or (trail.real in binds and binds[trail.real].writable)
        binds[trail.real] = Bind(path=trail.real, writable=writable)
        links.update({link.path: link for link in trail.links})
        for place in (trail.real, *(link.path for link in trail.links)):
            closed = _closed_ancestor(place)
            if closed is not None:
                covers[closed] = Cover(path=closed, mode=0o711, needed=True)
    if "/" in covers:
        raise ConfigurationError(
            "Nobody but root may enter / on this machine, so a kernel of its own uid can't start.",
            next_step="chmod 755 / and try again.",
        )
    # A cover below another cover is gone with it.
    kept = [cover for cover in covers.values() if not any(_below(cover.path, other) for other in covers)]
    roots = [cover.path for cover in kept]
    return MountPlan(
        covers=tuple(sorted(kept, key=lambda cover: cover.path)),
        binds=tuple(
            sorted(
                (bind for bind in binds.values() if any(within(bind.path, root) for root in roots)),
                key=lambda bind: bind.path,
            )
        ),
        links=tuple(link for link in links.values() if any(within(link.path, root) for root in roots)),
    )


def _below(path: str, directory: str) -> bool:
    return path != directory and within(path, directory)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, doing: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{doing}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """mount(2). Raises OSError."""
    _check(
        _libc().mount(
            source.encode(),
            target.encode(),
            kind.encode() if kind else None,
            ctypes.c_ulong(flags),
            data.encode() if data else None,
        ),
        f"mount {target}",
    )


def own_mount_namespace() -> None:
    """unshare(2) with nothing propagating back. Raises OSError (EPERM without CAP_SYS_ADMIN)."""
    _check(_libc().unshare(ctypes.c_int(CLONE_NEWNS)), "unshare the mount namespace")
    _mount("none", "/", None, MS_REC | MS_PRIVATE)


def carry_out(plan: MountPlan, scratch_bytes: int) -> None:
    """Cover, then bind back, in the present mount namespace. Raises OSError."""
    # The handles are opened before the covers go on; a bind through them reaches what was there.
    handles = [(bind, os.open(bind.path, os.O_PATH | os.O_CLOEXEC)) for bind in plan.binds]
    try:
        for cover in plan.covers:
            options = f"mode={cover.mode:o},size={scratch_bytes},nr_inodes=65536"
            _mount("cloister", cover.path, "tmpfs", MS_NOSUID | MS_NODEV, options)
        placed: list[str] = []
        for bind, handle in handles:
            if any(within(bind.path, earlier) for earlier in placed if not bind.writable):
                continue
            _place(bind, handle)
            placed.append(bind.path)
        for link in plan.links:
            if not os.path.lexists(link.path):
                os.makedirs(os.path.dirname(link.path), mode=0o755, exist_ok=True)
                os.symlink(link.target, link.path)
    finally:
        for _, handle in handles:
            os.close(handle)


def _place(bind: Bind, handle: int) -> None:
    if stat.S_ISDIR(os.fstat(handle).st_mode):
        os.makedirs(bind.path, mode=0o755, exist_ok=True)
    elif not os.path.lexists(bind.path):
        os.makedirs(os.path.dirname(bind.path), mode=0o755, exist_ok=True)
        os.close(os.open(bind.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    # Without MS_REC: what is mounted below a needed directory is no part of it.
    _mount(f"/proc/self/fd/{handle}", bind.path, None, MS_BIND)
    flags = MS_REMOUNT | MS_BIND | MS_NOSUID | MS_NODEV
    _mount("none", bind.path, None, flags if bind.writable else flags | MS_RDONLY)
