"""Opening, signing in, remembering: the session with honest machines, and what its errors tell."""

import ssl
import threading
import time

import pytest

from cloister import profile, session
from cloister_attest.channel import make_server_identity
from cloister_data.checkpoint import Checkpoint
from cloister_data.errors import (
    AttestationRefusedError,
    AuthenticationError,
    ConfigurationError,
    SessionExpiredError,
    UnreachableError,
)
from cloister_data.identity import LoginAnswer, WhoAmI
from tests.fakes.attested_server import AttestedServer, FakeLog, FakeMachine

TOKEN = "token-of-a-scientist-0123456789abcdef"
ME = WhoAmI(user="ann", role="scientist", cloister="hospital", simulated=True, version="0.1.0")


def answer(seconds: int = 3600) -> LoginAnswer:
    return LoginAnswer(token=TOKEN, user="ann", role="scientist", expires=int(time.time()) + seconds)


@pytest.fixture
def server():
    with AttestedServer() as running:
        running.on("GET", "/api/v1/me", 200, ME.to_json())
        running.on("POST", "/api/v1/login", 200, answer().to_json())
        yield running


@pytest.fixture
def known(server, tmp_path, monkeypatch):
    monkeypatch.setenv("CLOISTER_HOME", str(tmp_path / "home"))
    trust = tmp_path / "trust.toml"
    trust.write_text(server.machine.hardware.trust().to_toml())
    made = profile.new("hospital", server.url, trust, "ann")
    made.save()
    return made


def test_a_session_by_name(server, known):
    known.store_token(answer())
    with session.open("hospital") as opened:
        assert opened.verdict.ok
        assert opened.certificate == server.identity.certificate_der
        assert opened.certificate_digest == opened.verdict.certificate
        assert (opened.checkpoint.origin, opened.checkpoint.size) == ("hospital-cloister", 7)
        assert opened.token == TOKEN
        assert opened.url == server.url
        assert opened.transport.call("GET", "/me", None, WhoAmI) == ME
        assert opened.ssl_context.verify_mode == ssl.CERT_REQUIRED
    assert opened.token is None
    assert opened.client.is_closed


def test_websocket_addresses(known):
    with session.open(known, need_token=False) as opened:
        expected = known.url.replace("https", "wss") + "/api/v1/kernels/k/channels"
        assert opened.websocket_url("/kernels/k/channels") == expected
        assert opened.websocket_url("/api/v1/kernels/k/channels") == expected


def test_signing_in(server, known):
    with session.open(known, need_token=False) as opened:
        assert opened.token is None
        assert session.login(opened, "ann", "a password").token == TOKEN
        assert opened.token == TOKEN
    assert known.token() is not None
    session.open(known).close()


def test_a_wrong_password(server, known):
    problem = AuthenticationError("The name or the password is wrong.").to_problem()
    server.on("POST", "/api/v1/login", 401, problem.to_json(), "application/problem+json")
    with session.open(known, need_token=False) as opened:
        with pytest.raises(AuthenticationError, match=r"The name or the password is wrong\."):
            session.login(opened, "ann", "wrong")
        assert opened.token is None
    assert known.token() is None


@pytest.mark.parametrize(("user", "password"), [("Ann", "secret-word"), ("", "secret-word"), ("ann", "")])
def test_what_cannot_be_a_login_is_not_sent(server, known, user, password):
    with session.open(known, need_token=False) as opened, pytest.raises(AuthenticationError) as caught:
        session.login(opened, user, password)
    assert b"/api/v1/login" not in server.received
    assert "secret-word" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_nobody_signed_in(known):
    with pytest.raises(SessionExpiredError, match="cloister connect URL --trust FILE"):
        session.open("hospital")


def test_an_expired_token_is_not_sent(server, known):
    known.store_token(answer(-1))
    with pytest.raises(SessionExpiredError, match=r"has ended.*cloister connect URL --trust FILE"):
        session.open("hospital")
    assert TOKEN.encode() not in server.received
    with session.open("hospital", need_token=False) as opened:
        assert opened.token is None


def test_a_token_that_the_cloister_no_longer_knows(server, known):
    problem = SessionExpiredError("You are not signed in.", next_step="Sign in again.").to_problem()
    server.on("GET", "/api/v1/me", 401, problem.to_json(), "application/problem+json")
    known.store_token(answer())
    with session.open(known) as opened, pytest.raises(SessionExpiredError, match=r"Sign in again"):
        opened.transport.call("GET", "/me", None, WhoAmI)


