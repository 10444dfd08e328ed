"""A hostile notebook: the attacks of tests/attack/battery from inside a real kernel, and with nothing that confines.

Attacks on models, the ledger and the audit log have tests of their own: tests/cloister_data/test_graph.py and
tests/cloister_guard/training; tests/cloister_budget; the other files beside this one.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager

import cloister_kernel
from cloister_data.datasets import SplitRef
from cloister_data.identity import WhoAmI
from cloister_data.kernels import KernelList
from cloister_data.release import Release
from cloister_data.schema import RealColumn, Schema, TextColumn
from cloister_data.statistics import QueryRequest, Question
from cloister_kernel.holdings import KERNEL_BYTES
from cloister_kernel.kernelspec import install_kernelspec
from tests.attack.battery.processes import SIGNALS
from tests.attack.battery.registry import MARK
from tests.fakes.battery import (
    PROTOCOL,
    SANDBOX,
    Effects,
    Growth,
    Report,
    Watch,
    kernel_of,
    marked_processes,
    run_bare,
    run_in_its_place,
    run_in_kernel,
)
from tests.fakes.canaries import DECOY, Canaries, planted
from tests.fakes.kernel_client import run
from tests.fakes.running import RunningCloister, make_policy, running_cloister

UNCONFINED = ("--unsafe-no-sandbox",)
"""How `cloister serve` is started for the control."""
CONFINED_CONFIG = "kernel_memory_mb = 512\nkernel_processes = 256\nhome_mb = 32\n"
"""Lines of the configuration that set a confined kernel's limits below SIZES."""
SIZES = {
    "processes": 600,
    "memory": 64 << 20,
    "disk": 80 << 20,
    "files": 10_000,
    "descriptors": 20_000,
    "message": 32 << 20,
    "messages": 5_000,
    "endless": 640 << 20,
}
"""How much the attacks on limits use: bytes and numbers. A limit that takes hold later than that isn't seen."""

MUCH = 160 << 20
"""Bytes by which a hostile kernel must not make the guard grow."""
HELD = KERNEL_BYTES + MUCH
"""The same for the kernel service, which holds so much of one kernel's output for a laptop that is away."""

SCHEMA = Schema(
    privacy_unit="unit",
    columns=(
        TextColumn(name="unit", max_bytes=32),
        RealColumn(name="value", low=0, high=100),
        TextColumn(name="note", max_bytes=64),
    ),
)


@dataclass
class Ground:
    """A cloister with two users' kernels, and everything planted around them."""

    cloister: RunningCloister
    canaries: Canaries
    attacker: tuple[KernelManager, BlockingKernelClient]
    specs: KernelSpecManager
    watch: Watch
    effects: Effects


def _data(canaries: Canaries) -> pd.DataFrame:
    rows = range(60)
    return pd.DataFrame(
        {
            "unit": [f"u{row}" for row in rows],
            "value": [float(row % 40) for row in rows],
            "note": [canaries.secrets.make("row") for _ in rows],
        }
    )


def _owned(found: RunningCloister, canaries: Canaries) -> None:
    """A dataset for each user, and an answer that bob has paid for."""
    given = canaries.given
    for user in ("ann", "bob"):
        found.add_user(user, "scientist")
        data = _data(canaries)
        found.upload(f"hospital/{user}s", data, SCHEMA, make_policy(f"hospital/{user}s", {user: 40.0}))
    request, question = (
        secrets.token_hex(16),
        Question(source=SplitRef(dataset="hospital/bobs"), operation="mean", column="value"),
    )
    paid = found.session("bob").transport.call(
        "POST", "/queries", QueryRequest(request_id=request, question=question, epsilon=0.5), Release
    )
    given |= {"own_dataset": "hospital/anns", "true_mean": float(data["value"].mean()), "rows_mark": f"{MARK}row:"}
    given["victim"] = {
        "user": "bob",
        "dataset": "hospital/bobs",
        "request": request,
        "release": paid.release,
        "epsilon": 0.5,
    }


