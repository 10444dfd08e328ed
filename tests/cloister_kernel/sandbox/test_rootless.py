"""The kernel service of an ordinary user: every layer, one uid, one user at a time."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloister_data.errors import CloisterError, ConflictError
from cloister_kernel.sandbox.cgroup_mounts import locate, parse_membership, parse_mountinfo
from tests.cloister_kernel.sandbox.scenes import KEY, Stage, needs_root, play

UID = 1000
# Where Python lies below a home that is closed to others, that home is emptied but for it, for this process alone.
AS_USER = """
set -e
for group in $1; do echo 0 > "$group/cgroup.procs"; done
if [ -n "$2" ]; then
    mount --bind "$2" /mnt
    mount -t tmpfs -o mode=755 tmpfs "$(dirname "$2")"
    mkdir "$2"
    mount --move /mnt "$2"
fi
shift 2
exec setpriv --reuid=1000 --regid=1000 --clear-groups --inh-caps=-all --ambient-caps=-all --bounding-set=-all "$@"
"""


def closed_python() -> str:
    """The directory below root's home that this Python lies in, or ""."""
    found = re.match(r"/root/[^/]+", os.path.realpath(sys.base_prefix))
    return found.group() if found else ""


@pytest.fixture
def delegated() -> Iterator[list[str]]:
    """A cgroup of this machine that belongs to an ordinary user, in each hierarchy: what systemd's Delegate= gives."""
    mounts = parse_mountinfo(Path("/proc/self/mountinfo").read_text())
    own = parse_membership(Path("/proc/self/cgroup").read_text())
    places = [locate(mounts, own, controller) for controller in ("memory", "pids", "cpu")]
    if None in places:
        pytest.skip("NOT CHECKED: only cgroup v1 can be delegated without moving this process")
    made: list[Path] = []
    try:
        for place in dict.fromkeys(place[0] for place in places if place is not None):
            made.append(Path(tempfile.mkdtemp(prefix="cl-rootless-", dir=place)))
            for path in (made[-1], *made[-1].iterdir()):
                os.chown(path, UID, UID)
        yield [str(path) for path in made]
    finally:
        for path in made:
            for child in sorted(path.rglob("*/"), reverse=True):
                with contextlib.suppress(OSError):
                    child.rmdir()
            path.rmdir()


def as_user(groups: list[str]) -> list[str]:
    """The beginning of a command. Skips where an ordinary user of this machine can't run this Python at all."""
    command = ["unshare", "-m", "sh", "-c", AS_USER, "sh", " ".join(groups), closed_python()]
    tried = subprocess.run([*command, sys.executable, "-c", "import cloister_kernel.service"], capture_output=True)
    if tried.returncode != 0:
        pytest.skip("NOT CHECKED: an ordinary user can't run this Python")
    return command


async def lives(stage: Stage) -> dict[str, Any]:
    found: dict[str, Any] = {}
    await stage.spawner.check()
    async with stage.kernel() as cell:
        found["uids"] = await cell.run("import os; print(*os.getresuid(), set(os.getgroups()) <= {1000, 65534})")
        status = (
            "print([line.split()[1] for line in open('/proc/self/status') if line.startswith(('CapBnd', 'Seccomp:'))])"
        )
        found["layers"] = await cell.run(status)
        await cell.run("open('notes', 'w').write('kept')")
        async with stage.kernel() as second:
            found["shared"] = await second.run("print(open('notes').read())")
        try:
            await stage.start("ben")
        except ConflictError as error:
            found["second user"] = str(error)
        found["still there"] = await cell.run("print(6 * 7)")
    await stage.idle()
    async with stage.kernel("ben") as cell:
        found["after her"] = await cell.run("import os; print(os.listdir('.'))")
    await stage.idle()
    async with stage.kernel(key=KEY) as cell:
        found["back"] = await cell.run("print(open('notes').read())")
    return found


@needs_root
def test_an_ordinary_users_service_confines_and_serves_one_user_at_a_time(delegated: list[str]) -> None:
    found = play(lives, before=as_user(delegated))
    said = found.pop("second user")
    assert "serves one user at a time" in said
    assert "all kernels have the same uid" in said
    assert "run the cloister as root" in said
    assert found == {
        "uids": "1000 1000 1000 True\n",
        "layers": "['0000000000000000', '2']\n",
        "shared": "kept\n",
        "still there": "42\n",
        "after her": "[]\n",
        "back": "kept\n",
    }


@needs_root
def test_without_delegated_cgroups_it_is_told_what_to_ask_for() -> None:
    with pytest.raises(AssertionError, match=r"(?s)confined on this machine: cgroup.*Delegate=yes"):
        play(lives, before=as_user([]))


async def two_users(stage: Stage) -> list[str]:
    said = []
    async with stage.kernel("ann", ""):
        try:
            async with stage.kernel("ben", "") as other:
                said.append(await other.run("print('started')"))
        except CloisterError as error:
            said.append(str(error))
    return said


@needs_root
def test_as_root_each_has_a_uid_and_users_mix() -> None:
    """The control."""
    assert play(two_users) == ["started\n"]
