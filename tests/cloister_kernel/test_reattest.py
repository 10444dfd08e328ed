"""A machine that turns bad while a kernel runs on it: its channel ends, the kernel doesn't, and the notebook is told.

Real kernels, real sessions, real evidence; the machine's bytes are recorded inside TLS.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

import cloister.reattest
import cloister.session
from cloister import profile
from cloister_data.errors import AttestationRefusedError
from cloister_data.identity import LoginAnswer
from cloister_data.kernels import KernelView
from cloister_kernel import bridge as bridges
from cloister_kernel.provisioner import CloisterProvisioner
from cloister_kernel.remote import RemoteKernel
from tests.fakes.attested_server import AttestedServer, FakeLog, FakeMachine, FakeRoot
from tests.fakes.kernel_client import Kernel, Make, processes, run
from tests.fakes.kernel_relay import running_relay
from tests.fakes.middle import QUESTION, HeldHandshake, Passthrough
from tests.fakes.proven_relay import ProvenRelay

FAST, NEVER = 0.15, 86400.0
WORLD = FakeRoot()
CHIP = bytes([7]) * 64


@dataclass
class Place:
    """The relay, the switch in front of it, the kernel, and how often sessions that are opened from now on ask."""

    relay: ProvenRelay
    switch: Passthrough
    interval: float = FAST
    kernel: Kernel = field(default=None)  # type: ignore[assignment]

    @property
    def bridge(self) -> bridges.Bridge:
        return self._provisioner._bridge  # type: ignore[return-value]

    @property
    def _provisioner(self) -> CloisterProvisioner:
        found = self.kernel[0].provisioner
        assert isinstance(found, CloisterProvisioner)
        return found

    @property
    def identifier(self) -> str:
        assert self._provisioner._remote is not None
        return self._provisioner._remote.identifier

    def every(self, interval: float) -> None:
        """A new session with that interval, over which the channel resumes."""
        self.interval = interval
        before = self.relay.connections
        assert self._provisioner._remote is not None
        self._provisioner._remote.renew()
        until(lambda: self.relay.connections > before and self.bridge.connected)

    def received_since(self, mark: int) -> bytes:
        return bytes(self.relay.received[mark:])


@pytest.fixture(scope="module", autouse=True)
def before() -> set[threading.Thread]:
    """The threads of other files' tests."""
    return set(threading.enumerate())


@pytest.fixture(scope="module")
def relay() -> Iterator[ProvenRelay]:
    with running_relay("--lease", "3600", kind=ProvenRelay) as found:
        found.good = found.machine = replace(found.machine, hardware=WORLD.chip(chip_id=CHIP))
        yield found


@pytest.fixture(scope="module")
def place(relay: ProvenRelay, tmp_path_factory: pytest.TempPathFactory, kernel: Make) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("laptop")
    genuine = cloister.session.open
    with pytest.MonkeyPatch.context() as patch, Passthrough([], then=relay.port) as switch:
        made = Place(relay, switch)

        def open_fast(name: str | profile.Profile, **options: Any) -> cloister.session.Session:
            known = profile.load(name) if isinstance(name, str) else name
            return genuine(known.model_copy(update={"reattest_seconds": made.interval}), **options)

        patch.setenv("CLOISTER_HOME", str(folder))
        patch.setattr(cloister.session, "open", open_fast)
        patch.setattr(bridges, "FIRST_RETRY_SECONDS", 0.05)
        patch.setattr(bridges, "LAST_RETRY_SECONDS", 0.1)
        relay.profile("demo", switch.url, folder)
        with kernel() as made.kernel:
            yield made


@pytest.fixture
def well(place: Place) -> Iterator[Place]:
    """The place with its machine in order, before and after."""
    assert run(place.kernel[1], "'ready'") == ("ok", "'ready'")
    yield place
    place.relay.heal()
    place.switch.divert(place.relay.port)
    until(lambda: place.bridge.connected and place.bridge.doubt is None)
    if place.interval != FAST:
        place.every(FAST)


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def notice(place: Place, request: str) -> str:
    """What the notebook shows on stderr below the cell `request`."""
    while True:
        message = place.kernel[1].get_iopub_msg(timeout=10)
        if message["msg_type"] == "stream" and message["parent_header"].get("msg_id") == request:
            assert message["content"]["name"] == "stderr"
            return str(message["content"]["text"])


