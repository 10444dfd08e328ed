"""Ways to somebody else: the network, unix sockets, other families, and what is shared between processes (IPC)."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import socket
import struct

from tests.attack.battery.files import lines
from tests.attack.battery.native import c, call, libc
from tests.attack.battery.registry import Given, Stopped, attack, find_mark, first

HARMLESS = {socket.AF_UNIX}


def _greeting(connected: socket.socket) -> str:
    connected.settimeout(2)
    return find_mark(connected.recv(4096), "what it sent")


def _connect(family: int, kind: int, address: object) -> socket.socket:
    made = socket.socket(family, kind)
    made.settimeout(2)
    made.connect(address)  # type: ignore[arg-type]
    return made


@attack("network: TCP to 127.0.0.1")
def tcp(given: Given) -> str:
    return _greeting(_connect(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", given["ports"]["tcp"])))


@attack("network: TCP to ::1", needs="ipv6")
def tcp6(given: Given) -> str:
    return _greeting(_connect(socket.AF_INET6, socket.SOCK_STREAM, ("::1", given["ports"]["tcp6"])))


@attack("network: UDP to 127.0.0.1")
def udp(given: Given) -> str:
    made = _connect(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", given["ports"]["udp"]))
    made.send(b"hello")
    return _greeting(made)


@attack("network: TCP fast open, data in the SYN")
def fast_open(given: Given) -> str:
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    made.sendto(b"x", 0x20000000, ("127.0.0.1", given["ports"]["tcp"]))  # MSG_FASTOPEN
    return _greeting(made)


def _route(address: str, port: int) -> str:
    """The address from which a packet would leave; connecting a UDP socket sends none."""
    made = _connect(socket.AF_INET, socket.SOCK_DGRAM, (address, port))
    return f"from {made.getsockname()[0]}"


@attack("network: a route to the cloud's metadata", proof="seen", needs="metadata_route")
def metadata(given: Given) -> str:
    return _route("169.254.169.254", 80)


@attack("network: a route to DNS", proof="seen", needs="route")
def dns(given: Given) -> str:
    return _route("8.8.8.8", 53)


@attack("network: the guard's HTTPS port", proof="seen", needs="guard")
def guard_port(given: Given) -> str:
    made = _connect(socket.AF_INET, socket.SOCK_STREAM, tuple(given["guard"]["address"]))
    return f"connected from {made.getsockname()}"


@attack("network: a listener of its own on 127.0.0.1", proof="seen")
def listener(given: Given) -> str:
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    made.bind(("127.0.0.1", 0))
    made.listen()
    _connect(socket.AF_INET, socket.SOCK_STREAM, made.getsockname())
    return f"others may connect to {made.getsockname()}"


@attack("network: an abstract unix socket")
def abstract(given: Given) -> str:
    return _greeting(_connect(socket.AF_UNIX, socket.SOCK_STREAM, "\0" + given["abstract"]))


@attack("network: an open unix socket in the file system")
def filed(given: Given) -> str:
    return first(
        [lambda p=path: _greeting(_connect(socket.AF_UNIX, socket.SOCK_STREAM, p)) for path in given["unix_sockets"]]  # type: ignore[misc]
    )


@attack("network: an open unix socket as a datagram")
def datagram(given: Given) -> str:
    """connect(2) isn't the only way: sendmsg names its receiver too."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    made.bind("")  # an abstract name of its own, for the answer
    made.settimeout(2)
    made.sendto(b"hello", "\0" + given["abstract_datagram"])
    return find_mark(made.recv(4096), "the answer")


def _answer(path: str, said: bytes, length: int = 4096) -> bytes:
    made = _connect(socket.AF_UNIX, socket.SOCK_STREAM, path)
    if said:
        made.sendall(said)
    answer = made.recv(length)
    # Head and body of an answer over HTTP may come one after the other.
    while answer.startswith(b"HTTP/1.1 200") and not answer.endswith(b"}") and (more := made.recv(length)):
        answer += more
    return answer


