"""Calls and events over a guard's socket: what goes out, what comes back, and every way in which it may break."""

import asyncio
import gzip
import json
import socket
import ssl
import threading
import tracemalloc
from contextlib import contextmanager

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.transport import MAX_EVENT, Transport, read_event_stream
from cloister_data.errors import (
    AttestationRefusedError,
    BudgetFacts,
    BudgetRefusedError,
    CloisterError,
    NotFoundError,
    TooLargeError,
    UnavailableError,
    UnreachableError,
)
from cloister_data.events import AttestationEvent, Event
from cloister_data.identity import LoginRequest, WhoAmI

ME = WhoAmI(user="ann", role="scientist", cloister="hospital", simulated=True, version="0.1.0")


def transport(handler) -> Transport:
    return Transport(httpx.Client(transport=httpx.MockTransport(handler), base_url="http://cloister"))


def answering(status=200, content=b"", content_type="application/json"):
    return transport(lambda _: httpx.Response(status, content=content, headers={"content-type": content_type}))


def test_a_call():
    seen = []

    def handle(request):
        seen.append((request.method, request.url.path, request.headers["content-type"], request.content))
        return httpx.Response(200, content=ME.to_json())

    sent = LoginRequest(user="ann", password="password")
    assert transport(handle).call("POST", "/login", sent, WhoAmI) == ME
    assert seen == [("POST", "/api/v1/login", "application/json", sent.to_json())]


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/me", "/api/v1/me"),
        ("/api/v1/me", "/api/v1/me"),
        ("/.well-known/attest", "/.well-known/attest"),
        ("/datasets/a/b?x=1", "/api/v1/datasets/a/b"),
    ],
)
def test_paths(path, route):
    seen = []

    def handle(request):
        seen.append(request.url.path)
        return httpx.Response(200)

    transport(handle).raw("GET", path)
    assert seen == [route]
    with pytest.raises(ValueError, match="begins with /"):
        transport(handle).raw("GET", "https://evil.example/")


def test_binary_bodies_carry_their_type():
    seen = []

    def handle(request):
        seen.append((request.headers.get("content-type"), request.content))
        return httpx.Response(200, content=b"\x00weights")

    over = transport(handle)
    assert over.raw("POST", "/models", b"body", "application/vnd.cloister.model") == b"\x00weights"
    over.raw("POST", "/models", b"body")
    over.raw("GET", "/me")
    assert seen == [("application/vnd.cloister.model", b"body"), ("application/octet-stream", b"body"), (None, b"")]


def test_refusals_come_back_as_what_they_were():
    budget = BudgetFacts(account="a", asked=2.0, left=0.5, fits=0.4, delta=1e-5)
    error = BudgetRefusedError("Too much.", why="Because.", next_step="Ask for less.", budget=budget)
    refusing = answering(403, error.to_problem().to_json(), "application/problem+json; charset=utf-8")
    with pytest.raises(BudgetRefusedError, match=r"Too much\. Because\. Ask for less\.") as caught:
        refusing.call("POST", "/queries", None, WhoAmI)
    assert caught.value.budget == budget
    problem = NotFoundError("Nothing there.").to_problem().to_json()
    with pytest.raises(NotFoundError):
        answering(404, problem, "application/problem+json").raw("GET", "/x")


@pytest.mark.parametrize(
    ("status", "content", "kind"),
    [
        (503, b"", UnavailableError),
        (502, b"<html>", UnavailableError),
        (500, b"{}", CloisterError),
        (422, b'{"detail": []}', CloisterError),
        (302, b"", CloisterError),
        (404, b"not json", CloisterError),
    ],
)
def test_refusals_without_an_explanation(status, content, kind):
    for content_type in ("application/json", "application/problem+json", "text/html"):
        with pytest.raises(kind) as caught:
            answering(status, content, content_type).call("GET", "/me", None, WhoAmI)
        assert caught.value.next_step


@pytest.mark.parametrize("content", [b"", b"{}", b"null", ME.to_json()[:-1], ME.to_json().replace(b"{", b'{"more":1,')])
def test_an_answer_of_another_version(content):
    with pytest.raises(CloisterError, match=r"can't be read.*It isn't a WhoAmI.*pip install -U cloister"):
        answering(200, content).call("GET", "/me", None, WhoAmI)


def test_answers_are_bounded():
    with pytest.raises(TooLargeError, match="more than 10 bytes"):
        answering(200, b"x" * 11).raw("GET", "/x", limit=10)
    assert answering(200, b"x" * 10).raw("GET", "/x", limit=10) == b"x" * 10


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize("coding", ["gzip, gzip", "GZIP", "identity, deflate", "br"])
def test_a_compressed_answer_is_refused_before_it_unfolds(status, coding):
    """Two layers of gzip make a kilobyte of a gigabyte: the limit would be looked at when it is in memory."""
    packed = gzip.compress(gzip.compress(bytes(64 << 20)))

    def handle(_):
        headers = {"content-encoding": coding, "content-type": "application/json"}
        return httpx.Response(status, stream=httpx.ByteStream(packed), headers=headers)

    tracemalloc.start()
    try:
        with pytest.raises(CloisterError, match="compressed"):
            transport(handle).raw("POST", "/.well-known/attest", b"{}", limit=128 << 20)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    with pytest.raises(CloisterError, match="compressed"):
        next(transport(handle).events())


