"""A kernel over a bad network: nothing is lost, nothing comes twice, and all of it comes in order."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import cloister.session
from cloister_kernel.bridge import Bridge
from cloister_kernel.provisioner import CloisterProvisioner
from cloister_kernel.waking import SLEPT_SECONDS, woken
from tests.fakes.faulty import FaultyNetwork
from tests.fakes.kernel_client import Kernel, Make, run
from tests.fakes.kernel_relay import FakeSession, KernelRelay

COUNT = "import time\nfor i in range({count}):\n    print(i, flush=True)\n    time.sleep({pause})"


@pytest.fixture(scope="module")
def network(relay: KernelRelay) -> Iterator[FaultyNetwork]:
    """All that this module's laptop says goes through it."""
    with FaultyNetwork(int(relay.url.rsplit(":", 1)[1])) as network, pytest.MonkeyPatch.context() as patch:

        def far(_profile: object = None, **_: object) -> FakeSession:
            return FakeSession(network.url, relay.token, relay.identity.certificate_der)

        patch.setattr(cloister.session, "open", far)
        yield network


@pytest.fixture(scope="module")
def started(network: FaultyNetwork, kernel: Make) -> Iterator[Kernel]:
    with kernel() as made:
        yield made


@pytest.fixture
def far(network: FaultyNetwork, started: Kernel) -> Iterator[Kernel]:
    """The module's kernel, over a network that is well before and after each test."""
    yield started
    network.delay = network.jitter = 0.0
    network.trickle = 0
    network.swallowing = False
    assert run(started[1], "6 * 7") == ("ok", "42")


def bridge(kernel: Kernel) -> Bridge:
    assert isinstance(kernel[0].provisioner, CloisterProvisioner)
    assert kernel[0].provisioner._bridge is not None
    return kernel[0].provisioner._bridge


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("fault", ["cut", "towards the laptop", "towards the service", "black hole"])
def test_a_connection_that_ends_in_any_way_is_made_again(network: FaultyNetwork, far: Kernel, fault: str) -> None:
    def disturb() -> None:
        for _ in range(3):
            time.sleep(0.2)
            if fault == "cut":
                network.cut()
            elif fault == "black hole":
                with network.black_hole():
                    time.sleep(0.3)
            else:
                network.half_close(towards_laptop=fault == "towards the laptop")

    before = network.made
    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    outcome = run(far[1], COUNT.format(count=300, pause=0.004), timeout=60)
    disturbing.join()
    assert outcome == ("ok", "".join(f"{i}\n" for i in range(300)))
    assert network.made > before


def test_latency_and_jitter_change_nothing_but_the_time(network: FaultyNetwork, far: Kernel) -> None:
    network.delay, network.jitter = 0.02, 0.03
    assert run(far[1], COUNT.format(count=100, pause=0.002), timeout=60)[1] == "".join(f"{i}\n" for i in range(100))
    request = far[1].execute("import time; time.sleep(60)")
    time.sleep(0.5)
    far[0].interrupt_kernel()
    reply = far[1].get_shell_msg(timeout=20)
    assert reply["parent_header"]["msg_id"] == request
    assert reply["content"]["ename"] == "KeyboardInterrupt"


def test_bytes_that_trickle_are_still_messages(network: FaultyNetwork, far: Kernel) -> None:
    network.trickle, network.delay = 300, 0.0005
    assert run(far[1], "print('x' * 20_000)", timeout=60) == ("ok", "x" * 20_000 + "\n")


def test_a_large_output_over_a_connection_that_never_lasts(network: FaultyNetwork, far: Kernel) -> None:
    """None of the connections lives as long as the whole output would take: the slices that arrived count."""
    network.trickle, network.delay = 16 << 10, 0.003
    size, before = 6 << 20, network.made
    ended = threading.Event()

    def cutting() -> None:
        while not ended.wait(0.4):
            network.cut()

    disturbing = threading.Thread(target=cutting)
    disturbing.start()
    try:
        display = f"from IPython.display import display; display({{'text/plain': 'x' * {size}}}, raw=True)"
        status, text = run(far[1], display, timeout=60)
    finally:
        ended.set()
        disturbing.join()
    assert (status, len(text)) == ("ok", size)
    assert network.made >= before + 4  # two pumps for each connection


