"""A process that tries what the system-call filter must stop: `python attacks.py free|confined`.

One line per attempt: its name and `works`, an error's name, or the signal that killed it. Every attempt runs in a
child of its own. Nothing here harms a machine without the filter: what would is called with arguments that are refused
for another reason.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import socket
import struct
import sys
import tempfile
from collections.abc import Callable

from cloister_data import bpf
from cloister_kernel.process import no_new_privileges
from cloister_kernel.sandbox import filter as kernel_filter
from cloister_kernel.sandbox.syscalls import NUMBERS

MACHINE = os.uname().machine
HIGH = 0x7FFFFFFF << 32
NOWHERE = -1
LIBC = ctypes.CDLL(None, use_errno=True)


def raw(number: int, *arguments: int | bytes | None) -> int:
    words = [ctypes.c_char_p(word) if isinstance(word, bytes) else ctypes.c_long(word or 0) for word in arguments]
    ctypes.set_errno(0)
    result = LIBC.syscall(ctypes.c_long(number), *words)
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return int(result)


def call(name: str, *arguments: int | bytes | None) -> int:
    return raw(NUMBERS[MACHINE][name], *arguments)


def fork_with(flags: int) -> None:
    # Without a stack the child goes on as after fork().
    if call("clone", flags | signal.SIGCHLD, 0, 0, 0, 0) == 0:
        os._exit(0)


def type_into_terminal(high: int) -> None:
    _, terminal = os.openpty()
    call("ioctl", terminal, 0x5412 | high, b"x")


def bytes_waiting() -> None:
    here, there = socket.socketpair()
    there.send(b"abc")
    assert fcntl.ioctl(here, 0x541B, bytes(4)) == b"\3\0\0\0"


def line_discipline() -> None:
    _, terminal = os.openpty()
    call("ioctl", terminal, 0x5423, struct.pack("i", 0))


def node(mode: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = os.fsencode(os.path.join(directory, "node"))
        call("mknodat", -100, path, mode, os.makedev(1, 3))


def read_own_memory_as_another() -> None:
    word = ctypes.create_string_buffer(8)
    there = struct.pack("QQ", ctypes.addressof(word), 8)
    call("process_vm_readv", os.getpid(), there, 1, there, 1, 0)


def not_waiting_for_the_disk() -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"x" * 4096)
        file.flush()
        os.preadv(file.fileno(), [bytearray(8)], 0, os.RWF_NOWAIT)


def mergeable() -> None:
    with mmap.mmap(-1, 4096) as pages:
        pages.madvise(12)


def watch() -> None:
    """Learn of each time that somebody else opens a program."""
    call("inotify_add_watch", call("inotify_init1", 0), b"/usr/bin", 0x20)


def interrupt_80() -> None:
    # mov eax, 20 (getpid of the 32-bit ABI); int 0x80; ret
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")
    function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
    assert function() == os.getpid()


def own_lenient_filter() -> None:
    """A later filter that allows all doesn't overrule an earlier one."""
    allow = bpf.instruction(bpf.RETURN, bpf.ALLOW)
    no_new_privileges()
    bpf.install(allow, MACHINE, LIBC)
    socket.socket(socket.AF_INET)


def exec_from_memory() -> None:
    """A program that lies in no file system inherits the filter like any other."""
    with open("/bin/sh", "rb") as shell:
        image = os.memfd_create("sh")
        os.write(image, shell.read())
    script = b'while read -r name value; do [ "$name" = Seccomp: ] && exit "$value"; done < /proc/self/status; exit 9'
    arguments = (ctypes.c_char_p * 4)(b"sh", b"-c", script, None)
    environment = (ctypes.c_char_p * 1)(None)
    child = os.fork()
    if child == 0:
        LIBC.syscall(
            ctypes.c_long(NUMBERS[MACHINE]["execveat"]), image, b"", arguments, environment, ctypes.c_int(0x1000)
        )
        os._exit(8)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        # 2: a filter is in force.
        raise OSError(errno.EINPROGRESS if code == 2 else errno.ENOEXEC, "")