def test_no_such_profile(known):
    with pytest.raises(ConfigurationError, match=r"no cloister called 'other'.*Known are: hospital"):
        session.open("other")


def test_a_trust_file_that_is_gone(known):
    known.trust.unlink()
    with pytest.raises(ConfigurationError, match="trust file"):
        session.open("hospital")


def test_a_cloister_that_is_down(known, server):
    down = AttestedServer()
    down._server.server_close()
    with pytest.raises(UnreachableError, match="No cloister answers"):
        session.open(known.model_copy(update={"url": down.url}), need_token=False)


def test_refusals_list_every_failed_check(server, known):
    server.machine = FakeMachine(log=server.machine.log)
    with pytest.raises(AttestationRefusedError, match=r"Failed checks: root: .*; chip: ") as caught:
        session.open("hospital", need_token=False)
    assert "isn't proven. Nothing was sent." in caught.value.what


def test_a_growing_log_is_remembered(server, known):
    session.open(known, need_token=False).close()
    log = server.machine.log = FakeLog(server.machine.log.key, size=8)
    session.open(known, need_token=False).close()
    remembered = known.remembered()
    assert remembered is not None
    assert (remembered.size, remembered.root) == (8, log.root)


class Silent(FakeLog):
    """It has grown, and shows no proof of it."""

    def consistency(self, first, second):
        return ()


@pytest.mark.parametrize(
    ("log", "why"),
    [
        (lambda key: FakeLog(key, size=6), "It has 6 entries now; 7 were seen before"),
        (lambda key: FakeLog(key, size=0), "It has 0 entries now; 7 were seen before"),
        (lambda key: FakeLog(key, seed=b"s"), "aren't shown to be those that were seen before"),
        (lambda key: FakeLog(seed=b"s"), "aren't shown to be those that were seen before"),
        (lambda key: FakeLog(key, size=9, seed=b"s"), "aren't shown to be those that were seen before"),
        (lambda key: FakeLog(size=9, seed=b"s"), "aren't shown to be those that were seen before"),
        (lambda key: Silent(key, size=9), "aren't shown to be those that were seen before"),
        (lambda key: FakeLog(size=6), "It has 6 entries now"),
        (lambda key: FakeLog(key, origin="renamed"), "called 'renamed' now"),
    ],
    ids=[
        "shorter",
        "empty",
        "forked",
        "forked under a new key",
        "forked and grown",
        "forked and grown under a new key",
        "grown without a proof",
        "shorter under a new key",
        "renamed",
    ],
)
def test_a_log_that_was_set_back_is_refused(server, known, log, why):
    known.store_token(answer())
    session.open(known).close()
    server.received.clear()
    before = known.remembered()
    server.machine.log = log(server.machine.log.key)
    with pytest.raises(AttestationRefusedError, match=rf"set back or replaced\. Nothing was sent.*{why}") as caught:
        session.open(known)
    # Both are shown, for the person who asks the operator.
    assert before.root.hex() in str(caught.value)
    assert server.machine.log.root.hex() in str(caught.value)
    assert known.remembered() == before
    assert TOKEN.encode() not in server.received


def test_a_restarted_cloister_with_a_new_log_key_and_certificate(server, known):
    session.open(known, need_token=False).close()
    log = FakeLog(size=9)
    with AttestedServer(FakeMachine(server.machine.hardware, log), identity=make_server_identity()) as restarted:
        moved = known.model_copy(update={"url": restarted.url})
        session.open(moved, need_token=False).close()
        assert moved.remembered().log_key == log.public_key


def test_a_newer_checkpoint_that_another_session_remembers_meanwhile_is_no_set_back(server, known):
    def slow(nonce):
        newer = FakeLog(server.machine.log.key, size=12)
        known.remember(Checkpoint(newer.origin, 12, newer.root), newer.public_key)
        return server.machine.evidence(server.identity.spki, nonce)

    server.answer = slow
    session.open(known, need_token=False).close()
    assert known.remembered().size == 12


def test_sessions_that_open_at_the_same_time_agree(server, known):
    """Each answer comes with a larger log; none of them may look like a set-back to another."""
    lock = threading.Lock()

    def grow(nonce):
        with lock:
            server.machine.log = FakeLog(server.machine.log.key, size=server.machine.log.size + 1)
            return server.machine.evidence(server.identity.spki, nonce)

    server.answer = grow
    errors = []

    def connect():
        try:
            for _ in range(3):
                session.open(known, need_token=False).close()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=connect) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert known.remembered().size == 7 + 12
