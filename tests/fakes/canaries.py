"""What the host plants for attacks to find: secrets in files, sockets, shared memory, keys, and in a process.

Everything is the test's own: who gets out of a sandbox finds only what was put there for it, and does no harm.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.attack.battery.native import NUMBERS, libc
from tests.attack.battery.registry import MARK

# Shows its secret in its environment, arguments, memory, an open file and its directory. Signals stay pending in it.
DECOY = """
import ctypes, json, os, signal, sys, time
secret = sys.argv[1]
open("/proc/self/comm", "w").write("decoy")
held = ctypes.create_string_buffer(secret.encode(), 64)
descriptor = os.memfd_create("secret")
os.write(descriptor, secret.encode())
signal.pthread_sigmask(signal.SIG_BLOCK, range(40, 45))
told = {"pid": os.getpid(), "address": ctypes.addressof(held), "length": 64, "descriptor": descriptor, "name": "decoy"}
print(json.dumps(told), flush=True)
time.sleep(600)
"""


class Secrets:
    """Makes secrets, and knows which were made: a proof that shows none of them is none."""

    def __init__(self) -> None:
        self.made: dict[str, str] = {}

    def make(self, name: str) -> str:
        secret = f"{MARK}{name}:{secrets.token_hex(8)}"
        self.made[secret] = name
        return secret

    def shown_by(self, proof: str) -> bool:
        return any(secret in proof for secret in self.made)


@dataclass
class Canaries:
    """`given` is what the attacks are told: where to look, never the secrets themselves."""

    secrets: Secrets
    given: dict[str, Any]
    directories: dict[str, Path]


def _plant(path: Path, secret: str) -> str:
    path.write_text(secret)
    path.chmod(0o644)
    return str(path)


def _open_directory(stack: contextlib.ExitStack, parent: str) -> Path:
    """A directory that everybody may enter, in `parent`, or where that can't be in /tmp."""
    if not os.access(parent, os.W_OK):
        parent = "/tmp"
    made = Path(tempfile.mkdtemp(prefix="canary-", dir=parent))
    stack.callback(shutil.rmtree, made, ignore_errors=True)
    made.chmod(0o755)
    return made


def _serve(stack: contextlib.ExitStack, listener: socket.socket, greeting: str) -> None:
    """Greet whoever connects, or sends a datagram, until the listener is closed."""
    listener.settimeout(0.2)  # closing a socket doesn't wake who waits on it
    if listener.type == socket.SOCK_STREAM:
        listener.listen(64)

    def work() -> None:
        while listener.fileno() >= 0:
            with contextlib.suppress(TimeoutError, OSError):
                if listener.type == socket.SOCK_DGRAM:
                    listener.sendto(greeting.encode(), listener.recvfrom(4096)[1])
                else:
                    connected, _ = listener.accept()
                    with connected:
                        connected.sendall(greeting.encode())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    stack.callback(thread.join, 5)
    stack.callback(listener.close)


def _listeners(stack: contextlib.ExitStack, made: Secrets, given: dict[str, Any], places: list[Path]) -> None:
    name = f"canary-{secrets.token_hex(4)}"

    def listen(kind: socket.AddressFamily, style: socket.SocketKind, address: Any, label: str) -> socket.socket:
        bound = socket.socket(kind, style)
        bound.bind(address)
        _serve(stack, bound, made.make(label))
        return bound

    tcp = listen(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0), "tcp")
    udp = listen(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0), "udp")
    given["ports"] = {"tcp": tcp.getsockname()[1], "udp": udp.getsockname()[1]}
    given["machine"]["ipv6"] = True
    try:
        given["ports"]["tcp6"] = listen(socket.AF_INET6, socket.SOCK_STREAM, ("::1", 0), "tcp6").getsockname()[1]
    except OSError:
        given["machine"]["ipv6"] = False
    listen(socket.AF_UNIX, socket.SOCK_STREAM, f"\0{name}", "abstract")
    listen(socket.AF_UNIX, socket.SOCK_DGRAM, f"\0{name}-d", "abstract-datagram")
    given |= {"abstract": name, "abstract_datagram": f"{name}-d", "unix_sockets": []}
    for place in places:
        path = str(place / "canary.sock")
        listen(socket.AF_UNIX, socket.SOCK_STREAM, path, "unix")
        os.chmod(path, 0o777)
        given["unix_sockets"].append(path)


