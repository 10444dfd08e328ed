"""A cloister's kernel as Jupyter's own tools see it: nbclient, KernelManager, the proxy."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import psutil
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

from cloister_data.errors import CloisterError, ConfigurationError, UnreachableError
from cloister_kernel.provisioner import CloisterProvisioner
from cloister_kernel.remote import RemoteKernel
from tests.fakes.kernel_client import Make, gone, kernel_processes, processes, run
from tests.fakes.kernel_relay import KernelRelay

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NOT CHECKED: kernels get uids of their own from root only")


def homes(relay: KernelRelay) -> list[Path]:
    """What there is of homes, once the last one has had the time to go."""
    deadline = time.monotonic() + 5
    while (found := list((relay.directory / "h").iterdir())) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def test_a_session_at_the_kernel(relay: KernelRelay, kernel: Make) -> None:
    with kernel() as (manager, client):
        assert run(client, "print('one'); 1 + 1") == ("ok", "one\n2")
        assert run(client, "from IPython.display import HTML; display(HTML('<b>rich</b>'))") == ("ok", "<b>rich</b>")
        status, text = run(client, "def f(): return 1 / 0\nf()")
        assert status == "error"
        assert "ZeroDivisionError" in text
        assert "return 1 / 0" in text.replace("\x1b", "") or "f()" in text
        matches = client.complete("import ma", reply=True, timeout=10)["content"]["matches"]
        assert "math" in " ".join(matches)
        run(client, "x = 5")
        request = client.execute("import time\ntime.sleep(30)")
        time.sleep(0.3)
        started = time.monotonic()
        manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=10)
        assert time.monotonic() - started < 1
        assert reply["parent_header"]["msg_id"] == request
        assert reply["content"]["ename"] == "KeyboardInterrupt"
        # A kernel aborts cells that come in the moment of an error; this request isn't one.
        client.kernel_info(reply=True, timeout=10)
        assert run(client, "x") == ("ok", "5")
        manager.restart_kernel()
        client.wait_for_ready(timeout=30)
        status, text = run(client, "x")
        assert (status, "NameError" in text) == ("error", True)
        pythons = [process for process in kernel_processes(relay) if process.name().startswith("python")]
        assert len(pythons) == 1  # bubblewrap's own are beside it
        manager.shutdown_kernel()
        assert not manager.is_alive()
        assert gone(relay)
        assert not homes(relay)
        assert not list((relay.directory / "k").iterdir())


def test_nbclient_runs_a_notebook(
    relay: KernelRelay, specs: KernelSpecManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTER_PATH", str(Path(specs.kernel_dirs[0]).parent))
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("import os\nprint('hello')"), nbformat.v4.new_code_cell("{'a': 1}")]
    )
    NotebookClient(notebook, kernel_name="cloister-demo", timeout=30).execute()
    assert notebook.cells[0].outputs[0]["text"] == "hello\n"
    assert notebook.cells[1].outputs[0]["data"]["text/plain"] == "{'a': 1}"
    assert gone(relay)


def test_a_kernel_that_dies_is_dead_for_jupyter(relay: KernelRelay, kernel: Make) -> None:
    with kernel() as (manager, client):
        client.execute("import os; os._exit(3)")
        deadline = time.monotonic() + 5
        while manager.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not manager.is_alive()
        assert manager.provisioner is not None
        assert manager.provisioner._bridge.exit_code == 3  # type: ignore[attr-defined]
        assert gone(relay)


def test_a_shutdown_while_the_cloister_is_away_still_ends_the_local_side(
    relay: KernelRelay, kernel: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_: RemoteKernel) -> None:
        raise UnreachableError("No cloister answers.")

    before = threading.active_count()
    with kernel() as (manager, client):
        client.stop_channels()
        monkeypatch.setattr(RemoteKernel, "session", away)
        manager.interrupt_kernel()
        manager.shutdown_kernel(now=True)
        assert not manager.has_kernel
        assert "cloister-bridge" not in [thread.name for thread in threading.enumerate()[before:]]
    for pid in processes(relay):
        with contextlib.suppress(ProcessLookupError):  # a sandbox ends whole
            os.kill(pid, signal.SIGKILL)
    assert gone(relay)


def test_over_unix_sockets(kernel: Make) -> None:
    with tempfile.TemporaryDirectory(prefix="cl-ipc-") as directory:
        address = {"transport": "ipc", "ip": f"{directory}/k", "connection_file": f"{directory}/c.json"}
        with kernel(**address) as (manager, client):
            assert run(client, "6 * 7") == ("ok", "42")
            manager.restart_kernel(now=True)
            client.stop_channels()
            again = manager.client()
            again.start_channels()
            again.wait_for_ready(timeout=30)
            assert run(again, "6 * 7") == ("ok", "42")
            again.stop_channels()


def test_another_jupyter_server_takes_the_kernel_over(
    relay: KernelRelay, kernel: Make, specs: KernelSpecManager
) -> None:
    with kernel() as (manager, client):
        run(client, "x = 'still here'")
        provisioner = manager.provisioner
        assert isinstance(provisioner, CloisterProvisioner)
        info = asyncio.run(provisioner.get_provisioner_info())
        meanwhile = client.execute("import time; time.sleep(0.5); print('meanwhile')")
        client.get_iopub_msg(timeout=10)  # it is under way
        # The first server vanishes without a word.
        provisioner._bridge.stop()  # type: ignore[union-attr]
        provisioner._remote.close()  # type: ignore[union-attr]
        spec = specs.get_kernel_spec("cloister-demo")
        second = CloisterProvisioner(kernel_spec=spec, kernel_id="other", profile="demo")
        asyncio.run(second.load_provisioner_info(info))
        manager.provisioner = second
        assert manager.is_alive()
        client.stop_channels()
        again = manager.client()
        time.sleep(0.6)
        again.start_channels()
        while (heard := again.get_iopub_msg(timeout=20))["msg_type"] != "stream":
            pass
        assert (heard["content"]["text"], heard["parent_header"]["msg_id"]) == ("meanwhile\n", meanwhile)
        again.wait_for_ready(timeout=20)
        assert run(again, "x") == ("ok", "'still here'")
        again.stop_channels()


def test_a_local_jupyter_without_signatures_is_refused(kernel: Make) -> None:
    from jupyter_client.session import Session

    with pytest.raises(ConfigurationError, match="not to sign"), kernel(session=Session(key=b"")):
        pass


def test_a_refused_start_leaves_nothing(relay: KernelRelay, kernel: Make) -> None:
    relay.reachable = False
    try:
        relay.control.problem = ConfigurationError("No.").to_problem()
        with pytest.raises(CloisterError), kernel():
            pass
    finally:
        relay.reachable = True
        relay.control.problem = None
    assert gone(relay)
    assert not homes(relay)


@needs_root
def test_what_a_kernel_leaves_running_dies_with_it(relay: KernelRelay, kernel: Make) -> None:
    with kernel() as (manager, client):
        code = (
            "import subprocess, os, sys\n"
            "child = subprocess.Popen(['sleep', '1000'], start_new_session=True, env={})\n"
            "print(os.getuid())"
        )
        uid = int(run(client, code)[1])
        # In the kernel's pid namespace it has another number.
        (pid,) = [process.pid for process in kernel_processes(relay) if process.cmdline() == ["sleep", "1000"]]
        assert psutil.Process(pid).uids().real == uid
        manager.shutdown_kernel()
        deadline = time.monotonic() + 5
        while psutil.pid_exists(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not psutil.pid_exists(pid)


PROXY = """
import sys
import cloister.session
from cloister_kernel import proxy
from tests.fakes.kernel_relay import FakeSession
url, token, certificate, connection_file = sys.argv[1:]
cloister.session.open = lambda profile, **_: FakeSession(url, token, bytes.fromhex(certificate))
sys.exit(proxy.main(["--profile", "demo", "-f", connection_file]))
"""


Proxy = tuple[BlockingKernelClient, "subprocess.Popen[bytes]"]


@pytest.fixture
def proxy(relay: KernelRelay, tmp_path: Path) -> Iterator[Proxy]:
    """What a front end without provisioners starts: the kernelspec's process, and a client of its connection file."""
    manager = KernelManager(connection_file=str(tmp_path / "connection.json"))
    manager.write_connection_file()
    arguments = [relay.url, relay.token, relay.identity.certificate_der.hex(), manager.connection_file]
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen([sys.executable, "-c", PROXY, *arguments], cwd=root)
    client = BlockingKernelClient()
    client.load_connection_info(manager.get_connection_info())
    deadline = time.monotonic() + 20
    with socket.socket() as probe:
        while probe.connect_ex(("127.0.0.1", client.hb_port)) != 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    client.start_channels()
    try:
        client.wait_for_ready(timeout=30)
        yield client, process
    finally:
        process.kill()
        process.wait()
        client.stop_channels()
        manager.context.destroy(linger=0)


def test_the_proxy_is_a_kernel_for_front_ends_without_provisioners(relay: KernelRelay, proxy: Proxy) -> None:
    client, process = proxy
    assert run(client, "1 + 2") == ("ok", "3")
    client.execute("import time; time.sleep(30)")
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert client.get_shell_msg(timeout=10)["content"]["ename"] == "KeyboardInterrupt"
    client.shutdown()
    assert process.wait(10) == 0
    assert gone(relay)


def test_a_proxy_that_is_told_to_end_ends_its_kernel(relay: KernelRelay, proxy: Proxy) -> None:
    client, process = proxy
    client.execute("import time; time.sleep(30)")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert gone(relay)