@attack("network: the guard's control socket", proof="seen", needs="guard")
def control(given: Given) -> str:
    """Garbage is answered with a problem; who is answered could register sockets for any user."""
    answer = _answer(given["sockets"]["control"], struct.pack(">I", 2) + b"{}")
    if b"problem" not in answer:
        raise Stopped("it hung up")
    return answer[:80].decode("utf-8", "replace")


@attack("network: the kernel service's socket", proof="seen", needs="guard")
def service(given: Given) -> str:
    said = b'{"op":"list","user":"bob"}'
    answer = _answer(given["sockets"]["service"], struct.pack(">I", len(said)) + said)
    if b"kernels" not in answer:
        raise Stopped("it hung up")
    return answer[:80].decode("utf-8", "replace")


@attack("network: another kernel's guard socket", proof="seen", needs="victim")
def foreign_guard(given: Given) -> str:
    answer = _answer(given["sockets"]["victim_guard"], b"GET /api/v1/me HTTP/1.1\r\nHost: cloister\r\n\r\n")
    if given["victim"]["user"].encode() not in answer:
        raise Stopped("another one answered")
    return "it answered as " + given["victim"]["user"]


@attack("network: another kernel's Jupyter sockets", proof="seen", needs="victim")
def foreign_jupyter(given: Given) -> str:
    """A ZeroMQ socket greets first: 0xFF, eight bytes, 0x7F."""

    def greet(path: str) -> str:
        made = _connect(socket.AF_UNIX, socket.SOCK_STREAM, path)
        if made.recv(10)[:1] != b"\xff":
            raise Stopped("no ZeroMQ")
        return f"{path} greeted"

    return first([lambda p=path: greet(p) for path in given["sockets"]["victim_jupyter"]])  # type: ignore[misc]


@attack("network: the own guard socket's place", proof="seen", bare=False)
def replaced_socket(given: Given) -> str:
    """A link to somewhere else in the place of the guard's socket, or of its directory."""
    path = os.environ["CLOISTER_GUARD_SOCKET"]

    def replace(what: str) -> str:
        os.rename(what, what + ".was")
        os.symlink("/nowhere", what)
        return f"{what} is a link now"

    return first([lambda: replace(path), lambda: replace(os.path.dirname(path))])


@attack("network: a lie about the own uid, by SCM_CREDENTIALS", proof="seen")
def credentials(given: Given) -> str:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    claimed = struct.pack("3i", 1, 0, 0)
    ours.sendmsg([b"x"], [(socket.SOL_SOCKET, 2, claimed)])  # SCM_CREDENTIALS
    _, ancillary, _, _ = theirs.recvmsg(16, 256)
    if struct.unpack("3i", ancillary[0][2][:12])[1] != 0:
        raise Stopped("the true uid arrived")
    return "uid 0 arrived"


@attack("network: every other socket family", proof="seen")
def families(given: Given) -> str:
    made = []
    for family in range(1, 46):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
            if family in HARMLESS:
                continue
            with contextlib.suppress(OSError):
                socket.socket(family, kind).close()
                made.append(f"{family}/{int(kind)}")
    if not made:
        raise Stopped("unix sockets only")
    return ", ".join(made[:20])


@attack("network: vsock to the host", proof="seen", needs="vsock")
def vsock(given: Given) -> str:
    """No network namespace confines it. A socket is proof enough: nothing is sent to the machine's host."""
    made = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    return f"descriptor {made.fileno()}"


@attack("network: the Linux kernel's cryptography by AF_ALG", proof="seen", needs="af_alg")
def algorithms(given: Given) -> str:
    made = socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)
    made.bind(("hash", "sha256"))
    operation, _ = made.accept()
    operation.sendall(b"abc")
    return operation.recv(32).hex()


