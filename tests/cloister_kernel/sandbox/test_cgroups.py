"""Each kernel's cgroup: what it bounds and what it leaves, on this machine's own hierarchies and on a tree of files."""

import asyncio
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister_kernel.sandbox.cgroup_mounts import UNIFIED, locate, parse_membership, parse_mountinfo
from cloister_kernel.sandbox.cgroups import CONTROLLERS, Cgroups, Limits, _move, find, settings
from cloister_kernel.sandbox.kernel_cgroup import KernelCgroup
from cloister_kernel.sandbox.layers import LayerError

MIB = 1024 * 1024
WIDE = Limits(memory_bytes=256 * MIB, pids=100, cpus=64)
NAME = f"cloister-test-{os.getpid()}"
ENTER = """
import os, sys
for path in sys.argv[1:]:
    with open(path, "w") as file:
        file.write("0")
"""
SLEEP = ENTER + "import time; print('in', flush=True); time.sleep(60)"
HOG = ENTER + "held = b'x' * (128 << 20)"
BURN = ENTER + "import time\nwhile time.process_time() < .06: pass"
BURN_ON = ENTER + "while True: pass"
# Bounded by itself too: 150 forks, each asleep in a session of its own.
FORKS = (
    ENTER
    + """
import time
made = 0
try:
    for _ in range(150):
        if os.fork() == 0:
            os.setsid()
            time.sleep(60)
            os._exit(0)
        made += 1
except BlockingIOError:
    print("refused", made, flush=True)
else:
    print("made", made, flush=True)
time.sleep(60)
"""
)


def kernel_id() -> str:
    return uuid.uuid4().hex


def start(code: str, group: KernelCgroup) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-I", "-S", "-c", code, *map(str, group.procs)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def first_word(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    return process.stdout.readline().split()


def finish(process: subprocess.Popen[str]) -> int:
    status = process.wait(60)
    assert process.stdout is not None
    process.stdout.close()
    return status


async def end(*kernels: KernelCgroup) -> None:
    for group in kernels:
        await group.kill()
        await group.remove()


@pytest.fixture
def groups() -> Iterator[Cgroups]:
    """Real cgroups of this machine, v2 or v1, for root or for an ordinary user to whom one is delegated."""
    try:
        made = find(NAME)
    except LayerError as error:
        pytest.skip(str(error))
    parents = list(made._parents.values())
    yield made
    made.close()
    again = find(NAME)
    asyncio.run(again.recover())
    again.close()
    assert not [parent for parent in parents if parent.exists()]


def test_memory_is_bounded_and_the_kill_is_counted(groups: Cgroups) -> None:
    small, wide = groups.make(kernel_id(), Limits(64 * MIB, 100, 64)), groups.make(kernel_id(), WIDE)
    assert finish(start(HOG, small)) == -9
    assert small.oom_kills() >= 1
    # The control: the same program under a limit that it respects.
    assert finish(start(HOG, wide)) == 0
    assert wide.oom_kills() == 0
    asyncio.run(end(small, wide))


def test_out_of_memory_v2_ends_the_whole_kernel_and_v1_one_process(groups: Cgroups) -> None:
    group = groups.make(kernel_id(), Limits(64 * MIB, 100, 64))
    bystander = start(SLEEP, group)
    assert first_word(bystander) == ["in"]
    assert finish(start(HOG, group)) == -9
    if groups.unified:
        assert bystander.wait(60) == -9
    else:
        assert bystander.poll() is None
    asyncio.run(end(group))
    assert finish(bystander) == -9


def test_a_tmpfs_is_charged_to_whoever_fills_it(groups: Cgroups) -> None:
    if not os.path.ismount("/dev/shm"):
        pytest.skip("/dev/shm is no tmpfs")
    group = groups.make(kernel_id(), WIDE)
    path = Path("/dev/shm", f"{NAME}-{kernel_id()}")
    try:
        before = group.memory()
        assert finish(start(ENTER + f"open({str(path)!r}, 'wb').write(bytes(16 << 20))", group)) == 0
        assert group.memory() - before >= 16 * MIB
    finally:
        path.unlink(missing_ok=True)
    asyncio.run(end(group))


def test_a_fork_bomb_is_bounded_and_killed_with_its_daemons(groups: Cgroups) -> None:
    small, wide = (
        groups.make(kernel_id(), Limits(256 * MIB, 20, 64)),
        groups.make(kernel_id(), Limits(256 * MIB, 200, 64)),
    )
    bomb, control = start(FORKS, small), start(FORKS, wide)
    assert first_word(bomb) == ["refused", "19"]
    assert first_word(control) == ["made", "150"]
    assert len(small.pids()) == 20
    assert len(wide.pids()) == 151
    for group, process in ((small, bomb), (wide, control)):
        asyncio.run(group.kill())
        assert group.pids() == []
        assert finish(process) == -9
        asyncio.run(group.remove())