def reply(place: Place, request: str) -> str:
    while True:
        message = place.kernel[1].get_shell_msg(timeout=20)
        if message["parent_header"]["msg_id"] == request:
            return str(message["content"]["status"])


def replayed(relay: ProvenRelay) -> None:
    """Evidence of this machine and this key, for an earlier nonce."""
    old = relay.machine.evidence(relay.identity.spki, b"o" * 32).to_json()
    relay.bend = lambda *_: old


def hardware(**changes: Any) -> Callable[[ProvenRelay], None]:
    def turn(relay: ProvenRelay) -> None:
        relay.machine = replace(relay.good, hardware=WORLD.chip(**{"chip_id": CHIP, **changes}))

    return turn


def log(**changes: Any) -> Callable[[ProvenRelay], None]:
    def turn(relay: ProvenRelay) -> None:
        relay.machine = replace(relay.good, log=FakeLog(relay.good.log.key, **changes))

    return turn


BAD = {
    "measurement": (hardware(measurement=bytes(48)), "measurement"),
    "debug": (hardware(debug=True), "debug"),
    "tcb": (hardware(tcb=0), "tcb"),
    "chip": (hardware(chip_id=bytes(64)), "chip"),
    "replay": (replayed, "binding"),
    "set back": (log(size=6), "set back or replaced"),
    "forked": (log(size=7, seed=b"s"), "set back or replaced"),
}


@pytest.mark.parametrize(("turn", "why"), BAD.values(), ids=BAD.keys())
def test_a_machine_that_turns_bad_gets_nothing_more(well: Place, turn: Callable[[ProvenRelay], None], why: str) -> None:
    relay, (manager, client) = well.relay, well.kernel
    run(client, "import os; kept = [os.getpid()]")
    alive = processes(relay)
    turn(relay)
    until(lambda: well.bridge.doubt is not None)
    mark, asked = len(relay.received), len(relay.nonces)
    request = client.execute("kept.append('a marked word'); print(kept[1])")
    text = notice(well, request)
    assert why in text
    assert "stays here until the machine is proven again" in text
    manager.interrupt_kernel()
    # It is appraised anew, from scratch, and refused each time.
    until(lambda: len(relay.nonces) >= asked + 2)
    since = well.received_since(mark)
    assert QUESTION.fullmatch(since), since
    assert relay.token.encode() not in since
    assert not well.bridge.connected
    assert manager.is_alive()
    assert processes(relay) == alive
    relay.heal()
    # By itself, and with what waited, once.
    assert reply(well, request) == "ok"
    assert well.bridge.doubt is None
    assert run(client, "kept == [os.getpid(), 'a marked word']") == ("ok", "True")
    assert processes(relay) == alive


def test_the_control_a_machine_that_isnt_asked_again_gets_the_frames(well: Place) -> None:
    well.every(NEVER)
    relay = well.relay
    BAD["debug"][0](relay)
    mark, asked = len(relay.received), len(relay.nonces)
    assert run(well.kernel[1], "6 * 7") == ("ok", "42")
    assert len(relay.nonces) == asked
    since = well.received_since(mark)
    assert since
    assert not QUESTION.fullmatch(since)
    well.kernel[0].interrupt_kernel()
    assert relay.token.encode() in well.received_since(mark)


def test_a_machine_that_turns_bad_under_a_cell_that_prints(well: Place) -> None:
    """The channel is busy both ways at that moment."""
    relay, client = well.relay, well.kernel[1]
    request = client.execute("import time\nfor _ in range(400): print('.' * 4000); time.sleep(0.002)\ndone = True")
    until(lambda: well.bridge.connected)
    BAD["measurement"][0](relay)
    until(lambda: well.bridge.doubt is not None)
    mark, asked = len(relay.received), len(relay.nonces)
    until(lambda: len(relay.nonces) >= asked + 2)
    since = well.received_since(mark)
    assert QUESTION.fullmatch(since), since
    relay.heal()
    assert reply(well, request) == "ok"
    assert run(client, "done") == ("ok", "True")


