"""Another ZeroMQ peer in the kernel's place: what ipykernel sends, anything in the kernel may send.

A forked child stops the kernel and writes to its connections from the relay. It tells its results as a well made
message to the relay, which thereby shows that it has survived. The kernel is of no more use afterwards.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import time

from tests.attack.battery.registry import Given


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
        b"\xff"
        + bytes(8)
        + b"\x7f\x03\x00NULL"
        + bytes(16)
        + b"\x00"
        + bytes(31)
        + b"\x04"
        + bytes([len(ready)])
        + ready
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


def _connections(listeners: list[int]) -> dict[int, socket.socket]:
    """By listener, the relay's connection to it: the kernel accepted one on each."""
    paths = {socket.socket(fileno=os.dup(number)).getsockname(): number for number in listeners}
    found = {}
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            one = socket.socket(fileno=os.dup(number))
            if one.family == socket.AF_UNIX and number not in listeners and one.getsockname() in paths:
                one.setblocking(True)
                one.settimeout(10.0)
                found[paths[one.getsockname()]] = one
    return found


def _garbage(connections: list[socket.socket]) -> int:
    """On each connection another thing of HOSTILE, as if it were a message: connections that took some of it."""
    taken = 0
    for number, connection in enumerate(connections):
        for garbage in list(HOSTILE.values())[number:]:
            try:
                connection.sendall(garbage)
            except OSError:
                break  # the relay has had enough
            taken += 1
    return taken


def _endless(connection: socket.socket, size: int) -> int:
    """Parts of 1 MiB with more to come, and an end after all: MiB that were taken of one message."""
    sent = 0
    while sent < size:
        connection.sendall(b"\x03" + struct.pack(">Q", 1 << 20) + bytes(1 << 20))
        sent += 1 << 20
    time.sleep(0.5)
    connection.sendall(b"\x00\x00")
    return sent >> 20


def _tell(connection: socket.socket, text: str) -> None:
    """As the kernel's iopub, to the relay's subscriber."""
    header = {"msg_id": "0", "msg_type": "stream", "session": "0", "username": "kernel", "date": "", "version": "5.3"}
    content = {"name": "stdout", "text": text}
    parts = [b"stream", b"<IDS|MSG>", b"", json.dumps(header).encode(), b"{}", b"{}", json.dumps(content).encode()]
    for number, part in enumerate(parts):
        connection.sendall(struct.pack(">BQ", 2 | (number < len(parts) - 1), len(part)) + part)
    time.sleep(1)


def take_the_kernels_place(given: Given) -> None:
    """Returns in the kernel, when it is let go on."""
    from ipykernel.connect import get_connection_info

    # A port's number is that of the listening descriptor.
    iopub = int(dict(get_connection_info(unpack=True))["iopub_port"])
    listeners = _own_listeners()
    child = os.fork()
    if child != 0:
        os.waitpid(child, 0)
        return
    kernel = os.getppid()
    try:
        os.kill(kernel, signal.SIGSTOP)
        connections = _connections(listeners)
        told = connections.pop(iopub)
        results = []
        for name, proof, count, what in (
            ("peer: a message that never ends", "host", _endless(told, given["limits"]["endless"]), "MiB"),
            ("peer: garbage in the kernel's place", "watch", _garbage(list(connections.values())), "pieces"),
        ):
            verdict = "open" if count else "broken"
            results.append({"name": name, "proof": proof, "verdict": verdict, "detail": f"{count} {what}", "took": ""})
        _tell(told, "<<RESULT" + json.dumps(results) + "RESULT>>")
    finally:
        os.kill(kernel, signal.SIGCONT)
        os._exit(0)