PREPARE = """
import json, os, subprocess, sys
def plant(path, text):
    with open(path, "w") as file:
        file.write(text)
    os.chmod(path, 0o644)
plant(os.path.expanduser("~/secret"), {secret!r})
os.chmod(os.path.expanduser("~"), 0o755)
for place in ("/tmp", "/var/tmp", "/dev/shm"):
    try:
        plant(place + "/{name}", {secret!r})
    except OSError:
        pass
decoy = subprocess.Popen([sys.executable, "-I", "-c", {decoy!r}, {argument!r}], stdout=subprocess.PIPE, text=True,
                         env={{"SECRET": {secret!r}}}, cwd=os.path.expanduser("~"))
told = json.loads(decoy.stdout.readline())
print(json.dumps(told | {{"home": os.path.expanduser("~"), "socket": os.environ["CLOISTER_GUARD_SOCKET"]}}))
"""


def _victim(found: RunningCloister, canaries: Canaries, manager: KernelManager, client: BlockingKernelClient) -> None:
    """What bob's kernel has that ann's must not reach: files, a process, sockets, a session."""
    given, secret, argument = canaries.given, canaries.secrets.make("victim"), canaries.secrets.make("victim-argument")
    name = f"canary-{secrets.token_hex(4)}"
    status, text = run(client, PREPARE.format(secret=secret, name=name, decoy=DECOY, argument=argument))
    assert status == "ok", text
    told = json.loads(text)
    # In a namespace of its own it has another number there.
    (told["pid"],) = marked_processes(argument)
    (kernel,) = found.session("bob").transport.call("GET", "/kernels", None, KernelList).kernels
    given["victim"] |= told | {
        "kernel": kernel.kernel,
        "scratch": [f"{place}/{name}" for place in ("/tmp", "/var/tmp", "/dev/shm")],
        "session": client.session.session,
        "message": client.kernel_info(),
        "comm": secrets.token_hex(16),
    }
    client.get_shell_msg(timeout=20)
    given["secrets"]["victim_home"] = f"{told['home']}/secret"
    sockets = [path for path in found.runtime.rglob("*") if path.is_socket() and kernel.kernel[:12] in str(path)]
    guards = [path for path in sockets if path.name == "guard.sock"]
    given["sockets"] = {
        "control": str(found.runtime / "control.sock"),
        "service": str(found.runtime / "kernels.sock"),
        "victim_guard": str(guards[0]),
        "victim_jupyter": [str(path) for path in sockets if path not in guards],
    }
    assert given["sockets"]["victim_jupyter"]
    given["machine"]["victim"] = True


def _around(found: RunningCloister, canaries: Canaries) -> None:
    """The guard, its service, and where Python imports from."""
    given, token = canaries.given, secrets.token_hex(8)
    state = found.state / "secret"
    state.write_text(canaries.secrets.make("state"))
    state.chmod(0o644)
    given["secrets"]["state"] = str(state)
    host, port = found.url.removeprefix("https://").rsplit(":", 1)
    given["guard"] = {"pid": found.process.pid, "address": [host, int(port)]}
    packages = [os.path.dirname(path) for path in (os.__file__, cloister_kernel.__file__, json.__file__)]
    prefixes = [sys.prefix, sys.base_prefix, sysconfig.get_path("purelib"), sysconfig.get_path("scripts")]
    given |= {
        "plant": f"canary-{token}.txt",
        "import_directories": [*packages, *prefixes, "/usr/lib", "/usr/local/lib", "/etc"],
        "service_directories": [str(found.runtime), str(found.runtime / "k"), str(found.state), os.getcwd(), "/"],
        "executed": str(found.state / f"executed-{token}"),
        "log_line": f"forged-{token}",
        "forged": f"forged-{token}",
        "daemon": f"daemon-{token}",
        "limits": SIZES,
    }
    given["machine"] |= {"guard": True, "leaked_descriptor": True, "memory_hog": True}


def _pending(pid: int) -> set[int]:
    """The signals that wait in a process which blocks them."""
    found = set()
    for path in (f"/proc/{pid}/status", f"/proc/{pid}/task/{pid}/status"):
        for line in Path(path).read_text().splitlines():
            if line.startswith(("SigPnd:", "ShdPnd:")):
                bits = int(line.split()[1], 16)
                found |= {number + 1 for number in range(64) if bits >> number & 1}
    return found


def _seen(happened: bool, what: str) -> str:
    return what if happened else ""


