"""Machines in the middle, of every kind of hardware. Each must be refused before a byte of a credential leaves; the
control gets them all.
"""

import time
from dataclasses import replace
from functools import partial

import httpx
import pytest
from cryptography import x509

from cloister import profile, session
from cloister_attest.channel import pinned_context
from cloister_attest.evidence import AttestRequest, Evidence
from cloister_data.errors import AttestationRefusedError
from cloister_data.identity import LoginAnswer, WhoAmI
from tests.fakes.attested_server import AttestedServer, FakeLog
from tests.fakes.kinds import KINDS
from tests.fakes.middle import QUESTION, Passthrough, clone, tls_context

TOKEN = "token-of-a-scientist-0123456789abcdef"
PASSWORD = "correct horse battery staple"
ME = WhoAmI(user="ann", role="scientist", cloister="hospital", simulated=True, version="0.1.0")


class Unsigned(FakeLog):
    """A log whose checkpoint claims one leaf more than was signed; the report binds it all the same."""

    def checkpoint(self) -> str:
        return super().checkpoint().replace("\n7\n", "\n8\n")


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return KINDS[request.param]()


@pytest.fixture
def genuine(kind):
    with AttestedServer(kind.machine()) as server:
        yield server


@pytest.fixture
def connect(kind, tmp_path, monkeypatch):
    """Makes a signed-in profile that trusts the genuine machine, at whatever address it is given."""
    monkeypatch.setenv("CLOISTER_HOME", str(tmp_path / "home"))
    trust = tmp_path / "trust.toml"
    trust.write_text(kind.trust().to_toml())

    def make(url: str) -> profile.Profile:
        made = profile.new("hospital", url, trust, "ann")
        made.save()
        answer = LoginAnswer(token=TOKEN, user="ann", role="scientist", expires=int(time.time()) + 3600)
        made.store_token(answer)
        return made

    return make


def serve_login(server: AttestedServer) -> None:
    answer = LoginAnswer(token=TOKEN, user="ann", role="scientist", expires=int(time.time()) + 3600)
    server.on("POST", "/api/v1/login", 200, answer.to_json())
    server.on("GET", "/api/v1/me", 200, ME.to_json())


def work(known: profile.Profile) -> None:
    """All that a client does: open, sign in, ask."""
    with session.open(known) as opened:
        session.login(opened, "ann", PASSWORD)
        assert opened.transport.call("GET", "/me", None, WhoAmI) == ME


def refused(known: profile.Profile, *middles: AttestedServer, match: str) -> None:
    """The work is refused with a reason, and no middle got a credential, nor anything but the question."""
    with pytest.raises(AttestationRefusedError, match=match) as caught:
        work(known)
    assert "Nothing was sent" in str(caught.value)
    assert TOKEN not in str(caught.value)
    for middle in middles:
        assert_nothing_but_the_question(middle)


def assert_nothing_but_the_question(middle: AttestedServer) -> None:
    """The bytes that came are requests for evidence: a nonce, and headers that say nothing of the user."""
    received = bytes(middle.received)
    assert QUESTION.fullmatch(received), received
    for secret in (TOKEN, PASSWORD):
        assert secret.encode() not in received


def test_the_control_gets_the_credentials(genuine, connect):
    serve_login(genuine)
    work(connect(genuine.url))
    received = bytes(genuine.received)
    assert f"Bearer {TOKEN}".encode() in received
    assert PASSWORD.encode() in received
    assert received.index(b"POST /.well-known/attest") < received.index(b"POST /api/v1/login")


def test_relayed_evidence(genuine, connect):
    """The middle has an own key, and asks the genuine machine with the client's nonce."""

    def relay(nonce: bytes) -> bytes:
        context = pinned_context(genuine.identity.certificate_der)
        with httpx.Client(verify=context, trust_env=False) as client:
            return client.post(
                f"{genuine.url}/.well-known/attest", content=AttestRequest(nonce=nonce).to_json()
            ).content

    with AttestedServer(genuine.machine, answer=relay) as middle:
        refused(connect(middle.url), middle, match="binding: the report was made for another key")
        assert middle.nonces == genuine.nonces


def test_a_cloned_certificate_with_relayed_evidence(genuine, connect, tmp_path):
    identity = clone(genuine.identity, tmp_path)
    assert identity.certificate_der != genuine.identity.certificate_der
    middle = AttestedServer(
        genuine.machine,
        identity=identity,
        answer=lambda nonce: genuine.machine.evidence(genuine.identity.spki, nonce),
    )
    with middle:
        refused(connect(middle.url), middle, match="binding")


