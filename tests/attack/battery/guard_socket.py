"""The one door: the kernel's own socket to the guard. What is sent there is meant to confuse, to lie or to exhaust."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import struct
import time
from typing import Any

from tests.attack.battery.registry import Given, Stopped, attack, first


def connect(seconds: float = 3.0) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.settimeout(seconds)
    made.connect(os.environ["CLOISTER_GUARD_SOCKET"])
    return made


def talk(said: bytes, seconds: float = 3.0) -> bytes:
    """Everything that comes back until the guard hangs up, or is silent for a while."""
    with connect(seconds) as made:
        heard = b""
        # It may have answered before it hung up.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            made.sendall(said)
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while piece := made.recv(65536):
                heard += piece
                made.settimeout(0.3)
        return heard


def request(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: cloister", "Connection: close", *headers]
    if body or method in ("POST", "PUT"):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def answer(said: bytes, seconds: float = 3.0) -> tuple[int, bytes]:
    """(the first answer's status, everything). Raises Stopped where the guard just hangs up."""
    heard = talk(said, seconds)
    if not heard.startswith(b"HTTP/1.1 "):
        raise Stopped("the guard hung up")
    return int(heard[9:12]), heard


def refused(said: bytes, seconds: float = 3.0) -> str:
    """Raises Stopped where the answer is a refusal; returns an answer that isn't."""
    status, heard = answer(said, seconds)
    if status >= 400:
        raise Stopped(f"HTTP {status}")
    return f"HTTP {status}: {heard[-200:].decode('utf-8', 'replace')}"


def ask(question: dict[str, Any], epsilon: object = 0.01, request_id: str = "") -> bytes:
    body = {"request_id": request_id or secrets.token_hex(16), "question": question, "epsilon": epsilon}
    return request("POST", "/api/v1/queries", json.dumps(body).encode())


def mean(dataset: str, **changes: Any) -> dict[str, Any]:
    source = {"dataset": dataset, "division": None, "part": "all", "test": 0.2}
    return {"source": source, "operation": "mean", "column": "value", "group_by": None} | changes


@attack("guard: a forged user in a header", proof="seen", bare=False)
def forged_user(given: Given) -> str:
    """Names that proxies and frameworks take a user from."""
    victim = given["victim"]["user"]
    names = (
        "X-User",
        "X-Forwarded-User",
        "Remote-User",
        "X-Remote-User",
        "X-Forwarded-For",
        "Forwarded",
        "Cloister-Caller",
    )
    forged = [f"{name}: {victim}" for name in names]
    forged += [
        f"Authorization: Bearer {victim}",
        f"Cookie: user={victim}",
        f"Host: {victim}",
        "X-HTTP-Method-Override: DELETE",
    ]
    _, heard = answer(request("GET", "/api/v1/me", b"", *forged))
    if f'"{victim}"'.encode() in heard:
        return f"the guard takes it for {victim}"
    raise Stopped("it answers as the socket's user")


@attack("guard: a forged user in the body", proof="seen", bare=False)
def forged_user_in_body(given: Given) -> str:
    body = {"request_id": secrets.token_hex(16), "question": mean(given["own_dataset"]), "epsilon": 0.01}
    return refused(request("POST", "/api/v1/queries", json.dumps({**body, "user": given["victim"]["user"]}).encode()))


@attack("guard: routes of owners, admins and laptops", proof="seen", bare=False, seconds=15)
def other_routes(given: Given) -> str:
    tries = [
        ("POST", "/api/v1/users"),
        ("GET", "/api/v1/users"),
        ("POST", "/api/v1/login"),
        ("POST", "/api/v1/sessions"),
        ("POST", "/api/v1/datasets"),
        ("PUT", "/api/v1/owner"),
        ("GET", "/api/v1/owner"),
        ("GET", "/api/v1/audit/entries"),
        ("GET", "/api/v1/kernels"),
        ("POST", "/api/v1/kernels"),
        ("GET", "/api/v1/metrics"),
        ("GET", "/metrics"),
        ("GET", "/.well-known/attest"),
        ("GET", "/api/v1/openapi.json"),
        ("GET", "/docs"),
        ("TRACE", "/api/v1/me"),
        ("CONNECT", "/api/v1/me"),
        ("PATCH", "/api/v1/me"),
    ]
    return first([lambda m=method, p=path: refused(request(m, p)) for method, path in tries])  # type: ignore[misc]


@attack("guard: paths that lead elsewhere", proof="seen", bare=False)
def paths(given: Given) -> str:
    victim = given["victim"]["dataset"]
    tries = [
        f"/api/v1/datasets/{victim}",
        "/api/v1/datasets/../../../etc/passwd",
        "/api/v1/datasets/%2e%2e/%2e%2e",
        "/api/v1/datasets/..%2f..%2fetc/passwd",
        f"/api/v1/datasets/x/..;/{victim}",
        "/api/v1/me/../users",
        "//api/v1/users",
        "/api/v1/datasets/a%00b/c",
        f"/api/v1/releases/{given['victim']['release']}",
        f"/api/v1/releases/{given['victim']['release'].upper()}",
        f"/api/v1/jobs/{given['victim']['release']}/result",
        "/api/v1/releases/" + "0" * 32,
    ]
    return first([lambda p=path: refused(request("GET", p)) for path in tries])  # type: ignore[misc]


@attack("guard: another user's dataset in a request", proof="seen", bare=False)
def foreign_dataset(given: Given) -> str:
    names = [
        given["victim"]["dataset"],
        "../" + given["victim"]["dataset"],
        given["own_dataset"] + "/../../" + given["victim"]["dataset"],
    ]
    return first([lambda n=name: refused(ask(mean(n))) for name in names])  # type: ignore[misc]


@attack("guard: another user's request id, replayed", proof="seen", bare=False)
def replayed(given: Given) -> str:
    """What was paid under an id is given out again, free; it must be given to who has paid."""
    victim = given["victim"]
    status, heard = answer(ask(mean(victim["dataset"]), victim["epsilon"], victim["request"]))
    if status >= 400:
        status, heard = answer(ask(mean(given["own_dataset"]), victim["epsilon"], victim["request"]))
    if victim["release"].encode() in heard:
        return "the other user's release came"
    raise Stopped(f"HTTP {status}, nothing of the other's")


@attack("guard: an own request id for another question", proof="seen", bare=False)
def reused(given: Given) -> str:
    """A second question under an id that was paid must not be answered free of charge."""
    again = secrets.token_hex(16)
    status, heard = answer(ask(mean(given["own_dataset"]), 0.01, again))
    if status >= 400:
        return f"the door is shut: {heard[-300:].decode('utf-8', 'replace')}"
    return refused(ask(mean(given["own_dataset"], operation="sum"), 0.01, again))


@attack("guard: an epsilon that isn't a positive number", proof="seen", bare=False)
def epsilons(given: Given) -> str:
    def with_text(text: str) -> str:
        body = json.dumps(
            {"request_id": secrets.token_hex(16), "question": mean(given["own_dataset"]), "epsilon": 424242}
        )
        return refused(request("POST", "/api/v1/queries", body.replace("424242", text).encode()))

    texts = (
        "-1",
        "0",
        "-0.0",
        "NaN",
        "Infinity",
        "-Infinity",
        "1e400",
        "1e-400",
        '"0.01"',
        "true",
        "null",
        "[0.01]",
        "1e308",
        "0x1",
    )
    return first([lambda t=text: with_text(t) for text in texts])  # type: ignore[misc]


@attack("guard: one key twice", proof="seen", bare=False)
def duplicate_keys(given: Given) -> str:
    """The one epsilon for who decides, the other for who computes."""
    body = json.dumps({"request_id": secrets.token_hex(16), "question": mean(given["own_dataset"]), "epsilon": 0.01})
    return refused(request("POST", "/api/v1/queries", (body[:-1] + ', "epsilon": 19.5}').encode()))


@attack("guard: JSON that is deep, long or a bomb", proof="watch", bare=False, seconds=20)
def bombs(given: Given) -> str:
    question = json.dumps(mean(given["own_dataset"]))
    bodies = [
        b"[" * 1_000_000,
        b'{"a":' * 500_000,
        b'{"epsilon":' + b"9" * 2_000_000 + b"}",
        b'{"epsilon":1e' + b"9" * 1_000_000 + b"}",
        b'{"request_id":"' + b"\\u0000" * 500_000 + b'"}',
        b'"' + b"\xff" * 1_000_000 + b'"',
        ('{"question":' + question + "," * 1_000_000 + "}").encode(),
        ("{" + ",".join(f'"k{n}":0' for n in range(200_000)) + "}").encode(),
    ]
    for body in bodies:
        status, _ = answer(request("POST", "/api/v1/queries", body), 10)
        if status < 400:
            raise AssertionError(f"{body[:20]!r} was taken")
    return f"{len(bodies)} bodies refused"


@attack("guard: a pickle, a YAML and XML", proof="host", bare=False, seconds=15)
def executed(given: Given) -> str:
    """Each would make a file where only the guard may, if anybody executed it."""
    command = f"touch {given['executed']}"
    bodies = {
        "application/octet-stream": f"cposix\nsystem\n(S'{command}'\ntR.".encode(),
        "application/x-pickle": f"cposix\nsystem\n(S'{command}'\ntR.".encode(),
        "application/yaml": f"!!python/object/apply:os.system ['{command}']".encode(),
        "application/xml": b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><x>&e;</x>',
        "application/vnd.cloister.model": struct.pack(">I", 2) + b"{}" + f"cposix\nsystem\n(S'{command}'\ntR.".encode(),
    }
    for path in ("/api/v1/queries", "/api/v1/models", "/api/v1/evaluations", "/api/v1/jobs"):
        for kind, body in bodies.items():
            status, heard = answer(request("POST", path, body, f"Content-Type: {kind}"))
            if status < 400:
                return f"{path} took {kind}: {heard[-100:]!r}"
    return "all were refused; whether one was executed, the host sees"


@attack("guard: text that becomes code or an address", proof="seen", bare=False, seconds=15)
def expressions(given: Given) -> str:
    """The guard takes names and numbers only: an expression, a path or a pattern is no column."""
    strange = (
        "__import__('os').system('id')",
        "value; DROP TABLE dataset",
        "value' OR '1'='1",
        "(a+)+$",
        "../../etc/passwd",
        "{0.__class__}",
        "value/(unit==7)",
        "where(unit==7)",
        "\u202evalue",
        "value\x00",
        "*",
    )
    one = given["own_dataset"]
    tries = [mean(one, column=text) for text in strange] + [mean(one, group_by=text) for text in strange]
    tries += [mean(one, operation=text) for text in ("eval", "max", "quantile", "std", "first")]
    tries += [mean(one, where="unit == 7"), mean(one, filter={"unit": 7}), mean(one, rows=[7])]
    tries += [
        mean(one, source=mean(one)["source"] | {"division": "7"}),
        mean(one, column="note"),
        mean(one, column="unit"),
    ]

    def taken(question: dict[str, Any]) -> str:
        return f"{question} gave {refused(ask(question))}"

    return first([lambda q=question: taken(q) for question in tries])  # type: ignore[misc]


def _answers(said: bytes) -> int:
    return talk(said).count(b"HTTP/1.1 ")


SMUGGLED = b"GET /api/v1/me HTTP/1.1\r\nHost: cloister\r\n\r\n"


@attack("guard: a hidden request behind two lengths", proof="seen", bare=False)
def two_lengths(given: Given) -> str:
    said = (
        b"POST /api/v1/queries/cost HTTP/1.1\r\nHost: cloister\r\nContent-Length: 2\r\nContent-Length: %d\r\n\r\n{}"
        % (2 + len(SMUGGLED))
    )
    status, heard = answer(said + SMUGGLED)
    if heard.count(b"HTTP/1.1 ") > 1:
        return "the hidden request was answered"
    if status != 400:
        return f"HTTP {status}: one of the lengths was believed"
    raise Stopped("HTTP 400")


@attack("guard: a hidden request behind a length and chunks", proof="seen", bare=False)
def length_and_chunks(given: Given) -> str:
    body = b"2\r\n{}\r\n0\r\n\r\n"
    said = (
        b"POST /api/v1/queries/cost HTTP/1.1\r\nHost: cloister\r\n"
        b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n" % (len(body) + len(SMUGGLED))
    )
    status, heard = answer(said + body + SMUGGLED)
    if heard.count(b"HTTP/1.1 ") > 1:
        return "the hidden request was answered"
    if status != 400:
        return f"HTTP {status}: chunks and a length together were believed"
    raise Stopped("HTTP 400")


@attack("guard: bad HTTP", proof="seen", bare=False)
def bad_http(given: Given) -> str:
    """What parsers read differently. A refusal or a closed connection is right, an answer isn't."""
    post = b"POST /api/v1/queries/cost HTTP/1.1\r\nHost: cloister\r\n"
    tries = {
        "a negative length": post + b"Content-Length: -1\r\n\r\n{}",
        "a length with a sign": post + b"Content-Length: +2\r\n\r\n{}",
        "a length in hex": post + b"Content-Length: 0x2\r\n\r\n{}",
        "a length of many digits": post + b"Content-Length: 99999999999999999999999\r\n\r\n{}",
        "an unknown encoding": post + b"Transfer-Encoding: xchunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        "a chunk size of many digits": post + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n{}\r\n0\r\n\r\n",
        "a space before the colon": b"GET /api/v1/me HTTP/1.1\r\nHost : cloister\r\n\r\n",
        "NUL in a header": b"GET /api/v1/me HTTP/1.1\r\nHost: clo\x00ister\r\n\r\n",
        "no method": b" /api/v1/me HTTP/1.1\r\n\r\n",
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "a header of 1 MiB": b"GET /api/v1/me HTTP/1.1\r\nHost: cloister\r\nX: " + b"x" * (1 << 20) + b"\r\n\r\n",
        "an address of 1 MiB": b"GET /api/v1/me?" + b"x" * (1 << 20) + b" HTTP/1.1\r\nHost: cloister\r\n\r\n",
    }
    taken = []
    for name, said in tries.items():
        heard = talk(said)
        if heard.startswith(b"HTTP/1.1 2"):
            taken.append(name)
    if taken:
        return "answered: " + ", ".join(taken)
    raise Stopped(f"{len(tries)} refused")


@attack("guard: an absolute address of another host", proof="seen", bare=False)
def absolute(given: Given) -> str:
    """The answer must be the guard's own, as for the path alone: it is nobody's proxy."""
    port = given["ports"]["tcp"]
    heard = talk(b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % (port, port))
    heard += talk(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % (port, port))
    if b"canary" in heard or b"HTTP/1.1 2" in heard:
        return "the guard went there"
    raise Stopped("it answers for itself")


@attack("guard: a websocket where there is none", proof="seen", bare=False)
def websocket(given: Given) -> str:
    upgrade = ("Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: " + "A" * 22 + "==")
    for path in ("/api/v1/me", f"/api/v1/kernels/{given['victim']['kernel']}/channels"):
        if b" 101 " in talk(request("GET", path, b"", *upgrade).replace(b"close", b"Upgrade", 1)):
            return f"{path} was upgraded"
    raise Stopped("refused")


@attack("guard: descriptors by SCM_RIGHTS, to the guard and from it", proof="host", bare=False)
def rights(given: Given) -> str:
    """The guard must keep none (the host counts its open files), and give none."""
    null = os.open(os.devnull, os.O_RDONLY)
    passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("250i", *[null] * 250))]
    for _ in range(8):
        with connect() as made:
            made.sendmsg([request("GET", "/api/v1/me").replace(b"close", b"keep-alive")], passed)
            _, ancillary, _, _ = made.recvmsg(65536, 4096)
            if ancillary:
                return "the guard passed something back"
    return "2000 descriptors sent"