def _trusted(found: RunningCloister) -> tuple[psutil.Process, psutil.Process]:
    """(guard, kernel service)."""
    guard = psutil.Process(found.process.pid)
    (service,) = [child for child in guard.children() if "cloister_kernel.service" in child.cmdline()]
    return guard, service


def _effects(found: RunningCloister, canaries: Canaries, heard: list[str], growth: Growth) -> Effects:
    given = canaries.given
    guard, service = _trusted(found)
    files = guard.num_fds()

    def grown(process: psutil.Process, much: int = MUCH) -> str:
        more = growth.of(process)
        return _seen(more > much, f"it grew by {more >> 20} MiB")

    def planted_file(kind: str, prefix: str = "") -> str:
        places = [*given[kind], *map(str, canaries.directories.values())]
        there = [path for place in places if (path := Path(place, prefix + given["plant"])).exists()]
        for path in there:
            path.unlink()
        return ", ".join(map(str, there))

    def log() -> str:
        text = (found.base / "serve.log").read_text(errors="replace")
        lines = [line for line in text.splitlines() if line.startswith(given["log_line"]) or "\x1b" in line]
        return lines[0] if lines else ""

    def forged() -> str:
        return next((each[:200] for each in heard if given["forged"] in each), "")

    effects: Effects = {
        "files: something put where Python imports from": lambda: planted_file("import_directories"),
        "files: something put into the service's directories": lambda: planted_file("service_directories", "service-"),
        "files: a read-only file changed through /proc/self/mem": lambda: _seen(
            "OVERWRITTEN" in Path(given["secrets"]["readonly"]).read_text(), "it was changed"
        ),
        "guard: a pickle, a YAML and XML": lambda: _seen(os.path.exists(given["executed"]), "a command was executed"),
        "guard: descriptors by SCM_RIGHTS, to the guard and from it": lambda: _seen(
            guard.num_fds() > files + 400, f"the guard has {guard.num_fds()} open files, where it had {files}"
        ),
        "guard: a body that never ends": lambda: grown(guard),
        "guard: two hundred large bodies, none of them finished": lambda: grown(guard),
        "peer: a message that never ends": lambda: grown(service, HELD),
        "guard: lines put into its log": log,
        "output: messages that claim another session's request": forged,
        "output: messages for another session's comm": forged,
    }
    for role in ("decoy", "victim"):
        process = psutil.Process(given[role]["pid"])
        effects |= {
            f"processes: {role}'s nice value": lambda p=process: _seen(p.nice() == 7, "nice 7"),  # type: ignore[misc]
            f"processes: {role}'s processors": lambda p=process: _seen(p.cpu_affinity() == [0], "processor 0 only"),  # type: ignore[misc]
            f"processes: {role}'s limits": lambda p=process: _seen(  # type: ignore[misc]
                p.rlimit(psutil.RLIMIT_NOFILE)[0] == 77, "77 files"
            ),
        }
        for way, (number, _) in SIGNALS.items():
            effects[f"processes: a signal to {role} by {way}"] = lambda p=process, n=number: _seen(  # type: ignore[misc]
                n in _pending(p.pid), f"signal {n} arrived"
            )
    return effects


@contextlib.contextmanager
def ground(arguments: tuple[str, ...], tmp_path: Path, config: str = "") -> Iterator[Ground]:
    with contextlib.ExitStack() as stack:
        canaries = stack.enter_context(planted())
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        # The guard and its service have it; their kernels must not.
        patch.setenv("CLOISTER_TEST_SECRET", canaries.secrets.make("service-environment"))
        found = stack.enter_context(running_cloister(f"refusals_per_minute = 10000\n{config}", arguments=arguments))
        _owned(found, canaries)
        for user in ("ann", "bob"):
            found.session(user)
            install_kernelspec(user, user, tmp_path)
        specs = KernelSpecManager(kernel_dirs=[str(tmp_path / "kernels")], ensure_native_kernel=False)
        manager, client = stack.enter_context(kernel_of("bob", specs))
        _victim(found, canaries, manager, client)
        _around(found, canaries)
        attacker = stack.enter_context(kernel_of("ann", specs))
        session = found.session("bob")
        watch = Watch(lambda: session.transport.call("GET", "/me", None, WhoAmI), client)
        watch.start()
        stack.callback(watch.stop)
        growth = Growth(*_trusted(found))
        growth.start()
        stack.callback(growth.stop)
        yield Ground(found, canaries, attacker, specs, watch, _effects(found, canaries, watch.heard, growth))