# Anyone can do these without the filter.
ANYONE: dict[str, Callable[[], object]] = {
    "ptrace": lambda: call("ptrace", 16, 2**22 - 1, 0, 0),
    "ptrace_high_number": lambda: raw(NUMBERS[MACHINE]["ptrace"] | HIGH, 16, 2**22 - 1, 0, 0),
    "process_vm_readv": read_own_memory_as_another,
    "pidfd_open": lambda: os.pidfd_open(os.getpid()),
    "pidfd_getfd": lambda: call("pidfd_getfd", NOWHERE, 1, 0),
    "kcmp": lambda: call("kcmp", os.getpid(), os.getpid(), 0, 0, 0),
    "unshare": lambda: call("unshare", 0),
    "setns": lambda: call("setns", NOWHERE, 0),
    "open_tree": lambda: call("open_tree", -100, b"/", 0),
    "name_to_handle_at": lambda: call("name_to_handle_at", -100, b"/nowhere-at-all", None, None, 0),
    "inotify": watch,
    "dnotify": lambda: fcntl.fcntl(os.open("/usr/bin", os.O_RDONLY), fcntl.F_NOTIFY, fcntl.DN_ACCESS),
    "syncfs": lambda: call("syncfs", os.open("/usr/bin", os.O_RDONLY)),
    "keyctl": lambda: call("keyctl", 0, -3, 1),
    "request_key": lambda: call("request_key", None, None, None, 0),
    "add_key": lambda: call("add_key", None, None, None, 0, 0),
    "io_uring": lambda: call("io_uring_setup", 0, None),
    "move_pages": lambda: call("move_pages", 0, 0, None, None, None, 0),
    "clone3": lambda: call("clone3", None, 0),
    "personality": lambda: call("personality", 0x40000),
    "personality_high": lambda: call("personality", 0x40000 | HIGH),
    "clear_ambient": lambda: call("prctl", 47, 4, 0, 0, 0),
    "prctl_high": lambda: call("prctl", 47 | HIGH, 4, 0, 0, 0),
    "preadv2_nowait": not_waiting_for_the_disk,
    "setuid": lambda: os.setuid(os.getuid()),
    "tiocsetd": line_discipline,
    "network_device": lambda: fcntl.ioctl(socket.socket(socket.AF_UNIX), 0x8933, b"lo".ljust(40, b"\0")),
    "network_device_high": lambda: call("ioctl", socket.socket(socket.AF_UNIX).fileno(), 0x8912 | HIGH, bytes(64)),
    "inet": lambda: socket.socket(socket.AF_INET),
    "inet6": lambda: socket.socket(socket.AF_INET6),
    "inet_high": lambda: call("socket", socket.AF_INET | HIGH, socket.SOCK_STREAM, 0),
    "udp": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "own_lenient_filter": own_lenient_filter,
    "exec_from_memory": exec_from_memory,
}
# Whether these work without the filter hangs on how the kernel was built.
FAMILIES: dict[str, Callable[[], object]] = {
    "vsock": lambda: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM),
    "vsock_pair": lambda: socket.socketpair(socket.AF_VSOCK, socket.SOCK_STREAM),
    "alg": lambda: socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET),
    "inet_pair": lambda: socket.socketpair(socket.AF_INET, socket.SOCK_STREAM),
    "tipc_pair": lambda: socket.socketpair(socket.AF_TIPC, socket.SOCK_STREAM),
    "mergeable": mergeable,
}
# Without the filter these need capabilities.
ROOT: dict[str, Callable[[], object]] = {
    "mount": lambda: call("mount", None, None, None, 0, None),
    "umount2": lambda: call("umount2", b"/nowhere-at-all", 0),
    "chroot": lambda: os.chroot("/"),
    "pivot_root": lambda: call("pivot_root", None, None),
    "fsopen": lambda: call("fsopen", None, 0),
    "move_mount": lambda: call("move_mount", NOWHERE, None, NOWHERE, None, 0),
    "open_by_handle_at": lambda: call("open_by_handle_at", NOWHERE, None, 0),
    "bpf": lambda: call("bpf", 0, None, 0),
    "perf_event_open": lambda: call("perf_event_open", None, 0, 0, 0, 0),
    "userfaultfd": lambda: call("userfaultfd", 0),
    "clone_newuser": lambda: fork_with(0x10000000),
    "clone_newnet_high": lambda: fork_with(0x40000000 | HIGH),
    "clone_newns": lambda: fork_with(0x00020000),
    "clock_settime": lambda: call("clock_settime", 0, None),
    "settimeofday": lambda: call("settimeofday", NOWHERE, None),
    "swapon": lambda: call("swapon", b"/nowhere-at-all", 0),
    "syslog": lambda: call("syslog", 10, None, 0),
    "packet": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
    "device_node": lambda: node(0o020666),
    "device_node_high": lambda: node(0o020666 | 0x7FFF0000),
    "block_node": lambda: node(0o060666),
    "tiocsti": lambda: type_into_terminal(0),
    "tiocsti_high": lambda: type_into_terminal(HIGH),
}
X86: dict[str, Callable[[], object]] = {
    "x32": lambda: raw(0x40000000 | 39),
    "int_0x80": interrupt_80,
    "iopl": lambda: call("iopl", 0),
    "modify_ldt": lambda: call("modify_ldt", 0, None, 0),
}
# What must go on working with the filter.
NEEDED: dict[str, Callable[[], object]] = {
    "unix": lambda: socket.socket(socket.AF_UNIX),
    "unix_pair": socket.socketpair,
    "unix_high": lambda: call("socket", socket.AF_UNIX | HIGH, socket.SOCK_STREAM, 0),
    "fork": lambda: fork_with(0),
    "fork_high": lambda: fork_with(HIGH),
    "fifo": lambda: node(0o010600),
    "read_personality": lambda: call("personality", 0xFFFFFFFF),
    "window_size": lambda: fcntl.ioctl(os.openpty()[1], 0x5413, b"\0" * 8),
    "bytes_waiting": bytes_waiting,
    "getpid_high_number": lambda: raw(NUMBERS[MACHINE]["getpid"] | HIGH),
}


def attempt(name: str, call: Callable[[], object]) -> str:
    """In a child: what it changes about its process stays there, and so does a signal."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            call()
            found = "works"
        except OSError as error:
            found = errno.errorcode[error.errno or 0]
        except BaseException as error:
            found = repr(error)
        os.write(writing, found.encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as answer:
        found = answer.read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return signal.Signals(-code).name if code < 0 else found


def main() -> None:
    if sys.argv[1] == "confined":
        no_new_privileges()
        kernel_filter.install()
    wanted = ANYONE | FAMILIES | ROOT | NEEDED | (X86 if MACHINE == "x86_64" else {})
    for name, call in wanted.items():
        print(name, attempt(name, call))


if __name__ == "__main__":
    main()