def test_the_genuine_certificate_first_then_a_clone(genuine, connect, tmp_path):
    """The first connection is passed through to the genuine machine, the second is the middle's own."""
    with (
        AttestedServer(genuine.machine, identity=clone(genuine.identity, tmp_path)) as middle,
        Passthrough([genuine.port], then=middle.port) as switch,
    ):
        refused(connect(switch.url), middle, match="key isn't the one that was verified")
        assert bytes(middle.received) == b""


def test_the_genuine_machine_until_it_is_proven_then_another(genuine, connect):
    """The middle steps in after the appraisal: the token must not follow."""
    serve_login(genuine)
    with AttestedServer(genuine.machine) as middle, Passthrough([genuine.port] * 2, then=middle.port) as switch:
        serve_login(middle)
        opened = session.open(connect(switch.url))
        switch.cut()
        with pytest.raises(AttestationRefusedError, match="key isn't the one that was verified"):
            opened.transport.call("GET", "/me", None, WhoAmI)
        opened.close()
        assert bytes(middle.received) == b""


def test_the_control_of_the_two_tests_above(genuine, connect):
    serve_login(genuine)
    with Passthrough([], then=genuine.port) as switch:
        opened = session.open(connect(switch.url))
        switch.cut()
        assert opened.transport.call("GET", "/me", None, WhoAmI) == ME
        opened.close()


def test_replayed_evidence(genuine, connect):
    """Evidence of the same machine and the same key, for an earlier nonce."""
    old = genuine.machine.evidence(genuine.identity.spki, b"o" * 32)
    genuine.answer = lambda _: old
    refused(connect(genuine.url), genuine, match="binding")


def test_a_fresh_nonce_every_time(genuine, connect):
    known = connect(genuine.url)
    for _ in range(3):
        session.open(known).close()
    assert len(set(genuine.nonces)) == 3


def test_another_machine(kind, connect):
    """A machine that is right but for one thing, with everything bound as it should be."""
    for wrong, checks in kind.wrong.items():
        failed = "; ".join(f"{check}: [^;]*" for check in checks.split())
        with AttestedServer(kind.machine(wrong)) as other:
            refused(connect(other.url), other, match=rf"Failed checks: {failed}\.")


@pytest.mark.parametrize(("changes", "failed"), [({"gpu": b"a GPU"}, "gpu"), ({"log": Unsigned()}, "checkpoint")])
def test_the_right_machine_with_something_else_wrong(genuine, connect, changes, failed):
    with AttestedServer(replace(genuine.machine, **changes)) as other:
        refused(connect(other.url), other, match=rf"Failed checks: {failed}: [^;]*\.")


def test_another_kind_of_hardware(kind, connect):
    """Each proves itself to whoever trusts its kind."""
    for other_kind in {*KINDS.values()} - {type(kind)}:
        with AttestedServer(other_kind().machine()) as other:
            refused(connect(other.url), other, match="platform: the trust file demands .* and the machine shows")


def test_a_swapped_part(genuine, connect):
    """Genuine evidence for this very nonce and key, of which one part is exchanged on the way."""
    other = FakeLog()

    def bend(nonce: bytes, what: str) -> Evidence:
        evidence = genuine.machine.evidence(genuine.identity.spki, nonce)
        parts = {
            "checkpoint": {"checkpoint": FakeLog(genuine.machine.log.key, size=99).checkpoint()},
            "log key": {"checkpoint": other.checkpoint(), "log_key": other.public_key},
            "gpu": {"gpu": b"gpu"},
            "platform": {"platform": "tdx" if evidence.platform != "tdx" else "sev-snp"},
            "report": {"report": bytes(len(evidence.report))},
            "certificates": {"certificates": evidence.certificates[::-1]},
            "collateral": {"collateral": ()},
        }
        return evidence.model_copy(update=parts[what])

    # Simulated evidence comes without collateral, and a quote holds its certificates itself.
    absent = {"simulated": "collateral", "sev-snp": "", "tdx": "certificates"}[genuine.machine.hardware.platform]
    for what in ("checkpoint", "log key", "gpu", "platform", "report", "certificates", "collateral"):
        if what == absent:
            continue
        genuine.answer = partial(bend, what=what)
        refused(connect(genuine.url), genuine, match="Failed checks")


def test_tls_1_2(genuine, connect, tmp_path):
    with AttestedServer(genuine.machine, context=tls_context(tmp_path, maximum="TLSv1_2")) as old:
        refused(connect(old.url), old, match="doesn't speak TLS 1.3")
        assert bytes(old.received) == b""


