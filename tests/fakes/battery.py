"""Runs tests/attack/battery inside a kernel and judges what comes back: a claim counts only with its proof.

A scene is a cloister with two users: ann, in whose kernel the attacks run, and bob, whom they must not reach. While
they run, a watch asks the guard over HTTPS and bob's kernel again and again; both must go on answering.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager
from jupyter_core.utils import ensure_event_loop

from tests.fakes.canaries import Canaries
from tests.fakes.kernel_client import run

BATTERY = Path(__file__).parent.parent / "attack" / "battery"
# The order matters: the first two are what the others import; the last may cost the kernel its connections.
MODULES = (
    "registry",
    "native",
    "files",
    "processes",
    "network",
    "syscalls",
    "limits",
    "guard_socket",
    "handles",
    "output",
    "peer",
)
SANDBOX = ("files", "processes", "network", "syscalls", "limits")
PROTOCOL = ("guard", "handles", "output", "peer")
PATIENCE = 10.0
"""Seconds in which the guard and another kernel must answer, whatever is going on."""

Effects = dict[str, Callable[[], str]]
"""By an attack's name: what the host looks for. It returns what it saw, or "" where there was no effect."""

LOADER = """
import base64 as _b, json as _j, sys as _s, types as _t, zlib as _z
for _name in ("tests", "tests.attack", "tests.attack.battery"):
    _s.modules.setdefault(_name, _t.ModuleType(_name))
_packed = _j.loads(_z.decompress(_b.b64decode({packed!r})))
_given, _found = _packed["given"], {{}}
for _name, _source in _packed["sources"]:
    _module = _s.modules["tests.attack.battery." + _name] = _t.ModuleType("tests.attack.battery." + _name)
    exec(compile(_source, _name + ".py", "exec"), _module.__dict__)
_registry = _s.modules["tests.attack.battery.registry"]
"""


def loader(given: dict[str, Any]) -> str:
    """A cell that brings the battery into a kernel. What it is told is `given`."""
    sources = [(name, (BATTERY / f"{name}.py").read_text()) for name in MODULES]
    packed = base64.b64encode(zlib.compress(json.dumps({"given": given, "sources": sources}).encode())).decode()
    return LOADER.format(packed=packed)


@dataclass
class Result:
    name: str
    verdict: str
    detail: str
    took: str = ""

    @property
    def theme(self) -> str:
        return self.name.split(":")[0]


@dataclass
class Report:
    """`heard` is what the attacking kernel's own client got."""

    results: list[Result] = field(default_factory=list)
    heard: list[str] = field(default_factory=list)

    def names(self, verdict: str, themes: tuple[str, ...] = (*SANDBOX, *PROTOCOL)) -> set[str]:
        return {one.name for one in self.results if one.verdict == verdict and one.theme in themes}

    def settle(self, ends: Effects) -> None:
        """Judge what could only be seen when the kernel had ended."""
        for one in self.results:
            if one.verdict == "pending":
                seen = ends[one.name]()
                one.verdict, one.detail = ("open", seen) if seen else ("stopped", f"no effect: {one.detail}")

    def __str__(self) -> str:
        tried = [one for one in self.results if one.verdict != "absent"]
        lines = [f"attacks: {len(tried)} tried, {sum(one.verdict == 'stopped' for one in tried)} stopped"]
        for verdict in ("open", "broken", "absent"):
            lines += [f"  {verdict}: {one.name}: {one.detail}" for one in self.results if one.verdict == verdict]
        return "\n".join(lines)


