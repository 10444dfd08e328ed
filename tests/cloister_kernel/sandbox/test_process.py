"""A layer that is missing keeps every kernel from starting, and is named with its mend."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from cloister_data.errors import ConfigurationError, Problem, UnavailableError
from cloister_data.kernels import MISCONFIGURED
from cloister_kernel.sandbox import process, stage
from cloister_kernel.sandbox.layers import LayerError
from tests.cloister_kernel.sandbox.scenes import Stage, needs_root, play
from tests.fakes.running import write_config

PATCH = "from cloister_kernel.sandbox import check, filter as calls, landlock, shim; "
# What is done to the first Python of a sandbox, and the layer that it then misses.
SPOILED = {
    "Landlock": "landlock.abi = lambda: 2",
    "Landlock, unset": "landlock.restrict = lambda *_: None",
    "seccomp": "calls.install = lambda: None",
    "system-call filter": "calls.NUMBERS = {}",
    "descriptors": "import os; os.open('/etc/passwd', 0)",
    "lock-down": "check.before_filter = lambda *_, **__: 1 / 0",
}
# What is left out of bubblewrap's command, or put in, and the layer that is then missing.
LEFT_OUT = {
    "network namespace": "--unshare-net",
    "pid namespace": "--unshare-pid",
    "UTS namespace": "--unshare-uts --hostname cloister",
    "user namespace": "--disable-userns",
    "read-only root": "--remount-ro / --chdir /",
}
PUT_IN = {"own view": ["--ro-bind", "/sys", "/sys"]}


def altered(command: list[str], left_out: str, put_in: list[str]) -> list[str]:
    """Words of the command's head go; others come before its end, `--remount-ro / --chdir / --`."""
    whole = " ".join(command)
    for words in (left_out,) if left_out in whole else left_out.split(" ", 1):
        assert words in whole
        whole = whole.replace(f" {words} ", " ", 1)
    kept = whole.split(" ")
    return [*kept[:-5], *put_in, *kept[-5:]] if put_in else kept


async def layers(scene: Stage) -> dict[str, Any]:
    """The layer that each fault is taken for, and whether it was mended by nothing but putting things back."""
    found: dict[str, Any] = {}
    shim, command, words = process.SHIM, process.bubblewrap, process.Confinement._command

    async def attempt(name: str) -> None:
        try:
            await scene.spawner.discard(await scene.spawner.prepare())
            found[name] = "started"
        except (ConfigurationError, UnavailableError) as error:
            found[name] = str(error)

    for name, spoiling in SPOILED.items():
        process.SHIM = f"{PATCH}{spoiling}; {shim}"
        await attempt(name)
    process.SHIM = shim
    for name in (*LEFT_OUT, *PUT_IN):
        left_out, put_in = LEFT_OUT.get(name, "--new-session"), PUT_IN.get(name, [])
        process.bubblewrap = lambda *given, left_out=left_out, put_in=put_in, **named: altered(  # type: ignore[misc]
            command(*given, **named), left_out, put_in
        )
        await attempt(name)
    process.bubblewrap = command
    process.Confinement._command = lambda *given: [  # type: ignore[method-assign]
        word.replace("--reuid=", "--reuid=1") for word in words(*given)
    ]
    await attempt("own uid")
    process.Confinement._command = words  # type: ignore[method-assign]
    await attempt("nothing")
    found["left"] = {name: os.listdir(scene.runtime / name) for name in ("k", "g", "h")}
    found["kernels"] = len(scene.spawner._kernels)
    return found


@needs_root
def test_each_missing_layer_is_named() -> None:
    found = play(layers)
    assert found.pop("left") == {"k": [], "g": [], "h": []}
    assert found.pop("kernels") == 0
    assert found.pop("nothing") == "started"  # the control
    for name, said in found.items():
        assert said.startswith(f"Kernels can't be confined on this machine: {name.partition(',')[0]}."), said
        assert "--unsafe-no-sandbox" in said
    assert "Linux 6.2" in found["Landlock"]


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_bubblewrap_has_to_be_there_and_new_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage.shutil, "which", lambda *_, **__: None)
    with pytest.raises(LayerError, match=r"bubblewrap\. It isn't installed\. Install it: apt-get install bubblewrap"):
        stage.find_bubblewrap()
    for said, why in (
        ("echo bubblewrap 0.7.9", "is version 0.7.9"),
        ("exit 1", "doesn't run"),
        ("echo", "doesn't run"),
    ):
        found = script(tmp_path / "bwrap", said)
        monkeypatch.setattr(stage.shutil, "which", lambda *_, found=found, **__: found)
        with pytest.raises(LayerError, match=why):
            stage.find_bubblewrap()
    found = script(tmp_path / "bwrap", "echo bubblewrap 0.11.0")
    assert stage.find_bubblewrap() == found


