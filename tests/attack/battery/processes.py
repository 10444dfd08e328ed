"""Other processes: the guard, another kernel's, and a decoy that the host started with the guard's rights."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import resource
import signal
import struct
import time
from collections.abc import Callable

from tests.attack.battery.files import read, secret
from tests.attack.battery.native import c, call, checked, libc
from tests.attack.battery.registry import Given, Stopped, attack, find_mark, first

ROLES = ("decoy", "victim")
PTRACE_PEEKDATA, PTRACE_ATTACH, PTRACE_DETACH, PTRACE_SEIZE = 2, 16, 17, 0x4206


class IoVector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _memory(pid: int, address: int, length: int) -> bytes:
    descriptor = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    return os.pread(descriptor, length, address)


def _by_vm_readv(pid: int, address: int, length: int) -> bytes:
    buffer = ctypes.create_string_buffer(length)
    here = IoVector(ctypes.cast(buffer, ctypes.c_void_p).value, length)
    there = IoVector(address, length)
    libc.process_vm_readv.restype = ctypes.c_ssize_t
    checked(
        libc.process_vm_readv(
            pid, ctypes.byref(here), ctypes.c_ulong(1), ctypes.byref(there), ctypes.c_ulong(1), ctypes.c_ulong(0)
        ),
        "process_vm_readv",
    )
    return buffer.raw


def _by_ptrace(pid: int, address: int, length: int) -> bytes:
    libc.ptrace.restype = ctypes.c_long
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    checked(libc.ptrace(PTRACE_ATTACH, pid, None, None), "ptrace")
    try:
        os.waitpid(pid, 0x40000000)  # __WALL
        words = []
        for offset in range(0, length, 8):
            words.append(libc.ptrace(PTRACE_PEEKDATA, pid, address + offset, None) & 0xFFFF_FFFF_FFFF_FFFF)
        return struct.pack(f"{len(words)}Q", *words)
    finally:
        libc.ptrace(PTRACE_DETACH, pid, None, None)


def _by_pidfd(pid: int, number: int) -> bytes:
    return os.pread(call("pidfd_getfd", os.pidfd_open(pid), number, 0), 4096, 0)


def _queue(pid: int, number: int) -> None:
    information = ctypes.create_string_buffer(128)
    struct.pack_into("iii", information, 0, number, 0, -1)  # SI_QUEUE
    call("rt_sigqueueinfo", pid, number, information)


def _thread_kill(pid: int, number: int) -> None:
    call("tgkill", pid, pid, number)


def _by_owner(pid: int, number: int) -> None:
    """Let the Linux kernel send it: the owner of a pipe that gets readable."""
    reading, writing = os.pipe()
    fcntl.fcntl(reading, fcntl.F_SETOWN, pid)
    fcntl.fcntl(reading, 10, number)  # F_SETSIG
    fcntl.fcntl(reading, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    os.write(writing, b"x")
    time.sleep(0.05)


def _pidfd_signal(pid: int, number: int) -> None:
    signal.pidfd_send_signal(os.pidfd_open(pid), number)


SIGNALS: dict[str, tuple[int, Callable[[int, int], None]]] = {
    "kill": (40, os.kill),
    "tgkill": (41, _thread_kill),
    "pidfd_send_signal": (42, _pidfd_signal),
    "rt_sigqueueinfo": (43, _queue),
    "F_SETOWN": (44, _by_owner),
}


def _register_for(role: str) -> None:
    """Reading, stopping and changing one process."""
    needs = "" if role == "decoy" else "victim"

    @attack(f"processes: {role}'s environment", needs=needs)
    def environ(given: Given) -> str:
        return secret(f"/proc/{given[role]['pid']}/environ")

    @attack(f"processes: {role}'s arguments", needs=needs)
    def arguments(given: Given) -> str:
        return secret(f"/proc/{given[role]['pid']}/cmdline")

    @attack(f"processes: {role}'s /proc/PID/mem", needs=needs)
    def memory(given: Given) -> str:
        one = given[role]
        return find_mark(_memory(one["pid"], one["address"], one["length"]), "its memory")

    @attack(f"processes: {role}'s memory by process_vm_readv", needs=needs)
    def vm_readv(given: Given) -> str:
        one = given[role]
        return find_mark(_by_vm_readv(one["pid"], one["address"], one["length"]), "its memory")

    @attack(f"processes: {role}'s memory by ptrace", needs=needs)
    def trace(given: Given) -> str:
        one = given[role]
        return find_mark(_by_ptrace(one["pid"], one["address"], one["length"]), "its memory")

    @attack(f"processes: {role}'s open file by /proc/PID/fd", needs=needs)
    def descriptor(given: Given) -> str:
        return secret(f"/proc/{given[role]['pid']}/fd/{given[role]['descriptor']}")

    @attack(f"processes: {role}'s open file by pidfd_getfd", needs=needs)
    def pidfd(given: Given) -> str:
        return find_mark(_by_pidfd(given[role]["pid"], given[role]["descriptor"]), "the file")

    @attack(f"processes: {role}'s maps", proof="seen", needs=needs)
    def maps(given: Given) -> str:
        one = given[role]
        for line in read(f"/proc/{one['pid']}/maps").splitlines():
            low, high = (int(word, 16) for word in line.split()[0].split(b"-"))
            if low <= one["address"] < high:
                return line.decode()
        raise Stopped("another process's")

    @attack(f"processes: {role}'s nice value", proof="host", needs=needs)
    def priority(given: Given) -> str:
        os.setpriority(os.PRIO_PROCESS, given[role]["pid"], 7)
        return f"now {os.getpriority(os.PRIO_PROCESS, given[role]['pid'])}"

    @attack(f"processes: {role}'s processors", proof="host", needs=needs)
    def affinity(given: Given) -> str:
        os.sched_setaffinity(given[role]["pid"], {0})
        return f"now {os.sched_getaffinity(given[role]['pid'])}"

    @attack(f"processes: {role}'s limits", proof="host", needs=needs)
    def limits(given: Given) -> str:
        _, hard = resource.prlimit(given[role]["pid"], resource.RLIMIT_NOFILE)
        resource.prlimit(given[role]["pid"], resource.RLIMIT_NOFILE, (77, hard))
        return "it may open 77 files"

    @attack(f"processes: {role}'s I/O priority", proof="seen", needs=needs)
    def io_priority(given: Given) -> str:
        wanted = 3 << 13  # the idle class
        call("ioprio_set", 1, given[role]["pid"], wanted)
        if call("ioprio_get", 1, given[role]["pid"]) != wanted or not _is(given, role):
            raise Stopped("another process's")
        return "idle now"

    @attack(f"processes: {role}'s pages by move_pages", proof="seen", needs=needs)
    def pages(given: Given) -> str:
        one, status = given[role], ctypes.create_string_buffer(4)
        page = ctypes.create_string_buffer(struct.pack("Q", one["address"] & ~0xFFF), 8)
        call("move_pages", one["pid"], 1, page, None, status, 0)
        if struct.unpack("i", status.raw)[0] < 0:
            raise Stopped("another process's")
        return "it told where a page lies"

    @attack(f"processes: {role} compared by kcmp", proof="seen", needs=needs)
    def compare(given: Given) -> str:
        if not _is(given, role):
            raise Stopped("there is no such process")
        return f"its address space against the own: {call('kcmp', os.getpid(), given[role]['pid'], 1, 0, 0)}"

    @attack(f"processes: {role}'s memory paged out by process_madvise", proof="seen", needs=needs)
    def advise(given: Given) -> str:
        one = given[role]
        there = IoVector(one["address"] & ~0xFFF, 4096)
        return f"{call('process_madvise', os.pidfd_open(one['pid']), there, 1, 20, 0)} bytes are cold"  # MADV_COLD

    @attack(f"processes: {role}'s namespaces entered", proof="seen", needs=needs)
    def namespaces(given: Given) -> str:
        if not given["bare"] and not os.path.exists(f"/proc/{given[role]['pid']}"):
            raise Stopped("there is no such process")
        pid = given[role]["pid"]

        def enter(kind: str) -> str:
            c("setns", os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY), 0)
            return f"entered {kind}"

        return first([lambda k=kind: enter(k) for kind in ("mnt", "net", "ipc", "uts", "user")])  # type: ignore[misc]

    for name in SIGNALS:
        _register_signal(role, name, needs)


def _is(given: Given, role: str) -> bool:
    """Whether that pid is, seen from here, the process that is meant: another namespace has the same numbers."""
    with contextlib.suppress(OSError):
        return given[role]["name"].encode() in read(f"/proc/{given[role]['pid']}/comm")
    return False


def _register_signal(role: str, name: str, needs: str) -> None:
    @attack(f"processes: a signal to {role} by {name}", proof="host", needs=needs)
    def send(given: Given) -> str:
        number, way = SIGNALS[name]
        way(given[role]["pid"], number)
        return f"signal {number} to {given[role]['pid']}"


for _role in ROLES:
    _register_for(_role)


@attack("processes: the guard's environment", needs="guard")
def guard_environment(given: Given) -> str:
    return secret(f"/proc/{given['guard']['pid']}/environ")


@attack("processes: the guard's memory", needs="guard")
def guard_memory(given: Given) -> str:
    """Its stack begins with its environment."""
    pid = given["guard"]["pid"]
    for line in read(f"/proc/{pid}/maps").splitlines():
        if line.endswith(b"[stack]"):
            low, high = (int(word, 16) for word in line.split()[0].split(b"-"))
            return find_mark(_memory(pid, low, high - low), "its stack")
    raise Stopped("it has no stack that is seen")


@attack("processes: the guard's open files", proof="seen", needs="guard")
def guard_files(given: Given) -> str:
    names = [
        os.readlink(f"/proc/{given['guard']['pid']}/fd/{n}") for n in os.listdir(f"/proc/{given['guard']['pid']}/fd")
    ]
    found = [name for name in names if name.endswith("cloister.db")]
    if not found:
        raise Stopped("not the guard's")
    return found[0]


@attack("processes: any process that isn't the kernel's own")
def foreign(given: Given) -> str:
    """The arguments of each process that is seen."""
    names = [name for name in os.listdir("/proc") if name.isdigit()]
    return first([lambda n=name: secret(f"/proc/{n}/cmdline") for name in names])  # type: ignore[misc]


@attack("processes: the machine's first process", proof="seen")
def init(given: Given) -> str:
    """In a pid namespace of its own, process 1 is the sandbox's, and shares the own namespaces."""
    if os.stat("/proc/1/ns/pid").st_ino == os.stat("/proc/self/ns/pid").st_ino:
        raise Stopped("process 1 is one of its own")
    return "process 1 lives in another namespace"


