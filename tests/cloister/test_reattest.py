"""A session that stays open: its machine proves itself again and again, and nothing is sent on an old proof."""

import gc
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from cloister import connection, profile, reattest, session
from cloister_data.errors import AttestationRefusedError, UnreachableError
from cloister_data.identity import LoginAnswer, WhoAmI
from tests.fakes.attested_server import AttestedServer, FakeLog, FakeMachine, FakeRoot
from tests.fakes.middle import QUESTION, HeldHandshake, Passthrough

TOKEN = "token-of-a-scientist-0123456789abcdef"
ME = WhoAmI(user="ann", role="scientist", cloister="hospital", simulated=True, version="0.1.0")
ROOT = FakeRoot()
CHIP = bytes([7]) * 64
FAST, NEVER = 0.05, 86400


def machine(**changes) -> FakeMachine:
    return FakeMachine(ROOT.chip(**{"chip_id": CHIP, **changes}), LOG)


LOG = FakeLog()


def serving(server: AttestedServer) -> AttestedServer:
    server.on("GET", "/api/v1/me", 200, ME.to_json())
    return server


@pytest.fixture
def genuine():
    with AttestedServer(machine()) as server:
        yield serving(server)


@pytest.fixture
def known(genuine, tmp_path, monkeypatch):
    monkeypatch.setenv("CLOISTER_HOME", str(tmp_path / "home"))
    trust = tmp_path / "trust.toml"
    trust.write_text(genuine.machine.hardware.trust().to_toml())

    def make(interval=FAST, url=genuine.url):
        made = profile.new("hospital", url, trust, "ann")
        made.save()
        answer = LoginAnswer(token=TOKEN, user="ann", role="scientist", expires=int(time.time()) + 3600)
        made.store_token(answer)
        # Faster than a profile may say.
        return made.model_copy(update={"reattest_seconds": interval})

    yield make
    connection.forget()


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def timers() -> int:
    return [thread.name for thread in threading.enumerate()].count("cloister-reattest")


def test_fresh_nonces_without_the_token_until_the_session_is_closed(genuine, known):
    before = timers()
    opened = session.open(known())
    until(lambda: len(genuine.nonces) >= 4)
    assert timers() == before + 1
    opened.close()
    assert timers() == before
    assert len(set(genuine.nonces)) == len(genuine.nonces)
    assert QUESTION.fullmatch(bytes(genuine.received))


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (machine(measurement=bytes(48)), "Failed checks: measurement"),
        (machine(debug=True), "Failed checks: debug"),
        (machine(tcb=0), "Failed checks: tcb"),
        (machine(chip_id=bytes(64)), "Failed checks: chip"),
        (replace(machine(), log=FakeLog(LOG.key, size=6)), "set back"),
    ],
    ids=["measurement", "debug", "tcb", "chip", "set back"],
)
def test_a_script_whose_machine_turns_bad_sends_nothing_more(genuine, known, bad, why):
    before = timers()
    opened = connection.use(known())
    assert connection.current().call("GET", "/me", None, WhoAmI) == ME
    genuine.machine = bad
    until(lambda: opened.doubt is not None)
    mark = len(genuine.received)
    for _ in range(2):
        with pytest.raises(AttestationRefusedError, match=rf"(?=.*Nothing more is sent to it).*{why}"):
            connection.current().call("GET", "/me", None, WhoAmI)
    assert len(genuine.received) == mark
    assert opened.token is None
    until(lambda: timers() == before)
    genuine.machine = machine()
    connection.use(known())
    assert connection.current().call("GET", "/me", None, WhoAmI) == ME


def test_the_control_without_the_timer(genuine, known):
    with session.open(known(NEVER)) as opened:
        genuine.machine = machine(debug=True)
        mark = len(genuine.received)
        assert opened.transport.call("GET", "/me", None, WhoAmI) == ME
        assert TOKEN.encode() in genuine.received[mark:]


