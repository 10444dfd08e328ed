"""Reading /proc/self/mountinfo and /proc/self/cgroup in the layouts that are met."""

from pathlib import Path

import pytest

from cloister_kernel.sandbox.cgroup_mounts import UNIFIED, Mount, locate, parse_membership, parse_mountinfo

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:10 master:2 - cgroup cgroup rw,memory
39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
"""
HYBRID = V1 + "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"


def place(mountinfo: str, membership: str, key: str) -> tuple[Path, bool] | None:
    return locate(parse_mountinfo(mountinfo), parse_membership(membership), key)


def test_unified() -> None:
    assert parse_mountinfo(V2) == [Mount("/", "/sys/fs/cgroup", frozenset({UNIFIED}), True)]
    assert place(V2, "0::/system.slice/cloister.service\n", UNIFIED) == (
        Path("/sys/fs/cgroup/system.slice/cloister.service"),
        True,
    )
    assert place(V2, "0::/\n", "memory") is None


def test_v1_and_controllers_mounted_together() -> None:
    membership = "9:name=systemd:/x\n4:memory:/process/1:2\n3:cpu,cpuacct:/\n2:pids:/a\n"
    assert place(V1, membership, "memory") == (Path("/sys/fs/cgroup/memory/process/1:2"), True)
    assert place(V1, membership, "cpu") == (Path("/sys/fs/cgroup/cpu,cpuacct"), True)
    assert place(V1, membership, "pids") == (Path("/sys/fs/cgroup/pids/a"), True)
    assert place(V1, membership, UNIFIED) is None


def test_hybrid_shows_both() -> None:
    membership = "4:memory:/m\n0::/u\n"
    assert place(HYBRID, membership, "memory") == (Path("/sys/fs/cgroup/memory/m"), True)
    assert place(HYBRID, membership, UNIFIED) == (Path("/sys/fs/cgroup/unified/u"), True)


def test_a_container_with_a_cgroup_namespace() -> None:
    assert place(V2, "0::/\n", UNIFIED) == (Path("/sys/fs/cgroup"), True)
    # What lies outside of the namespace can't be reached through the mount.
    assert place(V2, "0::/../other\n", UNIFIED) is None
    assert place(V2.replace("0:26 / ", "0:26 /../.. "), "0::/\n", UNIFIED) is None


def test_a_container_without_one_sees_its_cgroup_as_the_mounts_root() -> None:
    mounted = "50 40 0:29 /docker/abc /sys/fs/cgroup/memory ro,nosuid - cgroup cgroup rw,memory\n"
    assert place(mounted, "4:memory:/docker/abc\n", "memory") == (Path("/sys/fs/cgroup/memory"), False)
    assert place(mounted, "4:memory:/docker/abc/in\n", "memory") == (Path("/sys/fs/cgroup/memory/in"), False)
    assert place(mounted, "4:memory:/docker/abcd\n", "memory") is None


def test_a_writable_mount_is_preferred() -> None:
    read_only = "50 40 0:29 / /a ro - cgroup2 cgroup2 rw\n51 40 0:29 / /b rw - cgroup2 cgroup2 rw\n"
    assert place(read_only, "0::/x\n", UNIFIED) == (Path("/b/x"), True)


def test_escapes_in_a_mount_point() -> None:
    assert place(r"50 40 0:29 / /my\040dir\134x rw - cgroup2 none rw", "0::/\n", UNIFIED) == (Path("/my dir\\x"), True)


@pytest.mark.parametrize("text", ["", "\n", "no dash at all", "1 2 3 - cgroup", " - ", "::", "0", "x:y", "7::/p"])
def test_other_lines_are_left_out(text: str) -> None:
    assert parse_mountinfo(text) == []
    assert parse_membership(text) == {}
