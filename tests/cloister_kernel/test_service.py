"""The kernel service's door: orders, refusals, and kernels that end with it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from cloister_data.base import Wire
from cloister_data.control import EndKernel, RegisterKernel
from cloister_data.errors import ForbiddenError
from cloister_data.framing import Channel, ChannelFrame, FrameKind, pack_frame
from cloister_data.kernels import (
    KernelAnswer,
    KernelAttach,
    KernelLaunch,
    KernelList,
    KernelQuery,
    KernelSignal,
    KernelStart,
)
from cloister_kernel import unconfined
from cloister_kernel.control import ControlClient
from cloister_kernel.kernels import KernelService
from cloister_kernel.unconfined import UnconfinedSpawner
from tests.fakes.guard_control import FakeControl
from tests.fakes.kernel_client import kernel_processes, processes
from tests.fakes.kernel_relay import KernelRelay, running_relay

UNKNOWN = "0" * 32
START = KernelStart(user="alice", launch=KernelLaunch())


def connect(relay: KernelRelay) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(20)
    try:
        connection.connect(str(relay.service_socket))
    except OSError:
        connection.close()
        raise
    return connection


def exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def receive(connection: socket.socket) -> bytes:
    return exactly(connection, struct.unpack(">I", exactly(connection, 4))[0])


def ask(relay: KernelRelay, order: Wire | bytes) -> KernelAnswer:
    with connect(relay) as connection:
        connection.sendall(pack_frame(order if isinstance(order, bytes) else order.to_json()))
        return KernelAnswer.from_json(receive(connection))


def code(answer: KernelAnswer) -> str | None:
    return answer.problem.code if answer.problem else None


@pytest.mark.parametrize(
    "order",
    [
        *(b"", b"{", b"[]", b'{"op":"start"}', b'{"op":"shell"}', b"[" * 100_000),
        *(b'{"op":"list","user":"alice","more":1}', b'{"op":"state","kernel":"../../x"}'),
    ],
)
def test_orders_that_cant_be_read_are_refused(relay: KernelRelay, order: bytes) -> None:
    assert code(ask(relay, order)) == "invalid-request"


def test_a_frame_of_four_gigabytes_is_refused_before_it_is_read(relay: KernelRelay) -> None:
    with connect(relay) as connection:
        connection.sendall(b"\xff\xff\xff\xff")
        assert code(KernelAnswer.from_json(receive(connection))) == "too-large"


def test_unknown_kernels_are_not_found(relay: KernelRelay) -> None:
    for op in ("interrupt", "end", "state"):
        assert code(ask(relay, KernelSignal.model_validate({"op": op, "kernel": UNKNOWN}))) == "not-found"
    assert code(ask(relay, KernelAttach(kernel=UNKNOWN))) == "not-found"


def test_the_door_is_the_services_own(relay: KernelRelay) -> None:
    assert relay.service_socket.stat().st_mode & 0o777 == 0o600


def test_the_life_of_a_kernel(relay: KernelRelay) -> None:
    view = ask(relay, START).kernel
    assert view is not None
    assert view.state == "running"
    assert view.sandbox == "confined"
    registered = [order for order in relay.control.orders if isinstance(order, RegisterKernel)][-1]
    assert (registered.kernel, registered.user) == (view.kernel, "alice")
    listed = ask(relay, KernelQuery(user="alice")).kernels
    assert listed is not None
    assert [kernel.kernel for kernel in listed.kernels] == [view.kernel]
    assert ask(relay, KernelQuery(user="bob")).kernels.kernels == ()  # type: ignore[union-attr]
    ended = ask(relay, KernelSignal(op="end", kernel=view.kernel)).kernel
    assert ended is not None
    assert (ended.state, ended.exit_code) == ("dead", -signal.SIGKILL)
    assert relay.control.orders[-1] == EndKernel(kernel=view.kernel)
    assert ask(relay, KernelSignal(op="state", kernel=view.kernel)).kernel == ended
    # A laptop that attaches now still learns how it ended, and so does the next one.
    for bridge in (b"a" * 16, b"b" * 16):
        with connect(relay) as connection:
            connection.sendall(pack_frame(KernelAttach(kernel=view.kernel).to_json()))
            assert KernelAnswer.from_json(receive(connection)).kernel == ended
            hello = ChannelFrame(FrameKind.HELLO, Channel.SHELL, 0, 0, (bridge,))
            connection.sendall(pack_frame(hello.pack()))
            answered = ChannelFrame.unpack(receive(connection))
            assert (answered.kind, answered.parts) == (FrameKind.HELLO, (bridge,))
            frame = ChannelFrame.unpack(receive(connection))
            while frame.kind is not FrameKind.EXIT:
                frame = ChannelFrame.unpack(receive(connection))
            assert frame.parts == (b"-9", b"It was ended as you asked.")
            ack = ChannelFrame(FrameKind.ACK, Channel.SHELL, 0, frame.sequence)
            connection.sendall(pack_frame(ack.pack()))


def test_a_kernel_that_the_guard_refuses_never_starts(relay: KernelRelay) -> None:
    relay.control.problem = ForbiddenError("No such user.").to_problem()
    try:
        assert code(ask(relay, START)) == "forbidden"
    finally:
        relay.control.problem = None
    assert not processes(relay)
    for name in ("k", "h"):
        assert not list((relay.directory / name).iterdir())


def test_a_channel_that_begins_wrongly_is_closed(relay: KernelRelay) -> None:
    view = ask(relay, START).kernel
    assert view is not None
    for first in (b"", b"x" * 40, ChannelFrame(FrameKind.DATA, Channel.SHELL, 1, 0, (b"x",)).pack()):
        with connect(relay) as connection:
            connection.sendall(pack_frame(KernelAttach(kernel=view.kernel).to_json()))
            assert code(KernelAnswer.from_json(receive(connection))) is None
            connection.sendall(pack_frame(first))
            with pytest.raises((EOFError, ConnectionError)):
                receive(connection)
    ask(relay, KernelSignal(op="end", kernel=view.kernel))


def test_a_verdict_is_in_no_command_line(relay: KernelRelay) -> None:
    launch = KernelLaunch(verdict=json.dumps({"x": "in no list of processes"}))
    view = ask(relay, KernelStart(user="alice", launch=launch)).kernel
    assert view is not None
    seen = [" ".join([*process.cmdline(), *process.environ().values()]) for process in kernel_processes(relay)]
    assert any("cloister_kernel.sandbox.shim" in text for text in seen)  # the control: these are the kernel's
    assert not any("in no list" in text for text in seen)
    ask(relay, KernelSignal(op="end", kernel=view.kernel))


def test_kernels_end_with_a_service_that_is_killed_and_the_next_one_cleans_up() -> None:
    with running_relay() as relay:
        view = ask(relay, START).kernel
        assert view is not None
        assert relay.service is not None
        kernel = kernel_processes(relay)
        place = relay.directory / "k" / view.kernel[:12]
        assert kernel
        assert place.is_dir()
        relay.service.kill()
        relay.service.wait()
        assert psutil.wait_procs(kernel, timeout=5)[1] == []
        relay.start_service()
        deadline = time.monotonic() + 10
        while place.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not place.exists()


def test_a_second_service_waits_until_the_first_has_ended() -> None:
    with running_relay() as relay:
        first = relay.service
        assert first is not None
        view = ask(relay, START).kernel
        assert view is not None
        command = psutil.Process(first.pid).cmdline()
        second = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            time.sleep(1.5)
            assert second.poll() is None
            listed = ask(relay, KernelQuery(user="alice")).kernels
            assert listed is not None
            assert [kernel.kernel for kernel in listed.kernels] == [view.kernel]
            assert listed.kernels[0].idle >= 1
            first.kill()
            first.wait()
            relay.service = second
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError):
                    assert ask(relay, KernelQuery(user="alice")).kernels == KernelList(kernels=())
                    return
                time.sleep(0.02)
            raise AssertionError("the second service never answered")
        finally:
            if relay.service is first:
                second.kill()
                second.wait()


def test_without_root_all_kernels_share_one_uid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The rootless way, also where this test runs as root: the level is said, and what a kernel leaves is found."""
    monkeypatch.setattr(unconfined, "sandbox_level", lambda: "none")
    runtime = Path(f"/tmp/cl-{os.getpid()}")

    async def scenario() -> None:
        async with FakeControl(tmp_path / "c", tmp_path / "g") as control:
            made = UnconfinedSpawner(homes=tmp_path / "homes", runtime=runtime)
            service = KernelService(made, ControlClient(tmp_path / "c"))
            view = await service.start(START)
            assert view.sandbox == "none"
            assert control.orders[0].uid == os.geteuid()  # type: ignore[union-attr]
            kernel = service.find(view.kernel)
            assert os.geteuid() in psutil.Process(kernel.started.process.pid).uids()
            environment = {"HOME": str(tmp_path / "homes" / view.kernel)}
            straggler = await asyncio.create_subprocess_exec("sleep", "60", env=environment, start_new_session=True)
            bystander = await asyncio.create_subprocess_exec("sleep", "60", env={}, start_new_session=True)
            await service.signal(KernelSignal(op="end", kernel=view.kernel))
            assert await asyncio.wait_for(straggler.wait(), 5) == -signal.SIGKILL
            assert bystander.returncode is None  # the control: others are left alone
            bystander.kill()
            await bystander.wait()
            await service.close()

    try:
        asyncio.run(scenario())
    finally:
        (runtime / "k").rmdir()
        runtime.rmdir()
