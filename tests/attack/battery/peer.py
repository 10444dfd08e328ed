"""Another ZeroMQ peer in the kernel's place: the relay connects to its sockets, so anything may answer.

A forked child stops the kernel, breaks its connections, and takes what connects anew. It tells its results as a well
made message to the relay, which thereby shows that it has survived. The kernel is of no more use afterwards.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Iterator

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


def _break_connections(listeners: list[int]) -> None:
    paths = {socket.socket(fileno=os.dup(number)).getsockname() for number in listeners}
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as one:
            if one.family == socket.AF_UNIX and one.getsockname() in paths and number not in listeners:
                one.shutdown(socket.SHUT_RDWR)


def _accepted(waiting: list[socket.socket], seconds: float) -> Iterator[socket.socket]:
    """What connects within so many seconds."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        for one in select.select(waiting, [], [], left)[0]:
            accepted, _ = one.accept()
            accepted.settimeout(1.0)
            yield accepted


def _garbage(waiting: list[socket.socket]) -> int:
    """One thing of HOSTILE after the other, each to whoever connects next."""
    taken, held = 0, []
    for accepted in _accepted(waiting, 2):
        with contextlib.suppress(OSError):
            accepted.sendall(list(HOSTILE.values())[taken % len(HOSTILE)])
        held.append(accepted)
        taken += 1
        if taken >= 2 * len(HOSTILE):
            break
        if len(held) > 2:
            held.pop(0).close()
    return taken


def _endless(waiting: list[socket.socket], size: int) -> int:
    """Parts of 1 MiB with more to come: MiB sent of a message that never ends."""
    sent = 0
    for accepted in _accepted(waiting, 3):
        with contextlib.suppress(OSError):
            accepted.sendall(_greeting(b"PUB"))
            while sent < size:
                accepted.sendall(b"\x03" + struct.pack(">Q", 1 << 20) + bytes(1 << 20))
                sent += 1 << 20
            time.sleep(0.5)
        accepted.close()
        break
    return sent >> 20


def _tell(waiting: list[socket.socket], text: str) -> None:
    """As the kernel's iopub, to the relay's subscriber."""
    header = {"msg_id": "0", "msg_type": "stream", "session": "0", "username": "kernel", "date": "", "version": "5.3"}
    content = {"name": "stdout", "text": text}
    parts = [b"stream", b"<IDS|MSG>", b"", json.dumps(header).encode(), b"{}", b"{}", json.dumps(content).encode()]
    frames = b"".join(
        struct.pack(">BQ", 2 | (number < len(parts) - 1), len(part)) + part for number, part in enumerate(parts)
    )
    for accepted in _accepted(waiting, 5):
        with contextlib.suppress(OSError):
            accepted.sendall(_greeting(b"PUB"))
            time.sleep(0.2)
            if b"SUB" in accepted.recv(4096):
                accepted.sendall(frames)
                time.sleep(1)
                return
            accepted.setblocking(False)


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
        _break_connections(listeners)
        # After an error of protocol ZeroMQ doesn't come back: garbage isn't for the channel that tells the results.
        others, told = (
            [socket.socket(fileno=number) for number in listeners if (number == iopub) == wanted]
            for wanted in (False, True)
        )
        results = []
        for name, proof, count, what in (
            ("peer: a message that never ends", "host", _endless(told, given["limits"]["endless"]), "MiB"),
            ("peer: garbage in the kernel's place", "watch", _garbage(others), "connections"),
        ):
            verdict = "open" if count else "broken"
            results.append({"name": name, "proof": proof, "verdict": verdict, "detail": f"{count} {what}", "took": ""})
        _tell(told, "<<RESULT" + json.dumps(results) + "RESULT>>")
    finally:
        os.kill(kernel, signal.SIGCONT)
        os._exit(0)