@attack("network: the machine's interfaces by netlink", proof="seen")
def netlink(given: Given) -> str:
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    made.settimeout(2)
    made.send(struct.pack("IHHIIB3x", 20, 18, 0x301, 1, 0, 0))  # RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP
    answer = made.recv(65536)
    names = [name for _, name in socket.if_nameindex() if name != "lo"]
    if not names:
        raise Stopped("only a loopback of its own")
    return f"{len(answer)} bytes: {', '.join(names)}"


@attack("network: raw packets", proof="seen")
def raw(given: Given) -> str:
    return first(
        [
            lambda: f"AF_PACKET {socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)).fileno()}",
            lambda: f"SOCK_RAW {socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).fileno()}",
        ]
    )


@attack("network: sockets past seccomp by io_uring", proof="seen", needs="io_uring")
def io_uring(given: Given) -> str:
    return f"a ring of descriptor {call('io_uring_setup', 4, ctypes.create_string_buffer(256))}"


@attack("network: names of the machine", proof="seen")
def host_name(given: Given) -> str:
    if os.uname().nodename != given["host_name"]:
        raise Stopped("a name of its own")
    return "it is the host's name"


@attack("network: a System V segment of the host")
def segment(given: Given) -> str:
    libc.shmat.restype = ctypes.c_void_p
    address = libc.shmat(given["ipc"]["segment"], None, 0o10000)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "shmat")
    return find_mark(ctypes.string_at(address, 128), "the segment")


@attack("network: the host's System V objects listed", proof="seen")
def segments(given: Given) -> str:
    listed = lines("/proc/sysvipc/shm")[1:]
    if str(given["ipc"]["segment"]) not in [line.split()[1] for line in listed]:
        raise Stopped("the host's isn't among them")
    return f"{len(listed)} segments"


@attack("network: POSIX shared memory of the host")
def posix(given: Given) -> str:
    with open(f"/dev/shm/{given['ipc']['posix']}", "rb") as file:
        return find_mark(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)[:], "the memory")


@attack("network: a POSIX message queue of the host", needs="mqueue")
def queue(given: Given) -> str:
    libc_rt = ctypes.CDLL("librt.so.1", use_errno=True)
    descriptor = libc_rt.mq_open(given["ipc"]["queue"].encode(), os.O_RDONLY | os.O_NONBLOCK)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "mq_open")
    buffer = ctypes.create_string_buffer(65536)
    if libc_rt.mq_receive(descriptor, buffer, ctypes.c_size_t(65536), None) < 0:
        raise OSError(ctypes.get_errno(), "mq_receive")
    return find_mark(buffer.raw, "the message")


@attack("network: a key of the host's keyring", needs="keyring")
def key(given: Given) -> str:
    buffer = ctypes.create_string_buffer(256)
    call("keyctl", 11, given["ipc"]["key"], buffer, 256)  # KEYCTL_READ
    return find_mark(buffer.raw, "the key")


@attack("network: a terminal's input forged by TIOCSTI", proof="seen", needs="tiocsti")
def forged_input(given: Given) -> str:
    master, slave = os.openpty()
    os.setsid()
    c("ioctl", slave, 0x540E, 0)  # TIOCSCTTY
    c("ioctl", slave, 0x5412, b"\n")
    return f"{os.read(slave, 1)!r} was read though nobody typed it, on {master}"


@attack("network: the terminal of whoever started the service", proof="seen", needs="terminal")
def terminal(given: Given) -> str:
    return f"/dev/tty as {os.open('/dev/tty', os.O_RDWR)}"


@attack("network: the console's selection by TIOCLINUX", proof="seen")
def console(given: Given) -> str:
    def ask(path: str) -> str:
        state = c("ioctl", os.open(path, os.O_RDWR | os.O_NOCTTY), 0x541C, bytes([6]))  # TIOCLINUX: shift state
        return f"{path}: {state}"

    return first([lambda p=path: ask(p) for path in ("/dev/tty0", "/dev/tty1", "/dev/console", "/dev/tty")])  # type: ignore[misc]