class Watch(threading.Thread):
    """Asks the guard, and a kernel that nobody attacks, again and again. Keeps all that this kernel's client hears."""

    def __init__(self, ask: Callable[[], object], client: BlockingKernelClient) -> None:
        super().__init__(name="watch", daemon=True)
        self._ask, self._client = ask, client
        self._over = threading.Event()
        self.rounds = 0
        self.faults: list[tuple[float, str]] = []
        self.heard: list[str] = []

    def run(self) -> None:
        try:
            self._go_on()
        finally:
            ensure_event_loop().close()  # this thread's own, which the blocking client has made

    def _go_on(self) -> None:
        while not self._over.wait(0.2):
            started = time.monotonic()
            try:
                self._ask()
                self._cell("import cloister; cloister.datasets(); print('served')")
            except Exception as error:
                self.faults.append((started, f"{type(error).__name__}: {error}"))
            else:
                took = time.monotonic() - started
                if took > PATIENCE:
                    self.faults.append((started, f"an answer took {took:.1f} s"))
            self.rounds += 1

    def _cell(self, code: str) -> None:
        request, deadline, served = self._client.execute(code), time.monotonic() + 2 * PATIENCE, False
        while True:
            message = self._client.get_iopub_msg(timeout=max(0.1, deadline - time.monotonic()))
            self.heard.append(json.dumps(message, default=repr))
            if message["parent_header"].get("msg_id") == request:
                served = served or "served" in str(message["content"].get("text"))
                if message["content"].get("execution_state") == "idle":
                    break
        self._client.get_shell_msg(timeout=PATIENCE)
        if not served:
            raise AssertionError("the other kernel's cell failed")

    def stop(self) -> None:
        self._over.set()
        self.join(4 * PATIENCE)
        assert not self.is_alive()


class Growth(threading.Thread):
    """Looks how large the trusted processes have grown at most, in bytes, since it began."""

    def __init__(self, *processes: psutil.Process) -> None:
        super().__init__(name="growth", daemon=True)
        self._first = {one: one.memory_info().rss for one in processes}
        self._most = dict(self._first)
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.05):
            for one in self._most:
                with contextlib.suppress(psutil.NoSuchProcess):
                    self._most[one] = max(self._most[one], one.memory_info().rss)

    def of(self, process: psutil.Process) -> int:
        return self._most[process] - self._first[process]

    def stop(self) -> None:
        self._over.set()
        self.join(5)


@contextlib.contextmanager
def kernel_of(user: str, specs: KernelSpecManager) -> Iterator[tuple[KernelManager, BlockingKernelClient]]:
    """A kernel as this user's Jupyter starts it."""
    manager = KernelManager(kernel_name=f"cloister-{user}", kernel_spec_manager=specs)
    manager.start_kernel()
    client = manager.client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=60)
        yield manager, client
    finally:
        client.stop_channels()
        if manager.has_kernel:
            manager.shutdown_kernel(now=True)
        manager.context.destroy(linger=0)


def judge(raw: list[dict[str, str]], canaries: Canaries, effects: Effects, faults: list[str]) -> list[Result]:
    """What was claimed, against what can be proven. `faults`: who wasn't served while these attacks ran."""
    judged = []
    for one in raw:
        verdict, detail = one["verdict"], one["detail"]
        if verdict == "open" and one["proof"] == "canary" and not canaries.secrets.shown_by(detail):
            verdict, detail = "broken", f"claimed without a secret: {detail}"
        elif verdict == "open" and one["proof"] == "host":
            seen = effects[one["name"]]()
            verdict, detail = ("open", seen) if seen else ("stopped", f"no effect: {detail}")
        elif verdict == "open" and one["proof"] == "end":
            verdict = "pending"
        elif verdict == "open" and one["proof"] == "watch":
            verdict, detail = (
                ("open", f"{detail}; {faults[0]}") if faults else ("stopped", f"all were served: {detail}")
            )
        judged.append(Result(one["name"], verdict, detail, one["took"]))
    return judged


def run_bare(canaries: Canaries, effects: Effects) -> Report:
    """The sandbox's themes in a process of this user that nothing confines: what works there, works."""
    harmless = {
        "import_directories": [str(canaries.directories["run"])],
        "service_directories": [str(canaries.directories["tmp"])],
    }
    given = canaries.given | {"bare": True} | harmless
    code = (
        loader(given)
        + f"""
_all = [_one for _theme in {SANDBOX!r} for _one in _registry.run_theme(_theme, _given)]
print(_j.dumps(_all))
"""
    )
    leaked = os.open(canaries.directories["decoy"], os.O_RDONLY)
    try:
        with tempfile.TemporaryDirectory() as home:
            done = subprocess.run(
                [sys.executable, "-c", "import sys; exec(sys.stdin.read())"],
                input=code,
                capture_output=True,
                text=True,
                timeout=120,
                env=os.environ | {"HOME": home},
                pass_fds=[leaked],
                start_new_session=True,
                check=False,
            )
    finally:
        os.close(leaked)
    assert done.returncode == 0, done.stderr[-2000:]
    return Report(judge(json.loads(done.stdout.splitlines()[-1]), canaries, effects, []))