def test_a_question_waits_over_an_outage(network: FaultyNetwork, far: Kernel) -> None:
    _, client = far
    request = client.execute("answer = input('who? '); print(answer)", allow_stdin=True)
    question = client.get_stdin_msg(timeout=20)
    assert question["content"]["prompt"] == "who? "
    with network.black_hole():
        client.input("ann")
        time.sleep(0.2)
    assert client.get_shell_msg(timeout=20)["parent_header"]["msg_id"] == request
    assert run(client, "answer") == ("ok", "'ann'")


def test_a_question_asked_during_an_outage_arrives_after_it(network: FaultyNetwork, far: Kernel) -> None:
    _, client = far
    request = client.execute("import time; time.sleep(0.3); answer = input('when? ')", allow_stdin=True)
    time.sleep(0.1)
    with network.black_hole():
        time.sleep(0.6)
    assert client.get_stdin_msg(timeout=20)["content"]["prompt"] == "when? "
    client.input("now")
    assert client.get_shell_msg(timeout=20)["parent_header"]["msg_id"] == request
    assert run(client, "answer") == ("ok", "'now'")


def test_widgets_hear_both_ways_over_an_outage(network: FaultyNetwork, far: Kernel) -> None:
    _, client = far
    run(client, "import ipywidgets as w; slider = w.IntSlider(); seen = []")
    run(client, "slider.observe(lambda change: seen.append(change['new']), 'value')")
    comm = run(client, "slider.model_id")[1].strip("'")
    with network.black_hole():
        for value in (3, 5, 8):
            data = {"method": "update", "state": {"value": value}, "buffer_paths": []}
            message = client.session.msg("comm_msg", {"comm_id": comm, "data": data})
            client.shell_channel.send(message)
    assert run(client, "seen") == ("ok", "[3, 5, 8]")
    states: list[Any] = []
    with network.black_hole():
        request = client.execute("for at in (13, 21): slider.value = at; slider.description = str(at)")
        time.sleep(0.3)
    until(lambda: client.get_shell_msg(timeout=20)["parent_header"]["msg_id"] == request)
    idle = False
    while not idle:
        heard = client.get_iopub_msg(timeout=20)
        if heard["msg_type"] == "comm_msg" and heard["content"]["data"]["method"] == "update":
            states.append(heard["content"]["data"]["state"])
        idle = heard["parent_header"].get("msg_id") == request and heard["content"].get("execution_state") == "idle"
    assert {"value": 21} in states
    assert {"description": "21"} in states


def test_a_hundred_megabytes_while_the_laptop_is_away(network: FaultyNetwork, far: Kernel) -> None:
    _, client = far
    lines, width = 1000, 100_000
    came: list[str] = []
    done = "import os; open(os.environ['HOME'] + '/done', 'w').close()"
    with network.black_hole():
        request = client.execute(f"for i in range({lines}): print(str(i).zfill({width - 1}))\n{done}")
        time.sleep(1)
    idle = False
    while not idle:
        heard = client.get_iopub_msg(timeout=60)
        if heard["msg_type"] == "stream":
            came.append(heard["content"]["text"])
        idle = heard["parent_header"].get("msg_id") == request and heard["content"].get("execution_state") == "idle"
    client.get_shell_msg(timeout=20)
    text = "".join(came)
    assert len(text) == lines * width
    assert text.split() == [str(i).zfill(width - 1) for i in range(lines)]


def test_a_computer_that_slept_makes_a_new_connection_at_once(
    network: FaultyNetwork, far: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection is dead, and nothing says so: without a look at the clock that takes half a minute to find out."""
    slept = 0.0
    wall = time.time

    async def waking() -> None:
        await woken(lambda: wall() + slept, look=0.02)

    monkeypatch.setattr("cloister_kernel.bridge.woken", waking)
    network.cut()
    until(lambda: not bridge(far).connected)
    until(lambda: bridge(far).connected)
    before = network.made
    network.swallowing = True
    far[1].execute("x = 'typed after waking'")
    time.sleep(0.2)
    assert bridge(far).connected  # the control: it doesn't know
    network.swallowing = False  # for new connections; what was swallowed is gone
    slept = 3600.0
    until(lambda: network.made > before, 5)
    assert run(far[1], "x") == ("ok", "'typed after waking'")


def test_a_busy_computer_hasnt_slept() -> None:
    now = 0.0

    async def scenario() -> None:
        nonlocal now
        waiting = asyncio.create_task(woken(lambda: now, look=0.001))
        for _ in range(5):
            now += SLEPT_SECONDS - 1
            await asyncio.sleep(0.01)
        assert not waiting.done()
        now += SLEPT_SECONDS + 1
        await asyncio.wait_for(waiting, 5)

    asyncio.run(scenario())
