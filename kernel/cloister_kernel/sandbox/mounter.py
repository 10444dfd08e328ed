"""The process that mounts: one, small, with a single thread, forked by the kernel service before it has any other.

setns(2) and user namespaces want a process with a single thread, which the service isn't. The service asks over a
socketpair; each order is one JSON message, each answer another one, empty where it was carried out.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from typing import Any

from cloister_kernel.process import die_with_parent
from cloister_kernel.sandbox.namespaces import (
    CLONE_NEWNS,
    MS_NODEV,
    MS_NOSUID,
    attach,
    bind_read_only,
    detached_copy,
    mount,
    owner_map,
    setns,
    unmount,
)

MAX_MESSAGE = 64 << 10


class Mounter:
    """The service's end. Its methods block for a few milliseconds; they are safe from several threads."""

    def __init__(self) -> None:
        """Fork the process. To be called in the service's own mount namespace, before there is a second thread."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                ours.close()
                # They reach the whole group; this process is needed until the service has put things away.
                for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
                    signal.signal(number, signal.SIG_IGN)
                die_with_parent(signal.SIGKILL)
                if os.getppid() == parent:
                    serve(theirs)
            finally:
                os._exit(0)
        theirs.close()
        self._socket = ours
        self._lock = threading.Lock()

    def stage(self, path: str) -> None:
        """An empty directory in memory that others may traverse. Raises OSError."""
        self._ask({"op": "tmpfs", "path": path, "options": "mode=711,size=1m"})

    def show(self, source: str, target: str) -> None:
        """`source`, read-only, at `target`, which exists. Raises OSError."""
        self._ask({"op": "show", "source": source, "path": target})

    def home(self, path: str, *, owner: int, size: int, inodes: int) -> None:
        """A home in memory of at most `size` bytes and `inodes` files at `path`, which exists. Raises OSError."""
        options = f"mode=700,uid={owner},gid={owner},size={size},nr_inodes={inodes}"
        self._ask({"op": "tmpfs", "path": path, "options": options})

    def drop(self, path: str) -> None:
        """Raises OSError."""
        self._ask({"op": "drop", "path": path})

    def attach(self, home: str, target: str, namespace: int, owners: tuple[int, int] | None) -> None:
        """Show `home` at `target` in another mount namespace (a descriptor of /proc/PID/ns/mnt). Raises OSError.

        `owners` translates who owns the files: (on disk, in the sandbox).
        """
        self._ask({"op": "attach", "path": home, "target": target, "owners": owners}, namespace)

    def close(self) -> None:
        self._socket.close()
        os.waitpid(self._pid, 0)

    def _ask(self, order: dict[str, Any], descriptor: int | None = None) -> None:
        with self._lock:
            descriptors = [] if descriptor is None else [descriptor]
            socket.send_fds(self._socket, [json.dumps(order).encode()], descriptors)
            answer = self._socket.recv(MAX_MESSAGE)
        if not answer:
            raise OSError("the process that mounts has ended")
        found = json.loads(answer)
        if found:
            raise OSError(found["errno"], found["why"])


def serve(orders: socket.socket) -> None:
    """Until the service closes its end."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(orders, MAX_MESSAGE, 1)
        if not message:
            return
        answer: dict[str, Any] = {}
        try:
            obey(json.loads(message), descriptors)
        except OSError as error:
            answer = {"errno": error.errno or 0, "why": error.strerror or str(error)}
        except Exception as error:
            answer = {"errno": 0, "why": f"{type(error).__name__}: {error}"}
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        orders.send(json.dumps(answer).encode())


def obey(order: dict[str, Any], descriptors: list[int]) -> None:
    """One order. Raises OSError."""
    match order["op"]:
        case "tmpfs":
            mount("cloister", order["path"], "tmpfs", MS_NOSUID | MS_NODEV, order["options"])
        case "show":
            bind_read_only(order["source"], order["path"])
        case "drop":
            unmount(order["path"])
        case "attach":
            owners = order["owners"]
            id_map = None if owners is None else owner_map(*owners)
            try:
                tree = detached_copy(order["path"], id_map)
            finally:
                if id_map is not None:
                    os.close(id_map)
            try:
                _in_namespace(descriptors[0], tree, order["target"])
            finally:
                os.close(tree)


def _in_namespace(namespace: int, tree: int, target: str) -> None:
    """In a child, which doesn't come back from there."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            setns(namespace, CLONE_NEWNS)
            attach(tree, target)
        except OSError as error:
            os.write(write, f"{error.errno or 0} {error.strerror or error}".encode()[:4096])
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        failure = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if failure:
        number, _, why = failure.partition(" ")
        raise OSError(int(number), why)
    if status != 0:
        raise OSError("the home couldn't be attached")
