"""What a kernel's process is given, and what it isn't."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cloister_data.errors import ConfigurationError, InvalidRequestError
from cloister_data.kernels import KernelLaunch
from cloister_kernel import uids
from cloister_kernel.kernel_files import kernel_environment
from cloister_kernel.launch import LaunchPlan
from cloister_kernel.uids import UID_FIRST, UID_LAST, UidPool
from cloister_kernel.unconfined import UnconfinedSpawner

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NOT CHECKED: changing the uid needs root")


def environment(**display: str) -> dict[str, str]:
    launch = KernelLaunch.model_validate({"verdict": "{}", "environment": display})
    return kernel_environment(launch, home="/h", user="alice", guard_socket="/g.sock")


def test_nothing_of_the_services_environment_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOISTER_SECRET", "x")
    found = environment(COLUMNS="120", TZ="Europe/Paris", LANG="de_DE.UTF-8")
    assert set(found) == {
        *("HOME", "USER", "LOGNAME", "PATH", "LANG", "SHELL", "CLOISTER_GUARD_SOCKET", "CLOISTER_VERDICT"),
        *("COLUMNS", "TZ"),
    }
    assert found["LANG"] == "de_DE.UTF-8"
    assert found["CLOISTER_GUARD_SOCKET"] == "/g.sock"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("TZ", "/etc/shadow"), ("TZ", ":/etc/shadow"), ("TZ", "../../x"), ("LANG", "/tmp/evil"), ("LANG", "")),
        *(("COLUMNS", "1\n2"), ("LINES", "-1"), ("NO_COLOR", "a b")),
    ],
)
def test_display_settings_are_values_not_paths(name: str, value: str) -> None:
    with pytest.raises(InvalidRequestError, match=name):
        environment(**{name: value})


def test_a_verdict_with_a_zero_byte_is_refused() -> None:
    with pytest.raises(InvalidRequestError):
        kernel_environment(KernelLaunch(verdict="a\0b"), home="/h", user="a", guard_socket="/g")


def test_uids_are_fresh_and_never_those_of_a_living_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uids, "uids_in_use", lambda: set(range(UID_FIRST, UID_LAST + 1, 2)))
    pool = UidPool()
    taken = [pool.take() for _ in range(50)]
    assert len(set(taken)) == 50
    assert all(uid % 2 == 1 and UID_FIRST <= uid <= UID_LAST for uid in taken)
    pool.give_back(taken[0])
    assert pool.take() not in taken  # round robin: not at once again


def test_a_path_too_long_for_sockets_is_refused_with_the_mend(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="runtime_dir"):
        UnconfinedSpawner(homes=tmp_path / "h", runtime=tmp_path / ("x" * 100))


@pytest.mark.parametrize("uid", [0, 1000, UID_FIRST - 1, UID_LAST + 1])
def test_no_plan_names_a_uid_outside_the_range(uid: int) -> None:
    with pytest.raises(ValueError, match="uid"):
        LaunchPlan(uid=uid, parent=1, home="/", arguments=("/x",), environment={})


@pytest.mark.parametrize("uid", ["0", "1000", "199999", "265536"])
def test_the_sweep_refuses_other_uids(uid: str) -> None:
    sweep = Path(uids.__file__).with_name("sweep.py")
    assert subprocess.run([sys.executable, "-I", "-S", sweep, uid], timeout=20).returncode == 2


def test_the_sweep_and_the_pool_mean_the_same_uids() -> None:
    from cloister_kernel import sweep

    assert (sweep.FIRST, sweep.LAST) == (UID_FIRST, UID_LAST)


def launch(plan: LaunchPlan) -> tuple[int, str]:
    """Run the trampoline alone; its exit status and what it reported."""
    read, write = os.pipe()
    command = [sys.executable, "-I", "-m", "cloister_kernel.launch", str(write)]
    done = subprocess.run(command, input=plan.to_json(), pass_fds=(write,), capture_output=True, timeout=30)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        return done.returncode, pipe.read().decode()


def test_the_trampoline_reports_why_it_refuses(tmp_path: Path) -> None:
    plan = LaunchPlan(parent=os.getpid(), home=str(tmp_path / "absent"), arguments=("/bin/true",), environment={})
    status, report = launch(plan)
    assert status == 71
    assert "absent" in report
    status, report = launch(plan.model_copy(update={"parent": 1, "home": "/"}))
    assert status == 71
    assert "ended while this kernel was starting" in report
    assert launch(plan.model_copy(update={"home": "/"})) == (0, "")


def test_only_what_the_plan_keeps_is_inherited() -> None:
    read, write = os.pipe()
    kept, stray = os.pipe()
    script = "import os, sys; os.write(int(sys.argv[1]), repr([*map(int, os.listdir('/proc/self/fd'))]).encode())"
    plan = LaunchPlan(
        parent=os.getpid(),
        home="/",
        arguments=(sys.executable, "-I", "-S", "-c", script, str(write)),
        environment={},
        keep=(write, kept),
    )
    status_read, status = os.pipe()
    command = [sys.executable, "-I", "-m", "cloister_kernel.launch", str(status)]
    subprocess.run(command, input=plan.to_json(), pass_fds=(status, write, kept, stray), timeout=30, check=True)
    found = os.read(read, 4096).decode()
    for descriptor in (read, write, kept, stray, status_read, status):
        os.close(descriptor)
    numbers = set(json.loads(found))
    assert {0, 1, 2, write, kept} <= numbers  # the control: what is kept is there
    assert stray not in numbers
    assert status not in numbers


@needs_root
def test_a_directory_open_to_others_is_not_hidden_without_a_view() -> None:
    state = Path(tempfile.mkdtemp(prefix="cl-state-"))
    uid = uids.UidPool().take()
    plan = LaunchPlan(
        uid=uid, parent=os.getpid(), home="/", arguments=("/bin/true",), environment={}, closed_to=(str(state),)
    )
    assert launch(plan) == (0, "")
    state.chmod(0o755)
    status, report = launch(plan)
    assert status == 71
    assert "chmod 700" in report
    state.rmdir()