def test_a_log_key_that_the_trust_file_pins(genuine, known):
    made = known()
    text = made.trust.read_text()
    made.trust.write_text(text.replace('log_key = "any"', f'log_key = "{LOG.public_key.hex()}"'))
    assert made.trust.read_text() != text
    with session.open(made) as opened:
        genuine.machine = replace(machine(), log=FakeLog())
        until(lambda: opened.doubt is not None)
        assert "checkpoint" in str(opened.doubt)


def test_an_old_proof_counts_for_nothing_whatever_the_timer_does(genuine, known, monkeypatch):
    """As after a night with the lid closed: the proof is old, and the timer has slept too."""
    with session.open(known(NEVER)) as opened:
        genuine.machine = machine(debug=True)
        awake = reattest.now
        monkeypatch.setattr(reattest, "now", lambda: awake() + 2 * NEVER + 1)
        assert isinstance(opened.doubt, reattest.LapsedError)
        mark = len(genuine.received)
        with pytest.raises(UnreachableError, match="hasn't proven itself"):
            opened.client.get("/api/v1/me")
        with pytest.raises(AttestationRefusedError, match="debug"):
            opened.transport.call("GET", "/me", None, WhoAmI)
        assert QUESTION.fullmatch(bytes(genuine.received[mark:]))


def test_an_old_proof_is_renewed_before_the_call(genuine, known, monkeypatch):
    with session.open(known(NEVER)) as opened:
        awake = reattest.now
        for module in (reattest, session):
            monkeypatch.setattr(module, "now", lambda: awake() + 2 * NEVER + 1)
        mark = len(genuine.received)
        assert opened.transport.call("GET", "/me", None, WhoAmI) == ME
        since = bytes(genuine.received[mark:])
        assert QUESTION.fullmatch(since.partition(b"GET /api/v1/me")[0])
        assert opened.doubt is None


def test_an_outage_is_no_refusal_until_the_proof_is_old(genuine, known, monkeypatch):
    monkeypatch.setattr(reattest, "SHORTEST_BOUND", 1.0)
    genuine_answer = genuine.respond
    with session.open(known()) as opened:
        asked = []

        def busy(method, path, body):
            asked.append(path)
            return (503, "text/plain", b"") if "attest" in path else genuine_answer(method, path, body)

        genuine.respond = busy
        until(lambda: len(asked) >= 2)
        assert opened.transport.call("GET", "/me", None, WhoAmI) == ME
        until(lambda: opened.doubt is not None)
        mark = len(genuine.received)
        with pytest.raises(UnreachableError, match="shows no evidence at the moment"):
            opened.transport.call("GET", "/me", None, WhoAmI)
        assert TOKEN.encode() not in genuine.received[mark:]
        genuine.respond = genuine_answer
        assert opened.transport.call("GET", "/me", None, WhoAmI) == ME


def test_a_script_goes_on_after_a_restart_that_is_proven_before_it_gets_the_token(genuine, known):
    with AttestedServer(machine()) as again, Passthrough([], then=genuine.port) as switch:
        serving(again)
        connection.use(known(NEVER, switch.url))
        caller = connection.current()
        assert caller.call("GET", "/me", None, WhoAmI) == ME
        switch.divert(again.port)
        switch.cut()
        assert caller.call("GET", "/me", None, WhoAmI) == ME
        assert QUESTION.fullmatch(bytes(again.received).partition(b"GET /api/v1/me")[0])
        assert again.nonces
        assert connection.current_session().certificate == again.identity.certificate_der
        connection.forget()


def test_a_script_whose_connections_lead_elsewhere(genuine, known):
    with AttestedServer() as middle, Passthrough([], then=genuine.port) as switch:
        serving(middle)
        connection.use(known(NEVER, switch.url))
        switch.divert(middle.port)
        switch.cut()
        for _ in range(2):
            with pytest.raises(AttestationRefusedError, match="Failed checks: root"):
                connection.current().call("GET", "/me", None, WhoAmI)
        assert len(middle.nonces) == 2
        assert QUESTION.fullmatch(bytes(middle.received))
        switch.divert(genuine.port)
        switch.cut()
        assert connection.current().call("GET", "/me", None, WhoAmI) == ME
        connection.forget()