def test_another_certificate_for_new_connections_ends_the_channel(well: Place) -> None:
    """Somebody steps in between while the kernel's own connection still leads to the genuine machine."""
    relay, client = well.relay, well.kernel[1]
    run(client, "kept = 5")
    with AttestedServer() as middle:
        well.switch.divert(middle.port)
        until(lambda: well.bridge.doubt is not None)
        mark = len(relay.received)
        request = client.execute("kept += 1")
        assert "Failed checks: root" in notice(well, request)
        until(lambda: len(middle.nonces) >= 3)
        assert QUESTION.fullmatch(bytes(middle.received)), bytes(middle.received)
        assert relay.token.encode() not in middle.received
        assert well.received_since(mark) == b""
        well.switch.divert(relay.port)
        well.switch.cut()
        assert reply(well, request) == "ok"
    assert run(client, "kept") == ("ok", "6")


def test_a_restarted_guard_with_another_certificate_is_appraised_before_it_gets_the_token(well: Place) -> None:
    """The same machine under another key and address: what a restart looks like."""
    relay = well.relay
    with AttestedServer(relay.good) as again:
        again.on("GET", f"/api/v1/kernels/{well.identifier}/channels", 503, b"")
        well.switch.divert(again.port)
        well.switch.cut()
        until(lambda: relay.token.encode() in again.received)
        before = bytes(again.received).partition(relay.token.encode())[0].rpartition(b"GET /api/v1/kernels/")[0]
        assert again.nonces
        assert QUESTION.fullmatch(before), before
        well.switch.divert(relay.port)
        well.switch.cut()


def test_evidence_that_stays_away_ends_the_channel_when_the_proof_is_old(
    well: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody lets everything through but the questions for evidence."""
    relay, client = well.relay, well.kernel[1]
    monkeypatch.setattr(cloister.reattest, "SHORTEST_BOUND", 1.0)
    monkeypatch.setattr(cloister.reattest, "FIRST_PAUSE", 0.05)
    well.every(FAST)
    run(client, "kept = 1")
    relay.busy = True
    asked = len(relay.nonces)
    until(lambda: len(relay.nonces) > asked)
    assert run(client, "kept") == ("ok", "1")  # an outage is no refusal
    until(lambda: well.bridge.doubt is not None)
    mark = len(relay.received)
    request = client.execute("kept += 1")
    assert "hasn't proven itself for too long" in notice(well, request)
    until(lambda: len(relay.nonces) >= asked + 5)
    assert QUESTION.fullmatch(well.received_since(mark))
    relay.heal()
    assert reply(well, request) == "ok"
    assert run(client, "kept") == ("ok", "2")


def test_a_channel_that_waits_for_its_handshake_while_the_machine_is_refused_sends_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOISTER_HOME", str(tmp_path))
    bad = FakeMachine(WORLD.chip(chip_id=CHIP, debug=True))
    with AttestedServer(FakeMachine(WORLD.chip(chip_id=CHIP), bad.log)) as genuine, ThreadPoolExecutor() as pool:
        trust = tmp_path / "trust.toml"
        trust.write_text(genuine.machine.hardware.trust().to_toml())
        made = profile.new("held", genuine.url, trust, "ann")
        made.save()
        made.store_token(LoginAnswer(token="t" * 32, user="ann", role="scientist", expires=int(time.time()) + 3600))
        remote = RemoteKernel("held")
        remote.view = KernelView.model_construct(kernel="0" * 32)
        session = remote.session()

        async def connect() -> None:
            async with remote.connect():
                pass

        held = HeldHandshake(genuine)
        channel = pool.submit(asyncio.run, connect())
        assert held.reached.wait(10)
        mark = len(genuine.received)
        genuine.machine = bad
        with pytest.raises(AttestationRefusedError):
            session.attest_again()
        held.go_on.set()
        assert isinstance(channel.exception(10), AttestationRefusedError)
        assert QUESTION.fullmatch(bytes(genuine.received[mark:]))


@pytest.mark.usefixtures("well")
def test_no_timer_is_left_behind(before: set[threading.Thread]) -> None:
    """Whatever sessions there were, one thread asks: that of the kernel's present one."""

    def asking() -> int:
        return [each.name for each in threading.enumerate() if each not in before].count("cloister-reattest")

    until(lambda: asking() == 1)