@attack("guard: 4 GiB announced", proof="watch", bare=False, seconds=20)
def announced(given: Given) -> str:
    tries = [
        b"POST /api/v1/queries HTTP/1.1\r\nHost: cloister\r\nContent-Length: 4294967296\r\n\r\n{",
        b"POST /api/v1/queries HTTP/1.1\r\nHost: cloister\r\nContent-Length: 18446744073709551615\r\n\r\n{",
        request("POST", "/api/v1/models", b"\xff\xff\xff\xff" + b"{}"),
        request("POST", "/api/v1/models", b"\x00"),
        b"POST /api/v1/queries HTTP/1.1\r\nHost: cloister\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n{",
    ]
    held = []
    for said in tries:
        made = connect()
        made.sendall(said)
        held.append(made)
    time.sleep(1)
    return f"{len(held)} held"


@attack("guard: a body that never ends", proof="host", bare=False, seconds=20)
def endless(given: Given) -> str:
    """Chunks without an end: the guard may read on, and must keep none of it. The host looks how large it has grown."""
    sent = 0
    with connect() as made:
        made.sendall(b"POST /api/v1/queries HTTP/1.1\r\nHost: cloister\r\nTransfer-Encoding: chunked\r\n\r\n")
        try:
            while sent < 192 << 20:
                made.sendall(b"100000\r\n" + b" " * (1 << 20) + b"\r\n")
                sent += 1 << 20
        except OSError:
            return f"cut off after {sent >> 20} MiB"
    return f"{sent >> 20} MiB were read"


