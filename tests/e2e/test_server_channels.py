"""A cloister's kernel behind a real Jupyter server: what reaches a browser's websocket."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from websockets.sync.client import ClientConnection, connect

from cloister_kernel.kernelspec import install_kernelspec
from tests.fakes.running import running_cloister

LINES = 20_000


@pytest.fixture(scope="module")
def server() -> Iterator[httpx.Client]:
    """A Jupyter server with its own settings only, and a user's kernelspec."""
    with running_cloister() as found:
        found.add_user("ann", "scientist")
        found.session("ann")
        base = found.base
        install_kernelspec("ann", "Cloister: ann", base / "jupyter")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        token = secrets.token_hex(16)
        command = [sys.executable, "-m", "jupyter_server", "--no-browser", "--ServerApp.ip=127.0.0.1"]
        command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={base}"]
        command += ["--ServerApp.allow_root=True", "--ServerApp.jpserver_extensions={}"]
        environment = os.environ | {
            "JUPYTER_TOKEN": token,
            "JUPYTER_PATH": str(base / "jupyter"),
            **{f"JUPYTER_{kind}_DIR": str(base / f"jupyter-{kind.lower()}") for kind in ("CONFIG", "DATA", "RUNTIME")},
        }
        with (base / "server.log").open("wb") as log:
            process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        headers = {"Authorization": f"token {token}"}
        try:
            with httpx.Client(
                base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60, trust_env=False
            ) as client:
                deadline = time.monotonic() + 60
                while True:
                    try:
                        client.get("/api").raise_for_status()
                        break
                    except httpx.HTTPError:
                        assert process.poll() is None, (base / "server.log").read_text()[-4000:]
                        assert time.monotonic() < deadline
                        time.sleep(0.1)
                yield client
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            finally:
                process.kill()


def run(channels: ClientConnection, code: str) -> list[dict[str, Any]]:
    """What one cell puts on the websocket until it is idle."""
    request = secrets.token_hex(16)
    header = {"msg_id": request, "msg_type": "execute_request", "session": "browser", "username": "", "version": "5.3"}
    content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
    message = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
    channels.send(json.dumps(message | {"buffers": []}))
    found: list[dict[str, Any]] = []
    while True:
        heard = json.loads(channels.recv(timeout=60))
        if heard["parent_header"].get("msg_id") == request:
            found.append(heard)
            if heard["content"].get("execution_state") == "idle":
                return found


def test_twenty_thousand_lines_flushed_one_by_one(server: httpx.Client) -> None:
    """The server forwards a thousand messages a second, and drops what comes above that."""
    started = server.post("/api/kernels", json={"name": "cloister-ann"})
    assert started.status_code == 201, started.text
    kernel = started.json()["id"]
    url = str(server.base_url).replace("http", "ws", 1) + f"/api/kernels/{kernel}/channels?session_id=browser"
    with connect(url, additional_headers=dict(server.headers), max_size=None, proxy=None) as channels:
        found = run(channels, f"for i in range({LINES}): print(i, flush=True)")
    text = "".join(message["content"]["text"] for message in found if message["msg_type"] == "stream")
    assert text == "".join(f"{i}\n" for i in range(LINES))
    assert server.delete(f"/api/kernels/{kernel}").status_code == 204
