"""What leaves the kernel on its Jupyter channels: lies about whose it is, too much of it, and what isn't a message.

None of this needs a sandbox to be stopped: each kernel has a relay of its own. The host looks at what arrived at
another kernel's client, and whether the relay still serves everybody.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from typing import Any

from tests.attack.battery.registry import Given, Stopped, attack

DELIMITER = b"<IDS|MSG>"


def _kernel() -> Any:
    from IPython import get_ipython

    return get_ipython().kernel


def _send(kind: str, content: dict[str, Any], **options: Any) -> None:
    kernel = _kernel()
    kernel.session.send(kernel.iopub_socket, kind, content, **options)


@attack("output: messages that claim another session's request", proof="host", forked=False, bare=False)
def forged_parent(given: Given) -> str:
    victim = given["victim"]
    header = {"msg_id": victim["message"], "session": victim["session"], "msg_type": "execute_request", "username": victim["user"]}
    for kind, content in (
        ("stream", {"name": "stdout", "text": given["forged"]}),
        ("display_data", {"data": {"text/html": f"<script>{given['forged']}</script>"}, "metadata": {}, "transient": {}}),
        ("status", {"execution_state": "dead"}),
        ("execute_input", {"code": given["forged"], "execution_count": 1}),
    ):
        _send(kind, content, parent={"header": header}, ident=f"kernel.{victim['kernel']}.{kind}".encode())
    return "four forged messages sent"


@attack("output: messages for another session's comm", proof="host", forked=False, bare=False)
def foreign_comm(given: Given) -> str:
    for kind in ("comm_open", "comm_msg", "comm_close"):
        content = {"comm_id": given["victim"]["comm"], "target_name": "jupyter.widget", "data": {"x": given["forged"]}}
        _send(kind, content)
    return "three sent"


@attack("output: messages of a hundred thousand parts", proof="watch", forked=False, bare=False)
def many_parts(given: Given) -> str:
    for count in (4097, 100_000):
        _send("display_data", {"data": {}, "metadata": {}}, buffers=[b""] * count)
    return "sent"


@attack("output: what isn't a message", proof="watch", forked=False, bare=False)
def malformed(given: Given) -> str:
    kernel = _kernel()
    for parts in (
        [b""],
        [b"x"],
        [DELIMITER],
        [DELIMITER, DELIMITER, DELIMITER],
        [DELIMITER, b"", b"", b"", b""],
        [b"topic", DELIMITER, b"", b"\xff\xfe", b"\x00", b"[", b"}"],
        [b"topic", DELIMITER, b"", b"[" * 100_000, b"{}", b"{}", b"{}"],
        [b"topic", DELIMITER, b"", json.dumps({"msg_type": ["list"]}).encode(), b"null", b"1", b'"'],
        [b"x" * 70_000, DELIMITER, b"", b"{}", b"{}", b"{}", b"{}", DELIMITER, b"buffer"],
        [bytes([number]) for number in range(256)],
    ):
        kernel.iopub_socket.send_multipart(parts)
    return "sent"


@attack("output: a huge message", proof="watch", forked=False, bare=False)
def huge(given: Given) -> str:
    _send("stream", {"name": "stdout", "text": "x" * given["limits"]["message"]})
    return f"{given['limits']['message'] >> 20} MiB"


@attack("output: a flood of small messages", proof="watch", forked=False, bare=False)
def flood(given: Given) -> str:
    for number in range(given["limits"]["messages"]):
        _send("stream", {"name": "stdout", "text": f"{number}\n"})
    return f"{given['limits']['messages']} messages"


def _own_listeners() -> list[int]:
    found = []
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            with socket.socket(fileno=os.dup(number)) as one:
                if one.family == socket.AF_UNIX and one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    found.append(number)
        except OSError:
            continue
    return found


def _greeting(kind: bytes) -> bytes:
    """ZMTP 3.0: the greeting with the NULL mechanism, then READY."""
    ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind + b"\x08Identity" + struct.pack(">I", 0)
    return (
        b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + b"\x00" + bytes(31) + b"\x04" + bytes([len(ready)]) + ready
    )


HOSTILE = {
    "no greeting": b"GET / HTTP/1.1\r\n\r\n" * 10,
    "a cut greeting": b"\xff\x00\x00\x00",
    "an old greeting": b"\x01\x00" * 64,
    "another mechanism": b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(15) + b"\x00" + bytes(31) + b"\x04\xff",
    "a command of 2^63 bytes": _greeting(b"ROUTER") + b"\x06" + b"\x7f" + b"\xff" * 7 + b"x" * 100,
    "a message of 2^63 bytes": _greeting(b"PUB") + b"\x02" + b"\x7f" + b"\xff" * 7 + b"x" * 100,
    "a message of 2^40 bytes": _greeting(b"ROUTER") + b"\x02" + struct.pack(">Q", 1 << 40) + b"x" * 1000,
    "unknown flags": _greeting(b"PUB") + b"\xf8\x01x" * 100,
    "a READY of bad lengths": _greeting(b"PUB")[:64] + b"\x04\x20\x05READY\xff" + b"\xff" * 25,
    "empty parts without end": _greeting(b"PUB") + b"\x01\x00" * 10_000,
}


@attack("output: another ZeroMQ peer in the kernel's place", proof="watch", forked=False, bare=False, seconds=30)
def hostile_peer(given: Given) -> str:
    """The relay connects to sockets that the kernel owns: there, anything may answer.

    A second listener of the kernel's would need its socket's path; so the real ones are used, in a forked child: it
    accepts on the inherited listeners, while the relay is made to connect anew by the connections being shut down.
    """
    listeners = _own_listeners()
    if not listeners:
        raise AssertionError("the kernel's listening sockets weren't found")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, str(_answer_hostile(listeners)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    taken = b""
    deadline = time.monotonic() + 20
    os.set_blocking(reading, False)
    while not taken and time.monotonic() < deadline:
        time.sleep(0.05)
        try:
            taken = os.read(reading, 16)
        except BlockingIOError:
            continue
    os.waitpid(child, 0)
    if int(taken or b"0") == 0:
        raise Stopped("the relay never came back")
    return f"{taken.decode()} connections answered with garbage"


def _answer_hostile(listeners: list[int]) -> int:
    """Shut down what is connected, accept what comes, and answer with one thing of HOSTILE after the other."""
    paths = {socket.socket(fileno=os.dup(number)).getsockname() for number in listeners}
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            with socket.socket(fileno=os.dup(number)) as one:
                if one.family == socket.AF_UNIX and one.getsockname() in paths and number not in listeners:
                    one.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue
    waiting, answers, end = [socket.socket(fileno=number) for number in listeners], list(HOSTILE.values()), time.monotonic() + 4
    taken = 0
    for one in waiting:
        one.setblocking(False)
    held = []
    while time.monotonic() < end and taken < 3 * len(answers):
        for one in waiting:
            try:
                accepted, _ = one.accept()
            except OSError:
                continue
            accepted.settimeout(0.2)
            try:
                accepted.sendall(answers[taken % len(answers)])
            except OSError:
                pass
            held.append(accepted)
            taken += 1
            if len(held) > 4:
                held.pop(0).close()
        time.sleep(0.001)
    return taken