def test_a_kill_without_cgroup_kill_ends_daemons_too(groups: Cgroups) -> None:
    """As on v1, and on v2 before Linux 5.14."""
    group = groups.make(kernel_id(), Limits(256 * MIB, 200, 64))
    process = start(FORKS, group)
    assert first_word(process) == ["made", "150"]
    for _ in range(3):
        group._kill_listed(group.pids())
    assert finish(process) == -9
    asyncio.run(end(group))


def test_the_cpu_quota_takes_hold(groups: Cgroups) -> None:
    small, wide = groups.make(kernel_id(), Limits(256 * MIB, 100, 0.1)), groups.make(kernel_id(), WIDE)
    assert finish(start(BURN, wide)) == 0
    assert wide.throttled() == 0
    process = start(BURN_ON, small)
    while not small.throttled():
        assert process.poll() is None
        time.sleep(0.01)
    asyncio.run(end(small, wide))
    assert finish(process) == -9


def test_enter_puts_a_process_in(groups: Cgroups) -> None:
    group = groups.make(kernel_id(), WIDE)
    with subprocess.Popen(["sleep", "60"]) as process:
        group.enter(process.pid)
        assert group.pids() == [process.pid]
        assert process.pid not in groups.make(kernel_id(), WIDE).pids()
        asyncio.run(end(group))
        assert process.wait(60) == -9
    assert group.pids() == []


def test_a_populated_cgroup_is_not_removed(groups: Cgroups, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloister_kernel.sandbox.kernel_cgroup.ROUNDS", 2)
    group = groups.make(kernel_id(), WIDE)
    process = start(SLEEP, group)
    assert first_word(process) == ["in"]
    with pytest.raises(LayerError, match="in use"):
        asyncio.run(group.remove())
    asyncio.run(end(group))
    finish(process)


def test_only_the_service_may_write_the_files(groups: Cgroups) -> None:
    group = groups.make(kernel_id(), WIDE)
    for directory in set(group.directories.values()):
        for path in (directory, *directory.iterdir()):
            assert path.stat().st_uid == os.geteuid()
            assert path.stat().st_mode & 0o022 == 0, path
    asyncio.run(end(group))


def test_cycles_leave_nothing(groups: Cgroups) -> None:
    descriptors = os.listdir("/proc/self/fd")
    for _ in range(200):
        group = groups.make(kernel_id(), WIDE)
        asyncio.run(end(group))
        assert not any(directory.exists() for directory in group.directories.values())
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)


def test_an_id_is_made_once(groups: Cgroups) -> None:
    kernel = kernel_id()
    group = groups.make(kernel, WIDE)
    with pytest.raises(LayerError, match="File exists"):
        groups.make(kernel, WIDE)
    assert all(directory.exists() for directory in group.directories.values())
    with pytest.raises(ValueError, match="kernel's id"):
        groups.make("../" + kernel[3:], WIDE)
    asyncio.run(end(group))


def test_a_name_is_held_by_one_service(groups: Cgroups) -> None:
    with pytest.raises(LayerError, match="Another kernel service"):
        find(NAME)


def test_recover_ends_what_a_dead_service_left_and_nothing_else(groups: Cgroups) -> None:
    kernel = kernel_id()
    group = groups.make(kernel, WIDE)
    process = start(SLEEP, group)
    assert first_word(process) == ["in"]
    others = {parent / "another" for parent in groups._parents.values()}
    for other in others:
        other.mkdir()
    groups.close()
    again = find(NAME)
    try:
        asyncio.run(again.recover())
        assert finish(process) == -9
        assert not any(directory.exists() for directory in group.directories.values())
        assert all(other.exists() for other in others)
    finally:
        for other in others:
            other.rmdir()
        again.close()


@pytest.fixture
def bare_v2() -> Iterator[Path]:
    """A cgroup of a real v2 hierarchy, which may have no controllers."""
    mounts = parse_mountinfo(Path("/proc/self/mountinfo").read_text())
    found = locate(mounts, parse_membership(Path("/proc/self/cgroup").read_text()), UNIFIED)
    if found is None or not found[1] or not os.access(found[0], os.W_OK):
        pytest.skip("no cgroup v2 to write to")
    made = found[0] / f"{NAME}-bare"
    made.mkdir()
    yield made
    for directory in (*(entry for entry in made.iterdir() if entry.is_dir()), made):
        directory.rmdir()