def attack(scene: Ground, themes: tuple[str, ...]) -> Report:
    """Attack from inside ann's kernel, which is then ended while it loops and ignores signals."""
    manager, client = scene.attacker
    inside = tuple(theme for theme in themes if theme != "peer")
    report = run_in_kernel(client, scene.canaries, scene.effects, scene.watch, inside)
    daemon = scene.canaries.given["daemon"]
    started = marked_processes(daemon)
    client.execute("import signal\nfor n in (2, 15): signal.signal(n, signal.SIG_IGN)\nwhile True: pass")
    manager.interrupt_kernel()
    manager.shutdown_kernel(now=True)
    deadline = time.monotonic() + 10
    while marked_processes(daemon) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = marked_processes(daemon)
    report.settle({"limits: a daemon that outlives its kernel": lambda: _seen(bool(left), f"processes {left} go on")})
    assert started or "limits" not in themes, "the daemon wasn't even started"
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    if "peer" not in themes:
        return report
    with kernel_of("ann", scene.specs) as (_, lost):
        report.results += run_in_its_place(lost, scene.canaries, scene.effects, scene.watch)
    return report


# What only the sandbox stops: open in a kernel that has none, whoever runs the tests.
OPEN_WITHOUT = {
    "files: a world-readable secret elsewhere",
    "files: a copy in memory of a program, which reads a secret",
    "files: counters of the whole machine in /proc",
    "files: /sys",
    "files: own /proc/self/oom_score_adj lowered",
    "files: the page cache asked whether somebody reads a file",
    "files: who uses a directory, watched by inotify",
    "processes: decoy's arguments",
    "processes: victim's arguments",
    "processes: any process that isn't the kernel's own",
    "network: TCP to 127.0.0.1",
    "network: UDP to 127.0.0.1",
    "network: TCP fast open, data in the SYN",
    "network: the guard's HTTPS port",
    "network: a listener of its own on 127.0.0.1",
    "network: an abstract unix socket",
    "network: an open unix socket in the file system",
    "network: an open unix socket as a datagram",
    "network: every other socket family",
    "network: the machine's interfaces by netlink",
    "network: names of the machine",
    "network: a System V segment of the host",
    "network: the host's System V objects listed",
    "syscalls: addresses without randomness",
    "syscalls: a process made traceable by everybody",
    "syscalls: a kernel without a filter",
    "limits: many processes",
    "limits: much memory",
    "limits: a full disk",
    "limits: many files",
}
# What even root can't do where nothing confines it, or where the machine itself is a sandbox.
STOPPED_BARE = {
    "files: own /proc/self/oom_score_adj lowered",
    "files: a read-only file changed through /proc/self/mem",
    "files: another kernel's /tmp, /var/tmp and /dev/shm",
    "processes: victim's limits",
    "processes: the machine's first process",
    "processes: higher limits",
    "processes: a core file",
    "syscalls: I/O ports",
}


def show(capsys: pytest.CaptureFixture[str], kind: str, report: Report) -> None:
    with capsys.disabled():
        print(f"\n{kind}: {report}")


def test_a_kernel_without_the_sandbox_is_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The control: what the sandbox is to stop works without it."""
    with ground(UNCONFINED, tmp_path) as scene:
        report = attack(scene, SANDBOX)
        bare = run_bare(scene.canaries, scene.effects)
    show(capsys, "A kernel without the sandbox", report)
    assert report.names("broken") == set()
    assert OPEN_WITHOUT - report.names("open") == set()
    show(capsys, "A process that nothing confines", bare)
    assert bare.names("broken") == set()
    if os.geteuid() == 0:
        assert bare.names("stopped") - STOPPED_BARE == set()


def test_no_attack_succeeds_in_a_confined_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ground((), tmp_path, CONFINED_CONFIG) as scene:
        # Out of memory a confined kernel ends as one, with what attacks in it: that limit has tests of its own.
        scene.canaries.given["machine"]["memory_hog"] = False
        report = attack(scene, (*SANDBOX, *PROTOCOL))
    show(capsys, "A confined kernel", report)
    assert report.names("broken") == set()
    assert report.names("open") == set()
