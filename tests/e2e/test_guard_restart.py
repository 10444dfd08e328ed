"""A guard that is killed, and one that is stopped beside a kernel service of its own: the kernels go on."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager
from typer.testing import CliRunner

from cloister_kernel.kernelspec import install_kernelspec
from tests.fakes.data import PEOPLE, people
from tests.fakes.kernel_client import run
from tests.fakes.receivers import free_port
from tests.fakes.running import RunningCloister, make_policy, running_cloister

PRINTERS = 3
LINES = 400
PRINT = f"""
import time
for number in range({LINES}):
    print(number)
    time.sleep(0.02)
"""
PREPARE = """
import cloister, cloister.paid, threading, time
cloister.paid.PAUSES = (0.1,) * 1000  # however long a guard takes to start on this machine
dataset = cloister.dataset("hosp/people")
cloister.datasets()
"""
ASK = """
faults, lost, paid, after = [], [], 0, 0

def pay():
    # A question in flight is asked again by itself, with its request id. One that was being computed is lost.
    global paid
    while after < 3 or not paid:
        try:
            dataset["age"].mean(epsilon=0.001)
            paid += 1
        except cloister.CloisterError as error:
            lost.append(error)

payer = threading.Thread(target=pay)
payer.start()
while after < 3:
    try:
        cloister.datasets()
        after += bool(faults)
    except cloister.CloisterError as error:
        faults.append(error)
    time.sleep(0.05)
payer.join()
print(paid, len(lost), len(cloister.history()), type(faults[0]).__name__)
"""
"""Ends when it has met a guard that was away, and another one after it."""


@dataclass
class Notebook:
    """One kernel, and what came out of its cell."""

    manager: KernelManager
    client: BlockingKernelClient
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    text: str = ""
    cell: str = ""

    def begin(self, code: str) -> None:
        self.cell = self.client.execute(code)

    def finish(self) -> str:
        """The reply's status, once the cell is done and its output is collected."""
        while True:
            message = self.client.get_iopub_msg(timeout=60)
            if message["parent_header"].get("msg_id") != self.cell:
                continue
            if message["msg_type"] == "stream":
                self.text += message["content"]["text"]
            elif message["msg_type"] == "error":
                self.text += "\n".join(message["content"]["traceback"])
            elif message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                break
        while (reply := self.client.get_shell_msg(timeout=20))["parent_header"]["msg_id"] != self.cell:
            pass
        return str(reply["content"]["status"])


@pytest.fixture
def place() -> Iterator[RunningCloister]:
    with running_cloister(listen=f"127.0.0.1:{free_port()}") as found:
        found.add_user("ann", "scientist")
        found.upload("hosp/people", people(200), PEOPLE, make_policy("hosp/people", {"ann": 40.0}))
        found.session("ann")
        yield found


@contextlib.contextmanager
def notebooks(found: RunningCloister, count: int) -> Iterator[list[Notebook]]:
    data = found.base / "jupyter"
    install_kernelspec("ann", directory=data)
    specs = KernelSpecManager(kernel_dirs=[str(data / "kernels")], ensure_native_kernel=False)
    opened: list[Notebook] = []
    try:
        for _ in range(count):
            manager = KernelManager(kernel_name="cloister-ann", kernel_spec_manager=specs)
            manager.start_kernel()
            client = manager.client()
            opened.append(Notebook(manager, client))
            client.start_channels()
            client.wait_for_ready(timeout=60)
        yield opened
    finally:
        for notebook in opened:
            notebook.client.stop_channels()
            if notebook.manager.has_kernel:
                notebook.manager.shutdown_kernel(now=True)
            notebook.manager.context.destroy(linger=0)