SCRIPT = """
import cloister
cloister.use("hospital")
print("used")
"""


def test_a_script_ends_with_its_session_open(known):
    known()
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "used\n", "")
    assert time.monotonic() - started < 20


def test_a_forgotten_session_takes_its_timer_along(known):
    before = timers()
    opened = session.open(known())
    assert timers() == before + 1
    opened.client.close()
    del opened
    gc.collect()
    until(lambda: timers() == before)


@pytest.mark.parametrize("signed_in", [True, False], ids=["token", "password"])
def test_what_waits_for_a_handshake_while_the_machine_is_refused_stays_here(genuine, known, signed_in):
    """Somebody who delays the handshake delays no request past the refusal."""
    genuine.on("POST", "/api/v1/login", 500, b"")
    opened = session.open(known(NEVER), need_token=False)
    if not signed_in:
        opened._bearer.token = None
    answering, go_on = threading.Event(), threading.Event()

    def slow(nonce: bytes):
        answering.set()
        go_on.wait(10)
        return machine(debug=True).evidence(genuine.identity.spki, nonce)

    genuine.answer = slow
    with ThreadPoolExecutor() as pool:
        # The connection of this is in use, so that the request needs one of its own.
        refusal = pool.submit(opened.attest_again)
        assert answering.wait(10)
        mark = len(genuine.received)
        held = HeldHandshake(genuine)
        if signed_in:
            work = pool.submit(opened.transport.call, "GET", "/me", None, WhoAmI)
        else:
            work = pool.submit(session.login, opened, "ann", "correct horse")
        assert held.reached.wait(10)
        go_on.set()
        assert isinstance(refusal.exception(10), AttestationRefusedError)
        held.go_on.set()
        assert isinstance(work.exception(10), AttestationRefusedError)
    assert bytes(genuine.received[mark:]) == b""


FORKING = """
import os, sys
from cloister import session
opened = session.open("hospital")
opened.transport.raw("GET", "/me")
def attempt(name, work):
    try:
        work()
    except Exception as error:
        print(name, type(error).__name__, flush=True)
    else:
        print(name, "sent", flush=True)
if os.fork() == 0:
    attempt("transport", lambda: opened.transport.raw("GET", "/me"))
    attempt("client", lambda: opened.client.get("/api/v1/me"))
    attempt("evidence", opened.attest_again)
    opened.close()
    sys.exit()
os.wait()
attempt("parent", lambda: opened.transport.raw("GET", "/me"))
opened.close()
"""


def test_a_forked_process_sends_nothing_over_its_parents_connection(genuine, known):
    """Two that go on from one TLS state use one nonce twice, and what both have sent can be read."""
    known()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKING], capture_output=True, text=True, timeout=30, check=False
    )
    refused = ["transport", "client", "evidence"]
    assert done.stdout.splitlines() == [f"{name} ConfigurationError" for name in refused] + ["parent sent"]
    assert done.returncode == 0
    # The parent's connection was left alone.
    assert bytes(genuine.received).count(b"GET /api/v1/me") == 2


@pytest.mark.parametrize("question", ["/.well-known/attest", "/.well-known/consistency"])
@pytest.mark.parametrize("status", [503, 429, 507])
def test_a_machine_that_is_too_busy_to_answer_is_not_refused(genuine, known, status, question):
    with session.open(known(NEVER)) as opened:
        genuine.machine = replace(machine(), log=FakeLog(LOG.key, size=9))
        answer = genuine.respond
        code = {503: "unavailable", 429: "too-many-requests", 507: "storage-failed"}[status]
        problem = json.dumps({"type": f"urn:cloister:problem:{code}", "title": "x", "status": status, "code": code})

        def busy(method, path, body):
            if path == question:
                return status, "application/problem+json", problem.encode()
            return answer(method, path, body)

        genuine.respond = busy
        with pytest.raises(UnreachableError, match="at the moment"):
            opened.attest_again()
        assert opened.doubt is None
        genuine.respond = answer
        assert opened.attest_again().ok
