"""How kernels end, and what their notebooks hear of it: crashes, idle kernels, a guard that never comes back."""

from __future__ import annotations

import json
import queue
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError

import cloister.session
from cloister_data.control import RegisterKernel
from cloister_data.errors import ForbiddenError, UnavailableError
from cloister_data.framing import frame_length, pack_frame
from cloister_data.kernels import KernelAnswer, KernelFigures, KernelLaunch, KernelMeet, KernelStart
from tests.fakes.kernel_client import Make, gone, kernel_processes, run
from tests.fakes.kernel_relay import KernelRelay, running_relay

GUARD, NEXT = "a" * 32, "b" * 32
CRASH = "import ctypes; ctypes.string_at(0)"
SEGMENTATION_FAULT = "It ended by signal 11 (segmentation fault)."


def ask(relay: KernelRelay, order: KernelStart | KernelMeet) -> KernelAnswer:
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rb") as answers:
        connection.settimeout(20)
        connection.connect(str(relay.service_socket))
        connection.sendall(pack_frame(order.to_json()))
        return KernelAnswer.from_json(answers.read(frame_length(answers.read(4), 1 << 20)))


def meet(relay: KernelRelay, guard: str = GUARD) -> KernelFigures:
    found = ask(relay, KernelMeet(guard=guard)).figures
    assert found is not None
    return found


def output(client: BlockingKernelClient, until: Callable[[list[dict[str, Any]]], object]) -> list[dict[str, Any]]:
    """The streams that come, until they are enough or nothing comes for ten seconds."""
    found: list[dict[str, Any]] = []
    while not until(found):
        try:
            message = client.get_iopub_msg(timeout=10)
        except queue.Empty:
            return found
        if message["msg_type"] == "stream":
            found.append(message)
    return found


def dead(manager: KernelManager) -> bool:
    deadline = time.monotonic() + 10
    while manager.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not manager.is_alive()


def test_a_crash_is_explained_below_its_cell_and_jupyter_sees_a_dead_kernel(relay: KernelRelay, kernel: Make) -> None:
    with kernel() as (manager, client):
        run(client, "1")
        cell = client.execute(CRASH)
        (told,) = output(client, len)
        assert told["parent_header"]["msg_id"] == cell
        assert told["content"]["text"] == (
            f"Cloister: the kernel has ended, and its variables are gone. {SEGMENTATION_FAULT}\n"
        )
        assert dead(manager)
        manager.restart_kernel()
        client.wait_for_ready(timeout=30)
        assert run(client, "6 * 7") == ("ok", "42")


def test_between_cells_the_last_one_tells_it(kernel: Make) -> None:
    with kernel() as (manager, client):
        later = f"def later():\n    time.sleep(0.7); {CRASH}"
        code = f"import threading, time\n{later}\nthreading.Thread(target=later).start()"
        cell = client.execute(code, reply=True, timeout=20)["parent_header"]["msg_id"]
        (told,) = output(client, len)
        assert told["parent_header"]["msg_id"] == cell
        assert SEGMENTATION_FAULT in told["content"]["text"]
        assert dead(manager)


def test_nbclient_still_says_that_the_kernel_died(
    specs: KernelSpecManager, relay: KernelRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTER_PATH", str(Path(specs.kernel_dirs[0]).parent))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CRASH)])
    with pytest.raises(DeadKernelError):
        NotebookClient(notebook, kernel_name="cloister-demo", timeout=30).execute()
    assert gone(relay)


def test_a_kernel_that_is_asked_to_end_explains_nothing(kernel: Make) -> None:
    with kernel() as (manager, client):
        run(client, "1")
        for now in (False, True):
            manager.restart_kernel(now=now)
            client.wait_for_ready(timeout=30)
            said: list[str] = []
            client.execute_interactive(
                "print('hello')",
                timeout=20,
                output_hook=lambda message: said.append(json.dumps(message["content"])),  # noqa: B023
            )
            assert "hello" in "".join(said)
            assert "has ended" not in "".join(said)


def test_an_idle_kernel_is_warned_and_kept_by_a_cell_else_ended(
    specs: KernelSpecManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_relay("--idle", "6") as relay:
        monkeypatch.setattr(cloister.session, "open", relay.session)
        manager = KernelManager(kernel_name="cloister-demo", kernel_spec_manager=specs)
        manager.start_kernel()
        client = manager.client()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=30)
            assert run(client, "import time; time.sleep(7)", timeout=20) == ("ok", "")  # busy is not idle
            cell = client.execute("x = 7", reply=True, timeout=20)["parent_header"]["msg_id"]
            (warning,) = output(client, len)
            assert warning["parent_header"]["msg_id"] == cell
            text = warning["content"]["text"]
            assert "has been idle for 3 seconds. In 3 seconds it is shut down" in text
            assert "Run any cell to keep it" in text
            assert run(client, "x") == ("ok", "7")
            began = time.monotonic()
            again, last = output(client, lambda found: len(found) == 2)
            assert time.monotonic() - began >= 5
            assert again["content"]["text"] == text
            assert "It was shut down because it had been idle for 6 seconds." in last["content"]["text"]
            assert dead(manager)
            assert meet(relay).ended == {"idle": 1}
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)
            manager.context.destroy(linger=0)


def test_a_service_whose_guard_never_comes_back_ends_with_its_kernels() -> None:
    with running_relay("--guard-away", "2") as relay:
        assert relay.service is not None
        assert ask(relay, KernelStart(user="alice", launch=KernelLaunch())).kernel is not None
        kernel = kernel_processes(relay)
        assert kernel
        for _ in range(10):
            assert meet(relay).running == 1  # the control: with a guard it goes on for longer
            time.sleep(0.3)
        assert relay.service.wait(20) == 0
        assert psutil.wait_procs(kernel, timeout=5)[1] == []
        assert not relay.service_socket.exists()
        for name in ("h", "k"):
            assert not list((relay.directory / name).iterdir())
        assert not [path for path in (relay.directory / "g").rglob("*") if path.is_socket()]


def test_the_next_guard_gets_the_kernels_that_it_takes() -> None:
    with running_relay() as relay:
        views = [ask(relay, KernelStart(user=user, launch=KernelLaunch())).kernel for user in ("alice", "bob")]
        first = meet(relay)
        assert (first.running, first.started, first.ended) == (2, 2, {})
        assert first.memory_bytes > 20 << 20
        before = len(relay.control.orders)
        assert meet(relay).model_copy(update={"memory_bytes": first.memory_bytes}) == first
        assert len(relay.control.orders) == before  # it knows them

        relay.control.problem = UnavailableError("It starts.").to_problem()
        assert meet(relay, NEXT).running == 2
        relay.control.problem = None
        assert meet(relay, NEXT).service == first.service
        again = [order for order in relay.control.orders[before:] if isinstance(order, RegisterKernel)]
        asked = {(order.kernel, order.user, order.service, order.again) for order in again}
        assert asked == {
            (view.kernel, user, first.service, True)
            for view, user in zip(views, ("alice", "bob"), strict=True)
            if view is not None
        }
        # One that it refuses is ended: nobody vouches for whose it is.
        relay.control.problem = ForbiddenError("No.").to_problem()
        assert meet(relay).running == 0
        assert meet(relay).ended == {"guard": 2}
        relay.control.problem = None
