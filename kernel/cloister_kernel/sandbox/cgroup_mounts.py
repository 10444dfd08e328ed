"""Where cgroup hierarchies are mounted, and where a process stands in them (proc(5), cgroups(7)): text only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

UNIFIED = ""  # the key of the v2 hierarchy, beside the v1 controllers' names

_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """One mounted cgroup hierarchy: v2 where `keys` is {UNIFIED}, else v1 with the controllers in `keys`.

    `root` is the cgroup that shows at `point`: not "/" in a container without a cgroup namespace.
    """

    root: str
    point: str
    keys: frozenset[str]
    writable: bool


def parse_mountinfo(text: str) -> list[Mount]:
    """The cgroup mounts of /proc/self/mountinfo, in its order. Lines of another form are left out."""
    mounts = []
    for line in text.splitlines():
        before, dash, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if not dash or len(fields) < 6 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        keys = {UNIFIED} if kind[0] == "cgroup2" else set(kind[2].split(",")) - {"rw", "ro"}
        writable = "ro" not in fields[5].split(",") and "ro" not in kind[2].split(",")
        mounts.append(Mount(_unescape(fields[3]), _unescape(fields[4]), frozenset(keys), writable))
    return mounts


def parse_membership(text: str) -> dict[str, str]:
    """/proc/self/cgroup: the path of this process's cgroup by controller, and that of v2 under UNIFIED."""
    paths = {}
    for line in text.splitlines():
        number, first, rest = line.partition(":")
        controllers, second, path = rest.partition(":")
        if first and second and (controllers or number == "0"):
            paths.update(dict.fromkeys(controllers.split(","), path))
    return paths


def locate(mounts: Sequence[Mount], membership: Mapping[str, str], key: str) -> tuple[Path, bool] | None:
    """The directory of this process's cgroup in the hierarchy of `key`, and whether its mount is writable.

    None where the hierarchy isn't mounted or no mount shows this process's cgroup. A writable mount is preferred.
    """
    path = membership.get(key)
    if path is None or ".." in path.split("/"):
        return None
    found = None
    for mount in mounts:
        inside = _below(path, mount.root) if key in mount.keys else None
        if inside is not None and (found is None or (mount.writable and not found[1])):
            found = Path(mount.point, inside), mount.writable
    return found


def _below(path: str, root: str) -> str | None:
    """`path` relative to `root`; None where it doesn't lie there."""
    if path == root:
        return ""
    prefix = root.rstrip("/") + "/"
    return path[len(prefix) :] if path.startswith(prefix) else None


def _unescape(field: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), field)