def _shared_memory(stack: contextlib.ExitStack, made: Secrets, given: dict[str, Any]) -> None:
    """System V and POSIX shared memory, a message queue and a key, readable by everybody."""
    ipc = given["ipc"] = {}
    segment = libc.shmget(0, 4096, 0o1666)
    libc.shmat.restype = ctypes.c_void_p
    address = libc.shmat(segment, None, 0)
    ctypes.memmove(address, made.make("segment").encode(), 40)
    stack.callback(libc.shmctl, segment, 0, None)
    ipc["segment"] = segment

    name = f"canary-{secrets.token_hex(4)}"
    path = Path("/dev/shm", name)
    path.write_bytes(made.make("posix").encode().ljust(mmap.PAGESIZE, b"\0"))
    path.chmod(0o644)
    stack.callback(path.unlink)
    ipc["posix"] = name

    rt = ctypes.CDLL("librt.so.1", use_errno=True)
    queue = rt.mq_open(f"/{name}".encode(), os.O_CREAT | os.O_RDWR, 0o666, None)
    given["machine"]["mqueue"] = queue >= 0
    if queue >= 0:
        stack.callback(rt.mq_unlink, f"/{name}".encode())
        old = made.make("queue").encode()
        for _ in range(8):  # whoever reads one takes it away
            rt.mq_send(queue, old, ctypes.c_size_t(len(old)), 0)
        libc.fchmod(queue, 0o666)
        os.close(queue)
    ipc["queue"] = f"/{name}"

    key = made.make("key").encode()
    serial = libc.syscall(NUMBERS["add_key"], b"user", name.encode(), key, ctypes.c_long(len(key)), ctypes.c_long(-4))
    given["machine"]["keyring"] = serial > 0
    if serial > 0:
        libc.syscall(NUMBERS["keyctl"], 5, serial, 0x3F3F3F3F)  # KEYCTL_SETPERM: everybody
        stack.callback(libc.syscall, NUMBERS["keyctl"], 9, serial, -4)  # KEYCTL_UNLINK
    ipc["key"] = serial


def _file_handle(path: str) -> dict[str, Any] | None:
    """The handle that name_to_handle_at(2) gives; None where the file system has none."""
    buffer = ctypes.create_string_buffer(8 + 128)
    ctypes.c_uint.from_buffer(buffer, 0).value = 128
    if libc.name_to_handle_at(-100, path.encode(), buffer, ctypes.byref(ctypes.c_int()), 0) != 0:
        return None
    length = ctypes.c_uint.from_buffer(buffer, 0).value
    kind = ctypes.c_int.from_buffer(buffer, 4).value
    return {"type": kind, "bytes": buffer.raw[8 : 8 + length].hex()}


