"""What a data scientist does works under the ruleset and the filter, in a program and in a notebook's kernel."""

import importlib.util
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient

from cloister_kernel.sandbox import landlock
from tests.cloister_kernel.sandbox import confined, science
from tests.fakes.kernel_client import run

pytestmark = pytest.mark.skipif(landlock.abi() < landlock.MIN_ABI, reason="NOT CHECKED: this Linux has no Landlock")

SQUARES = [0, 1, 4]
WORKS = {
    "filtered": "Address family not supported by protocol",
    "ruled": "Permission denied",
    "numpy": 40_000,
    "pandas": 6,
    "sklearn": [0, 1, 4, 9],
    "matplotlib": True,
    "torch": 780.0,
    "pools": [SQUARES, SQUARES, SQUARES, [7]],
    "shared_memory": 5,
    "threads": 30,
    "shell": "f",
    "pip": 0,
    "sqlite": 3,
    "event_loop": "hi\n",
    "timers": [signal.SIGALRM],
    "copies": ["a"],
}


@pytest.fixture
def home() -> Iterator[Path]:
    """A short path: Unix sockets are made below it."""
    with tempfile.TemporaryDirectory(prefix="clk-", ignore_cleanup_errors=True) as directory:
        made = Path(directory) / "home"
        made.mkdir()
        yield made


def test_the_scientific_stack_works(home: Path) -> None:
    code = home.parent / "code"
    code.mkdir()
    script = shutil.copy(science.__file__, code)
    done = subprocess.run(
        confined.command(home, [str(code)], sys.executable, script),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    absent = {name for name in ("sklearn",) if importlib.util.find_spec(name) is None}
    assert {name: found[name] for name in WORKS if name not in absent} == {
        name: value for name, value in WORKS.items() if name not in absent
    }


@pytest.fixture
def client(home: Path) -> Iterator[BlockingKernelClient]:
    """A kernel of cloister_kernel.notebook under both layers, started as the spawner does: on inherited sockets."""
    directory = home.parent
    listening = {name: socket.socket(socket.AF_UNIX) for name in ("shell", "iopub", "stdin", "control")}
    for bound in listening.values():
        bound.bind(str(directory / f"k-{bound.fileno()}"))
        bound.listen()
    connection = directory / "connection.json"
    information = {"transport": "ipc", "ip": str(directory / "k"), "signature_scheme": "hmac-sha256", "key": "00"}
    ports = {f"{name}_port": bound.fileno() for name, bound in listening.items()}
    connection.write_text(json.dumps({**information, "hb_port": 1, **ports}))
    log = (directory / "log").open("w")
    process = subprocess.Popen(
        confined.command(
            home, [str(connection)], sys.executable, "-m", "cloister_kernel.notebook", "-f", str(connection)
        ),
        pass_fds=tuple(ports.values()),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
    )
    client = BlockingKernelClient(connection_file=str(connection))
    client.load_connection_file()
    client.start_channels()
    try:
        client.kernel_info()
        client.get_shell_msg(timeout=60)
        yield client
        assert process.poll() is None
    finally:
        client.stop_channels()
        client.context.destroy(linger=0)
        process.kill()
        process.wait()
        log.close()
        for bound in listening.values():
            bound.close()


FORK = """
import os
if (child := os.fork()) == 0:
    print("child", flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


def control(client: BlockingKernelClient, kind: str, content: dict[str, Any]) -> dict[str, Any]:
    client.control_channel.send(client.session.msg(kind, content))
    return dict(client.get_control_msg(timeout=30)["content"])


def test_a_notebooks_kernel_works(client: BlockingKernelClient) -> None:
    assert run(client, "1+1") == ("ok", "2")
    assert "Address family" in run(client, "import socket; socket.socket(socket.AF_INET)")[1]
    assert run(client, "!echo from a shell")[1].strip() == "from a shell"
    # A forked child's output reaches the notebook, though ipykernel's own way there is TCP.
    client.execute(FORK)
    texts: list[str] = []
    deadline = time.monotonic() + 30
    while "child" not in "".join(texts) and time.monotonic() < deadline:
        message = client.get_iopub_msg(timeout=30)
        if message["msg_type"] == "stream":
            texts.append(message["content"]["text"])
    assert "child" in "".join(texts)
    client.get_shell_msg(timeout=30)

    # The kernel doesn't offer a debugger, which would need TCP; one that asks all the same is answered.
    client.kernel_info()
    assert "debugger" not in client.get_shell_msg(timeout=30)["content"]["supported_features"]
    assert control(client, "debug_request", {"seq": 1, "type": "request", "command": "initialize"}) == {}

    opened: list[str] = []
    client.execute_interactive(
        "from ipywidgets import IntSlider; slider = IntSlider(3)",
        output_hook=lambda message: opened.append(message["msg_type"]),
        timeout=60,
    )
    assert "comm_open" in opened


def test_an_interrupt_reaches_a_confined_kernel(client: BlockingKernelClient) -> None:
    client.execute("print('begun', flush=True)\nimport time\ntime.sleep(60)")
    while True:
        message = client.get_iopub_msg(timeout=30)
        if message["msg_type"] == "stream" and "begun" in message["content"]["text"]:
            break
    assert control(client, "interrupt_request", {}) == {"status": "ok"}
    reply = client.get_shell_msg(timeout=30)["content"]
    assert (reply["status"], reply["ename"]) == ("error", "KeyboardInterrupt")