async def no_namespaces(scene: Stage) -> str:
    """As where user.max_user_namespaces is 0, or AppArmor forbids them."""
    confinement = scene.spawner._confinement
    said = "bwrap: No permissions to create new namespace"
    bwrap = script(scene.runtime / "bwrap", f"echo '{said}' >&2; exit 1")
    object.__setattr__(confinement, "bwrap", bwrap)
    try:
        await scene.spawner.check()
    except ConfigurationError as error:
        return str(error)
    return "started"


@needs_root
def test_what_bubblewrap_says_is_passed_on() -> None:
    said = play(no_namespaces)
    assert "Kernels can't be confined on this machine: bubblewrap." in said
    assert "No permissions to create new namespace" in said
    assert "AppArmor" in said


def test_without_a_mount_namespace_the_mend_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden() -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(stage, "enter_service_namespace", forbidden)
    with pytest.raises(LayerError, match=r"mount namespace\. None can be made .*max_user_namespaces"):
        stage.open_stage(tmp_path)


def isolated(home: Path, *flags: str) -> bool:
    """Whether a Python that starts with this home runs what lies in it."""
    ran = home / "ran"
    ran.unlink(missing_ok=True)
    environment = {"HOME": str(home), "PATH": os.environ["PATH"]}
    python = os.path.realpath(sys.executable)  # a virtual environment's has no packages of the user's
    subprocess.run([python, *flags, "-c", "import json"], env=environment, cwd=home, check=True, timeout=30)
    return ran.exists()


def test_a_python_of_the_sandbox_starts_nothing_from_a_home(tmp_path: Path) -> None:
    packages = tmp_path / ".local" / "lib" / f"python3.{sys.version_info[1]}" / "site-packages"
    packages.mkdir(parents=True)
    for name in ("usercustomize.py", "x.pth"):
        for place in (packages, tmp_path):
            (place / name).write_text(f"import os; open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    assert not isolated(tmp_path, *process.ISOLATED)
    assert isolated(tmp_path)  # the control
    shutil.rmtree(tmp_path / ".local")
    (tmp_path / "json.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    assert not isolated(tmp_path, *process.ISOLATED)
    assert isolated(tmp_path)


def without_bubblewrap(*command: str) -> list[str]:
    """A command in a mount namespace where bwrap can't be run."""
    places = "/usr/local/bin/bwrap /usr/bin/bwrap /bin/bwrap"
    hide = f'for at in {places}; do [ ! -e $at ] || mount --bind /dev/null $at; done; exec "$@"'
    return ["unshare", "-m", "sh", "-c", hide, "sh", *command]


@needs_root
def test_a_service_that_cant_confine_ends_and_leaves_the_reason() -> None:
    runtime = Path(tempfile.mkdtemp(prefix="cl-"))
    try:
        options = [
            "--socket",
            runtime / "s.sock",
            "--control",
            runtime / "c",
            "--runtime",
            runtime,
            "--vault",
            runtime / "v",
        ]
        command = [sys.executable, "-m", "cloister_kernel.service", *map(str, options)]
        done = subprocess.run(without_bubblewrap(*command), capture_output=True, text=True, timeout=60)
        assert done.returncode == MISCONFIGURED
        problem = Problem.from_json((runtime / "s.problem").read_bytes())
        assert "bubblewrap" in problem.title
        assert "apt-get install bubblewrap" in json.dumps(problem.model_dump())
        assert not (runtime / "s.sock").exists()
    finally:
        shutil.rmtree(runtime, ignore_errors=True)


@needs_root
def test_serve_fails_with_that_reason_and_goes_without_a_sandbox_only_when_told() -> None:
    base, runtime = (Path(tempfile.mkdtemp(prefix=prefix)) for prefix in ("clo-state-", "clo-run-"))
    serve = "import typer; from cloister_cli.serve import serve; typer.run(serve)"
    config = write_config(base, runtime)
    command = without_bubblewrap(sys.executable, "-c", serve, "--config", str(config))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert "Kernels can't be confined on this machine: bubblewrap." in done.stderr
        assert "apt-get install bubblewrap" in done.stderr
        assert "--unsafe-no-sandbox" in done.stderr
        running = subprocess.Popen([*command, "--unsafe-no-sandbox"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 60
            while not (base / "state" / "ready.json").exists():
                assert running.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            running.terminate()
            said = running.communicate(timeout=60)[0].decode()
        assert "KERNELS ARE NOT CONFINED" in said
        assert running.returncode == 0
    finally:
        shutil.rmtree(base, ignore_errors=True)
        shutil.rmtree(runtime, ignore_errors=True)