def service_of(found: RunningCloister) -> psutil.Process:
    """The process that listens on the service socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(found.runtime / "kernels.sock"))
        pid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return psutil.Process(pid)


def entries(found: RunningCloister, directory: Path) -> list[dict[str, Any]]:
    """What the audit log says of kernels and guards, after the whole of it was verified offline."""
    from cloister_cli.main import app

    found.session("admin")
    done = CliRunner().invoke(app, ["audit", "export", str(directory), "-p", "admin"])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["audit", "verify", str(directory), "--trust", str(found.trust)])
    assert done.exit_code == 0, done.output
    words = ["audit", "search", "--kind", "kernel", "--kind", "guard-started", "--json", "-p", "admin"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.output.splitlines() if line.startswith("{")]


def test_kernels_outlive_a_guard_that_is_killed_under_load(place: RunningCloister, tmp_path: Path) -> None:
    with notebooks(place, PRINTERS + 1) as opened:
        *printers, asker = opened
        for each in opened:
            assert run(each.client, f"import os; token, pid = '{each.token}', os.getpid()")[0] == "ok"
        assert run(asker.client, PREPARE, timeout=60)[0] == "ok"
        service = service_of(place)
        kernels = [child for child in service.children() if child.name() == "bwrap"]  # the other one mounts
        assert len(kernels) == PRINTERS + 1
        directories = {path.name: path.stat().st_ino for path in (place.runtime / "g").iterdir()}
        for each in printers:
            each.begin(PRINT)
        asker.begin(ASK)
        time.sleep(1.5)
        first = place.process.pid
        place.stop(signal.SIGKILL)
        assert service.is_running()
        place.restart()
        assert place.process.pid != first
        assert service_of(place) == service
        assert asker.finish() == "ok", asker.text
        paid, lost, history, fault = asker.text.split()
        assert int(paid) >= 1
        assert int(lost) <= 1
        assert int(history) == int(paid), "what was asked again was answered once"
        assert fault == "UnreachableError"
        for each in printers:
            assert each.finish() == "ok", each.text
            assert each.text == "".join(f"{number}\n" for number in range(LINES))
        for each in opened:
            assert run(each.client, "token, pid == os.getpid()") == ("ok", f"('{each.token}', True)")
        assert {path.name: path.stat().st_ino for path in (place.runtime / "g").iterdir()} == directories

        found = entries(place, tmp_path / "log")
        kinds = [entry["kind"] for entry in found]
        assert kinds.count("guard-started") == 2
        assert kinds.count("kernel") == PRINTERS + 1

        # An orderly end takes all along, also the service that this guard only found.
        assert place.stop(signal.SIGTERM) == 0
        _, alive = psutil.wait_procs([service, *kernels], timeout=10)
        assert not alive
        assert not (place.runtime / "g").exists()
        assert not list((place.runtime / "h").iterdir())


def test_a_kernel_service_apart_keeps_its_kernels_through_a_stop_of_the_guard() -> None:
    with contextlib.ExitStack() as held:
        options = {"listen": f"127.0.0.1:{free_port()}", "arguments": ("--kernels-apart",)}
        place = held.enter_context(running_cloister(**options))  # type: ignore[arg-type]
        place.add_user("ann", "scientist")
        place.session("ann")
        command = [sys.executable, "-m", "cloister_cli.main", "kernels", "--config", str(place.base / "cloister.toml")]
        service = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        held.callback(service.wait)
        held.callback(service.terminate)
        deadline = time.monotonic() + 30
        while not (place.runtime / "kernels.sock").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert service_of(place).pid == service.pid
        with notebooks(place, 1) as (notebook,):
            assert run(notebook.client, "token = 7")[0] == "ok"
            assert place.stop(signal.SIGTERM) == 0
            place.restart("--kernels-apart")
            asked = "import cloister, time\ntime.sleep(0.5)\nprint(token, cloister.datasets() is not None)"
            assert run(notebook.client, asked, timeout=60) == ("ok", "7 True\n")
            # The control: with the service the kernels end, and the notebook says why.
            notebook.begin("while True: time.sleep(0.1)")
            time.sleep(0.5)
            service.terminate()
            assert service.wait(20) == 0
            while "kernel service stopped" not in notebook.text:
                message = notebook.client.get_iopub_msg(timeout=20)
                if message["msg_type"] == "stream":
                    notebook.text += message["content"]["text"]
            assert not list((place.runtime / "h").iterdir())
        assert os.path.isdir(place.runtime / "g")