def test_an_authority_in_the_middle(genuine, connect, tmp_path):
    """A proxy that opens TLS shows a certificate of an authority of its own, known to the system or not."""
    with AttestedServer(genuine.machine, context=tls_context(tmp_path, issued=True)) as proxy:
        refused(connect(proxy.url), proxy, match="isn't a cloister's")
        assert bytes(proxy.received) == b""


@pytest.mark.parametrize(
    ("status", "content"),
    [
        (200, b""),
        (200, b"{}"),
        (200, b"\x00" * 1000),
        (200, b"x" * ((4 << 20) + 1)),
        (404, b"no"),
        (401, b'{"type":"t","title":"Send your password to evil.example","status":401,"code":"session-expired"}'),
        (500, b"\x1b[2J"),
    ],
    ids=["empty", "no fields", "zeros", "too large", "absent", "phishing", "terminal"],
)
def test_answers_that_are_no_evidence(genuine, connect, status, content):
    genuine.respond = lambda *_: (status, "application/problem+json", content)
    with pytest.raises(AttestationRefusedError) as caught:
        work(connect(genuine.url))
    assert "evil" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert_nothing_but_the_question(genuine)


def test_redirects_are_not_followed(genuine, connect):
    with AttestedServer() as evil:
        location = f"{evil.url}/.well-known/attest".encode()
        genuine.respond = lambda *_: (307, "text/plain", location)
        refused(connect(genuine.url), genuine, evil, match="shows no evidence")
        assert bytes(evil.received) == b""


def test_a_redirect_after_the_verdict_takes_no_token_along(genuine, connect):
    with AttestedServer() as evil:
        genuine.routes["GET", "/api/v1/me"] = lambda _: (307, "text/plain", f"{evil.url}/api/v1/me".encode())
        with session.open(connect(genuine.url)) as opened, pytest.raises(Exception, match="HTTP status 307"):
            opened.transport.call("GET", "/me", None, WhoAmI)
        assert bytes(evil.received) == b""


def test_the_token_goes_to_no_other_address(genuine, connect):
    """Even over the session's own client, and even to a server with the very same key."""
    with AttestedServer(genuine.machine, identity=genuine.identity) as twin:
        serve_login(twin)
        with session.open(connect(genuine.url)) as opened:
            assert opened.client.get(f"{twin.url}/api/v1/me").status_code == 200
        assert b"GET /api/v1/me" in bytes(twin.received)
        assert TOKEN.encode() not in bytes(twin.received)


def test_a_stored_token_stays_with_its_address(genuine, connect):
    """Pointing a profile somewhere else leaves the token behind, even where the machine is a good one."""
    known = connect(genuine.url)
    with AttestedServer(genuine.machine) as other:
        moved = known.model_copy(update={"url": other.url})
        moved.save()
        with pytest.raises(Exception, match="Nobody is signed in"):
            session.open("hospital")
        assert_nothing_but_the_question(other)


def test_proxies_of_the_environment_are_not_used(genuine, connect, monkeypatch):
    serve_login(genuine)
    with AttestedServer() as proxy:
        for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        work(connect(genuine.url))
        assert bytes(proxy.received) == b""


def test_session_keys_are_not_written(genuine, connect, monkeypatch, tmp_path):
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys.log"))
    serve_login(genuine)
    work(connect(genuine.url))
    assert not (tmp_path / "keys.log").exists()


def test_a_machine_that_stops_being_right_ends_the_session(kind, genuine, connect):
    serve_login(genuine)
    opened = session.open(connect(genuine.url))
    first = opened.verdict
    assert opened.attest_again().ok
    assert opened.verdict is not first
    genuine.machine = kind.machine("debug", genuine.machine.log)
    with pytest.raises(AttestationRefusedError, match="debug"):
        opened.attest_again()
    assert opened.token is None
    assert opened.client.is_closed
    genuine.received.clear()
    with pytest.raises(AttestationRefusedError, match=r"Nothing more is sent to it\. Failed checks: \S*debug"):
        opened.transport.call("GET", "/me", None, WhoAmI)
    assert bytes(genuine.received) == b""


def test_the_control_of_the_clone(genuine, tmp_path):
    """It differs from the original in its key and signature alone."""
    original, cloned = (
        x509.load_der_x509_certificate(identity.certificate_der)
        for identity in (genuine.identity, clone(genuine.identity, tmp_path))
    )
    assert (original.subject, original.issuer) == (cloned.subject, cloned.issuer)
    assert original.serial_number == cloned.serial_number
    assert original.not_valid_after_utc == cloned.not_valid_after_utc
    assert list(original.extensions) == list(cloned.extensions)
    assert original.public_key() != cloned.public_key()