def run_in_kernel(
    client: BlockingKernelClient, canaries: Canaries, effects: Effects, watch: Watch, themes: tuple[str, ...]
) -> Report:
    """Each theme in a cell of its own; the results are fetched by another one, as a theme may cost the output."""
    report = Report()
    _load(client, canaries)
    for theme in themes:
        with _watched(watch, theme) as faults:
            _wait_for_reply(client, client.execute(f"_found[{theme!r}] = _registry.run_theme({theme!r}, _given)"), 120)
        report.heard += _drain(client)
        report.results += judge(_fetch(client, theme), canaries, effects, faults)
    return report


def run_in_its_place(client: BlockingKernelClient, canaries: Canaries, effects: Effects, watch: Watch) -> list[Result]:
    """The attacks of peer.py, after which this kernel is lost. Their results come without being asked for."""
    _load(client, canaries)
    with _watched(watch, "peer") as faults:
        client.execute("_s.modules['tests.attack.battery.peer'].take_the_kernels_place(_given)")
        deadline, text = time.monotonic() + 30, ""
        while "RESULT>>" not in text and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                text = str(client.get_iopub_msg(timeout=1)["content"].get("text"))
    if "RESULT>>" not in text:
        raise AssertionError("the relay passes nothing on any more" if not faults else faults[0])
    return judge(json.loads(text.split("<<RESULT")[1].split("RESULT>>")[0]), canaries, effects, faults)


def _load(client: BlockingKernelClient, canaries: Canaries) -> None:
    # cloister is imported once, and not in each child anew.
    status, text = run(client, "import cloister\n" + loader(canaries.given | {"bare": False}))
    assert status == "ok", text[-2000:]


@contextlib.contextmanager
def _watched(watch: Watch, theme: str) -> Iterator[list[str]]:
    """Afterwards the list holds who wasn't served meanwhile, and in the two rounds after."""
    since, faults = time.monotonic(), list[str]()
    yield faults
    rounds, deadline = watch.rounds, time.monotonic() + 4 * PATIENCE
    while watch.rounds < rounds + 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    if watch.rounds < rounds + 2:
        faults.append("the guard or the other kernel is silent")
    faults += [what for at, what in watch.faults if at >= since - PATIENCE]


def _wait_for_reply(client: BlockingKernelClient, request: str, seconds: float) -> None:
    """Until the cell is over, as far as is heard: the last theme breaks the connections that would tell."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            message = client.get_shell_msg(timeout=1)
        except queue.Empty:
            if _answers(client):
                return
            continue
        if message["parent_header"].get("msg_id") == request:
            return


def _answers(client: BlockingKernelClient) -> bool:
    """Whether the kernel, which works on one request after the other, has come to a new one."""
    request = client.kernel_info()
    with contextlib.suppress(queue.Empty):
        while True:
            if client.get_shell_msg(timeout=5)["parent_header"].get("msg_id") == request:
                return True
    return False


def _drain(client: BlockingKernelClient) -> list[str]:
    """What the kernel sent; the attacks' malformed messages are its own client's affair, and are passed over."""
    heard = []
    while True:
        try:
            heard.append(json.dumps(client.get_iopub_msg(timeout=0.5)["content"], default=repr)[:4096])
        except queue.Empty:
            return heard
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue


def _fetch(client: BlockingKernelClient, theme: str) -> list[dict[str, str]]:
    status, text = run(client, f"print('<' + '<RESULT' + _j.dumps(_found[{theme!r}]) + 'RESULT>>')", timeout=60)
    assert status == "ok", text[-2000:]
    found: list[dict[str, str]] = json.loads(text.split("<<RESULT")[1].split("RESULT>>")[0])
    return found


def marked_processes(mark: str) -> list[int]:
    """The pids of processes whose arguments hold `mark`, of any namespace, as far as this user sees."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if mark in " ".join(process.info["cmdline"] or []):
            found.append(process.pid)
    return found