def test_an_answer_may_say_that_it_is_not_compressed():
    def handle(_):
        return httpx.Response(200, stream=httpx.ByteStream(b"{}"), headers={"content-encoding": "identity"})

    assert transport(handle).raw("GET", "/me") == b"{}"


def test_a_call_names_what_it_receives():
    with pytest.raises(TypeError):
        answering().call("GET", "/me")


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        (httpx.ConnectError("refused"), UnreachableError, "can't be reached"),
        (httpx.ReadError("reset"), UnreachableError, "never charged twice"),
        (httpx.RemoteProtocolError("garbage"), UnreachableError, "may have restarted"),
        (httpx.ReadTimeout("slow"), UnreachableError, "never charged twice"),
        (httpx.DecodingError("gzip"), UnreachableError, "can't be reached"),
        (httpx.ConnectTimeout("slow"), UnreachableError, "in time"),
    ],
)
def test_a_broken_connection(raised, kind, text):
    def handle(_):
        raise raised

    with pytest.raises(kind, match=text):
        transport(handle).call("GET", "/me", None, WhoAmI)


def test_another_key_is_told_apart_from_a_broken_connection():
    def handle(_):
        raise httpx.ConnectError("tls") from ssl.SSLCertVerificationError("unknown certificate")

    with pytest.raises(AttestationRefusedError, match="key isn't the one that was verified"):
        transport(handle).raw("GET", "/me")


def event(number: int) -> Event:
    return Event(id=f"{'0' * 16}-{number}", at=number, body=AttestationEvent(certificate="0" * 64))


def stream(*events: Event) -> bytes:
    parts = [b": hello\n\n"]
    for item in events:
        parts.append(b"id: %s\nevent: %s\ndata: %s\n\n" % (item.id.encode(), item.body.kind.encode(), item.to_json()))
    return b"".join(parts)


def test_events_arrive_and_resume():
    seen = []

    def handle(request):
        seen.append((request.url.path, request.headers.get("last-event-id"), request.headers["accept"]))
        return httpx.Response(200, content=stream(event(1), event(2)), headers={"content-type": "text/event-stream"})

    over = transport(handle)
    assert list(over.events()) == [event(1), event(2)]
    assert list(over.events(event(2).id)) == [event(1), event(2)]
    assert seen == [
        ("/api/v1/events", None, "text/event-stream"),
        ("/api/v1/events", event(2).id, "text/event-stream"),
    ]


def test_an_event_stream_that_is_refused_or_odd():
    problem = NotFoundError("Nothing there.").to_problem().to_json()
    with pytest.raises(NotFoundError):
        list(answering(404, problem, "application/problem+json").events())
    with pytest.raises(CloisterError, match="can't be read"):
        list(answering(200, b"data: {}\n\n").events())


@given(st.lists(st.integers(1, 9), max_size=4), st.integers(1, 40), st.booleans())
def test_events_may_be_cut_anywhere(numbers, size, crlf):
    content = stream(*map(event, numbers))
    if crlf:
        content = content.replace(b"\n", b"\r\n")
    chunks = [content[at : at + size] for at in range(0, len(content), size)]
    assert [Event.from_json(data) for data in read_event_stream(chunks)] == [event(number) for number in numbers]


def test_events_of_several_lines_are_joined():
    assert list(read_event_stream([b"data: a\ndata:b\ndata\n: c\n\ndata: d\n\ndata: unfinished\n"])) == [
        b"a\nb\n",
        b"d",
    ]


def test_events_are_bounded():
    with pytest.raises(TooLargeError):
        list(read_event_stream([b"data: ", *[b"x" * 65536] * (MAX_EVENT // 65536 + 1)]))
    with pytest.raises(TooLargeError):
        list(read_event_stream([b"data: " + b"x" * 65535 + b"\n"] * (MAX_EVENT // 65535 + 1)))


@contextmanager
def unix_server(path, respond):
    """A guard's unix socket that answers one request per connection."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve():
            while True:
                connection, _ = listener.accept()
                with connection:
                    request = connection.recv(65536)
                    if not request:
                        return
                    connection.sendall(respond(request))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            with socket.socket(socket.AF_UNIX) as last:
                last.connect(str(path))
            thread.join()


def test_over_a_unix_socket(tmp_path, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    seen = []

    def respond(request):
        seen.append(request)
        head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(ME.to_json())}\r\nconnection: close\r\n\r\n"
        return head.encode() + ME.to_json()

    path = tmp_path / "guard.sock"
    with unix_server(path, respond), Transport.unix(path) as over:
        assert over.call("GET", "/me", None, WhoAmI) == ME
    assert seen[0].startswith(b"GET /api/v1/me HTTP/1.1\r\n")
    assert b"authorization" not in seen[0].lower()


# httpcore leaves the socket that couldn't connect to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_unix_socket_that_is_not_there(tmp_path):
    with Transport.unix(tmp_path / "absent.sock") as over, pytest.raises(UnreachableError):
        over.call("GET", "/me", None, WhoAmI)


def test_it_may_be_used_from_a_running_event_loop():
    async def inside() -> WhoAmI:
        return await asyncio.to_thread(answering(200, ME.to_json()).call, "GET", "/me", None, WhoAmI)

    assert asyncio.run(inside()) == ME
    assert json.loads(ME.to_json())["user"] == "ann"