@attack("guard: a thousand connections, and half a request on each", proof="watch", bare=False, seconds=30)
def connections(given: Given) -> str:
    held = []
    for number in range(1000):
        try:
            made = connect(0.5)
            made.sendall(
                b"POST /api/v1/queries HTTP/1.1\r\nHost: cloister\r\n"
                + (b"X: " if number % 2 else b"Content-Length: 10\r\n\r\n{")
            )
            held.append(made)
        except OSError:
            continue
    time.sleep(1.5)
    return f"{len(held)} taken"


@attack("guard: two hundred large bodies, none of them finished", proof="host", bare=False)
def large_bodies(given: Given) -> str:
    """3 MiB of 4 on each connection, as far as the guard takes it. The host looks how large it has grown."""
    waiting: list[list[Any]] = []
    sent, end = 0, time.monotonic() + 2
    for _ in range(200):
        made = connect()
        made.sendall(b"POST /api/v1/queries HTTP/1.1\r\nHost: cloister\r\nContent-Length: 4194304\r\n\r\n")
        made.setblocking(False)
        waiting.append([made, 3 << 20])
    while time.monotonic() < end:
        for one in waiting:
            made, left = one
            with contextlib.suppress(BlockingIOError):
                count = made.send(bytes(min(left, 1 << 18))) if left else 0
                one[1] -= count
                sent += count
    return f"{sent >> 20} MiB sent"