def _machine() -> dict[str, bool]:
    """What this machine has: where it lacks something, an attack by it proves nothing."""

    def can(family: int, kind: int) -> bool:
        with contextlib.suppress(OSError):
            socket.socket(family, kind).close()
            return True
        return False

    def has_call(name: str, *arguments: int) -> bool:
        result = libc.syscall(NUMBERS[name], *arguments)
        if result >= 0:
            os.close(result)
        return bool(result >= 0 or ctypes.get_errno() not in (errno.ENOSYS, errno.EOPNOTSUPP))

    def routed(address: str) -> bool:
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
            made.connect((address, 53))
            return True
        return False

    def config(word: str) -> bool:
        tiocsti = Path("/proc/sys/dev/tty/legacy_tiocsti")
        return {"tiocsti": not tiocsti.exists() or tiocsti.read_text().strip() == "1"}[word]

    return {
        "x86_64": os.uname().machine == "x86_64",
        "x32": os.uname().machine == "x86_64" and libc.syscall(ctypes.c_long(0x40000000 | 39)) > 0,
        "vsock": can(40, socket.SOCK_STREAM),
        "af_alg": can(38, socket.SOCK_SEQPACKET),
        "io_uring": has_call("io_uring_setup", 0, 0),
        "memfd_secret": has_call("memfd_secret", 0),
        "modules": Path("/proc/modules").exists() or Path("/proc/sys/kernel/kexec_load_disabled").exists(),
        "personality": True,
        "ptrace": True,
        "route": routed("8.8.8.8"),
        "metadata_route": routed("169.254.169.254"),
        "shadow": os.access("/etc/shadow", os.R_OK) or os.path.exists("/etc/shadow"),
        "kcore": os.path.exists("/proc/kcore"),
        "kallsyms": os.path.exists("/proc/kallsyms"),
        "kmsg": os.path.exists("/dev/kmsg"),
        "sysrq": os.path.exists("/proc/sysrq-trigger"),
        "cgroups": os.path.isdir("/sys/fs/cgroup"),
        "terminal": sys.stdin.isatty() if sys.stdin is not None else False,
        "tiocsti": config("tiocsti"),
    }


def _start_decoy(stack: contextlib.ExitStack, made: Secrets, directory: Path) -> dict[str, Any]:
    _plant(directory / "beside", made.make("beside"))
    decoy = subprocess.Popen(
        [sys.executable, "-I", "-c", DECOY, made.make("argument")],
        env={"SECRET": made.make("environment")},
        cwd=directory,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert decoy.stdout is not None
    stack.callback(decoy.stdout.close)
    stack.callback(decoy.wait)
    stack.callback(decoy.kill)
    told: dict[str, Any] = json.loads(decoy.stdout.readline())
    return told | {"file": "beside"}


def _stir(stack: contextlib.ExitStack, directory: Path, secret: str) -> None:
    """Go on making and removing a file whose name is the secret."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.1):
            (directory / secret).touch()
            (directory / secret).unlink()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    stack.callback(thread.join, 5)
    stack.callback(over.set)


@contextlib.contextmanager
def planted() -> Iterator[Canaries]:
    """Plant everything; afterwards nothing of it is left."""
    made, given = Secrets(), {"machine": _machine()}
    with contextlib.ExitStack() as stack:
        tmp, run = _open_directory(stack, "/tmp"), _open_directory(stack, "/run")
        given["secrets"] = {
            "tmp": _plant(tmp / "secret", made.make("tmp")),
            "run": _plant(run / "secret", made.make("run")),
            "readonly": _plant(run / "readonly", "x" * 4096),
        }
        watched = run / "watched"
        watched.mkdir()
        _stir(stack, watched, made.make("name"))
        given |= {"inotify": str(watched), "host_name": os.uname().nodename}
        given["suid"] = [str(_setuid(place)) for place in (tmp, run)]
        given["machine"]["suid"] = os.geteuid() == 0
        handle = _file_handle(given["secrets"]["run"])
        given["machine"]["file_handles"] = handle is not None
        given["handle"] = handle
        _listeners(stack, made, given, [tmp, run])
        _shared_memory(stack, made, given)
        kept = run / "decoy"
        kept.mkdir()
        given["decoy"] = _start_decoy(stack, made, kept)
        yield Canaries(made, given, {"tmp": tmp, "run": run, "decoy": kept})


def _setuid(place: Path) -> Path:
    """A copy of `id` with the setuid bit: owned by root where root runs the tests."""
    copy = place / "id"
    shutil.copy("/usr/bin/id", copy)
    copy.chmod(0o4755)
    return copy