@attack("processes: a better nice value", proof="seen")
def nice(given: Given) -> str:
    before = os.nice(0)
    if os.nice(-3) >= before:
        raise Stopped("it stayed")
    return f"{before} became {os.nice(0)}"


@attack("processes: real-time scheduling", proof="seen")
def realtime(given: Given) -> str:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    return f"policy {os.sched_getscheduler(0)}"


@attack("processes: higher limits", proof="seen")
def own_limits(given: Given) -> str:
    raised = []
    for name in ("RLIMIT_NPROC", "RLIMIT_CORE", "RLIMIT_MEMLOCK", "RLIMIT_NICE"):
        kind = getattr(resource, name)
        _, hard = resource.getrlimit(kind)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (hard, hard + 1 if hard >= 0 else hard))
            if hard >= 0 and resource.getrlimit(kind)[1] > hard:
                raised.append(name)
    if not raised:
        raise Stopped("none went up")
    return ", ".join(raised)


@attack("processes: a core file", proof="seen")
def core_dump(given: Given) -> str:
    """A crash must leave no core file: it would hold the sandbox's memory on the host's disk."""
    child = os.fork()
    if child == 0:
        os.chdir(os.path.expanduser("~"))
        os.abort()
    _, status = os.waitpid(child, 0)
    if not os.WCOREDUMP(status):
        raise Stopped("no core was written")
    return "a core was written"