@attack("guard: five hundred streams of events", proof="watch", bare=False, seconds=30)
def streams(given: Given) -> str:
    held = []
    for _ in range(500):
        try:
            made = connect(0.5)
            made.sendall(request("GET", "/api/v1/events", b"", "Last-Event-ID: " + "9" * 64))
            held.append(made)
        except OSError:
            continue
    time.sleep(1)
    return f"{len(held)} taken"


@attack(
    "guard: five hundred requests on one connection, none of whose answers is read",
    proof="watch",
    bare=False,
    seconds=30,
)
def unread(given: Given) -> str:
    made = connect(1.0)
    sent = 0
    try:
        for _ in range(500):
            made.sendall(request("GET", "/api/v1/datasets").replace(b"close", b"keep-alive"))
            sent += 1
    except OSError:
        pass
    time.sleep(1)
    return f"{sent} sent"


@attack("guard: connections opened and reset", proof="watch", bare=False, seconds=20)
def resets(given: Given) -> str:
    for _ in range(1000):
        made = connect(1.0)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        made.send(b"GET /api/v1/me HTTP/1.1\r\nHost: cl")
        made.close()
    return "1000 reset"


@attack("guard: lines put into its log", proof="host", bare=False)
def log_lines(given: Given) -> str:
    """Newlines and terminal codes in a path, a header and a name must not come out as lines of the guard's own."""
    line = given["log_line"]
    for said in (
        request("GET", f"/api/v1/datasets/x/%0a{line}%1b[2J"),
        request("GET", "/api/v1/me", b"", f"User-Agent: x\x1b[2J{line}"),
        ask(mean(f"x/\n{line}")),
    ):
        talk(said)
    return "sent"