def test_v2_ends_a_tree_at_once_and_moves_processes(bare_v2: Path) -> None:
    group = KernelCgroup(True, dict.fromkeys(CONTROLLERS, bare_v2 / "kernel"))
    leaf = KernelCgroup(True, dict.fromkeys(CONTROLLERS, bare_v2 / "leaf"))
    for directory in (bare_v2 / "kernel", bare_v2 / "leaf"):
        directory.mkdir()
    process = start(FORKS, group)
    assert first_word(process) == ["made", "150"]
    _move(bare_v2 / "kernel", bare_v2 / "leaf")
    assert group.pids() == []
    assert len(leaf.pids()) == 151
    asyncio.run(end(leaf, group))
    assert finish(process) == -9


FILES = ("memory.max", "memory.swap.max", "memory.oom.group", "pids.max", "cpu.max", "cpu.weight")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A delegated v2 cgroup made of regular files, in which a new directory has its files at once."""
    make, remove = os.mkdir, os.rmdir

    def mkdir(path: Path, mode: int = 0o777) -> None:
        make(path, mode)
        for name in (*FILES, "cgroup.procs", "cgroup.subtree_control", "cgroup.type", "cgroup.controllers"):
            Path(path, name).touch()

    def rmdir(path: Path) -> None:
        for file in Path(path).iterdir():
            if file.is_file():
                file.unlink()
        remove(path)

    monkeypatch.setattr(os, "mkdir", mkdir)
    monkeypatch.setattr(os, "rmdir", rmdir)
    service = tmp_path / "cloister.service"
    mkdir(service)
    (service / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    (tmp_path / "mountinfo").write_text(f"30 23 0:26 / {tmp_path} rw - cgroup2 cgroup2 rw\n")
    (tmp_path / "membership").write_text("0::/cloister.service\n")
    return service


def find_in(tree: Path, name: str = "cloister") -> Cgroups:
    return find(name, mountinfo=tree.parent / "mountinfo", membership=tree.parent / "membership")


def test_v2_layout_and_values(tree: Path) -> None:
    groups = find_in(tree)
    assert groups.unified
    assert (tree / "cloister-service").is_dir()
    for shared in (tree, tree / "cloister-kernels"):
        assert (shared / "cgroup.subtree_control").read_text() == "+memory +pids +cpu"
    assert (tree / "cloister-kernels" / "cpu.weight").read_text() == "10"
    kernel = kernel_id()
    group = groups.make(kernel, Limits(512 * MIB, 64, 1.5))
    directory = tree / "cloister-kernels" / f"kernel-{kernel}"
    assert group.procs == (directory / "cgroup.procs",)
    values = {name: (directory / name).read_text() for name in FILES[:-1]}
    assert values == {
        "memory.max": "536870912",
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "pids.max": "64",
        "cpu.max": "150000 100000",
    }
    (directory / "memory.current").write_text("4096\n")
    (directory / "memory.events").write_text("low 0\noom 3\noom_kill 2\noom_group_kill 1\n")
    assert (group.memory(), group.oom_kills()) == (4096, 2)
    asyncio.run(group.kill())
    asyncio.run(group.remove())
    groups.close()
    assert [entry.name for entry in tree.iterdir() if entry.is_dir()] == []
    assert (tree / "cgroup.subtree_control").read_text() == "-memory -pids -cpu"


def test_v2_a_restarted_service_finds_its_cgroup_again(tree: Path) -> None:
    (tree / "cloister-service").mkdir()
    (tree.parent / "membership").write_text("0::/cloister.service/cloister-service\n")
    groups = find_in(tree)
    assert (tree / "cloister-kernels").is_dir()
    groups.close()


def test_v2_without_swap_accounting(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.FILES", tuple(name for name in FILES if name != "memory.swap.max"))
    groups = find_in(tree)
    group = groups.make(kernel_id(), WIDE)
    assert not (group.directories["memory"] / "memory.swap.max").exists()


@pytest.mark.parametrize("file", ["memory.max", "memory.oom.group", "pids.max", "cpu.max"])
def test_a_limit_that_cannot_be_set_refuses_and_leaves_nothing(
    tree: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    groups = find_in(tree)
    monkeypatch.setattr(f"{__name__}.FILES", tuple(name for name in FILES if name != file))
    with pytest.raises(LayerError, match=file):
        groups.make(kernel_id(), WIDE)
    assert [entry for entry in (tree / "cloister-kernels").iterdir() if entry.is_dir()] == []


@pytest.mark.parametrize("missing", CONTROLLERS)
def test_a_controller_that_is_not_delegated_is_named(tree: Path, missing: str) -> None:
    (tree / "cgroup.controllers").write_text(" ".join(key for key in CONTROLLERS if key != missing))
    with pytest.raises(LayerError) as caught:
        find_in(tree)
    assert caught.value.layer == "cgroup"
    assert f"no controller for {missing}." in caught.value.why
    assert "Delegate=yes" in caught.value.mend
    assert f"echo +{missing} > {tree.parent}/cgroup.subtree_control" in caught.value.mend


def refusal(tmp_path: Path, mountinfo: str, membership: str) -> LayerError:
    (tmp_path / "mountinfo").write_text(mountinfo)
    (tmp_path / "membership").write_text(membership)
    with pytest.raises(LayerError) as caught:
        find("cloister", mountinfo=tmp_path / "mountinfo", membership=tmp_path / "membership")
    return caught.value


def test_no_cgroups_at_all(tmp_path: Path) -> None:
    error = refusal(tmp_path, "", "")
    assert "memory and pids and cpu" in error.why
    assert "mount -t cgroup2" in error.mend


def test_a_v1_controller_that_is_not_mounted_is_named(tmp_path: Path) -> None:
    mounts = f"1 2 0:1 / {tmp_path} rw - cgroup none rw,memory\n2 2 0:2 / {tmp_path} rw - cgroup none rw,cpu\n"
    error = refusal(tmp_path, mounts, "1:memory:/\n2:cpu:/\n3:pids:/\n0::/\n")
    assert "no controller for pids." in error.why
    assert "mount -t cgroup -o pids cgroup /sys/fs/cgroup/pids" in error.mend


def test_controllers_split_between_v1_and_v2(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu pids\n")
    mounts = f"1 2 0:1 / {tmp_path} rw - cgroup none rw,memory\n2 2 0:2 / {tmp_path} rw - cgroup2 none rw\n"
    error = refusal(tmp_path, mounts, "1:memory:/\n0::/\n")
    assert "split" in error.why
    assert "cgroup_no_v1=all" in error.mend


def test_the_root_lacks_what_linux_lacks(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu pids\n")
    error = refusal(tmp_path, f"2 2 0:2 / {tmp_path} rw - cgroup2 none rw\n", "0::/\n")
    assert "no controller for memory." in error.why
    assert "cgroup_enable=memory" in error.mend


def test_a_read_only_mount(tree: Path) -> None:
    error = refusal(tree.parent, f"30 23 0:26 / {tree.parent} ro - cgroup2 cgroup2 rw\n", "0::/cloister.service\n")
    assert "read-only" in error.why


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    mounts = f"1 2 0:1 / {tmp_path} rw - cgroup none rw,memory,pids,cpu\n"
    assert "isn't there" in refusal(tmp_path, mounts, "1:memory,pids,cpu:/gone\n").why


def test_a_cgroup_that_is_not_ours_to_write(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for an ordinary user whose unit isn't delegated; root may write everything, so the answer is made up."""
    monkeypatch.setattr(os, "access", lambda path, mode, effective_ids: path != tree / "cgroup.procs")
    with pytest.raises(LayerError, match=r"may not write .*cgroup\.procs") as caught:
        find_in(tree)
    assert "systemd-run --user --scope -p Delegate=yes" in caught.value.mend
    assert [entry for entry in tree.iterdir() if entry.is_dir()] == []


def test_v1_bounds_memory_before_swap_and_the_period_before_the_quota() -> None:
    assert [(file, value) for _, file, value, _ in settings(Limits(64 * MIB, 5, 0.5), unified=False)] == [
        ("memory.limit_in_bytes", "67108864"),
        ("memory.memsw.limit_in_bytes", "67108864"),
        ("pids.max", "5"),
        ("cpu.cfs_period_us", "100000"),
        ("cpu.cfs_quota_us", "50000"),
    ]


@pytest.mark.parametrize(
    "limits",
    [(0, 1, 1.0), (MIB, 0, 1.0), (MIB, 1, 0.0), (MIB, 1, -1.0), (MIB, 1, float("nan")), (MIB, 1, float("inf"))],
)
def test_limits_that_bound_nothing_are_refused(limits: tuple[int, int, float]) -> None:
    with pytest.raises(ValueError, match="limits"):
        Limits(*limits)


def test_a_name_is_a_plain_word(tree: Path) -> None:
    with pytest.raises(ValueError, match="can't name"):
        find_in(tree, "../x")
