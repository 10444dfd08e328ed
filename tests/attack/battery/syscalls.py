"""System calls that a notebook has no use for: namespaces, mounts, other ABIs, wide attack surface."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import signal
import struct
import sys
import time
from collections.abc import Callable

from tests.attack.battery.files import lines, read
from tests.attack.battery.native import c, call, checked, libc
from tests.attack.battery.registry import Given, Stopped, attack, first

NAMESPACES = {
    "mnt": 0x00020000,
    "net": 0x40000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
    "pid": 0x20000000,
    "user": 0x10000000,
}
NEWUSER, NEWNS = 0x10000000, 0x00020000


def _namespace(kind: str) -> int:
    return os.stat(f"/proc/self/ns/{kind}").st_ino


def _changed(kind: str, act: Callable[[], object]) -> str:
    before = _namespace(kind)
    act()
    if _namespace(kind) == before:
        raise Stopped("it is the same one")
    return f"{kind}: {before} became {_namespace(kind)}"


def _unshare(kind: str) -> None:
    @attack(f"syscalls: unshare a namespace ({kind})", proof="seen")
    def unshare(given: Given) -> str:
        if kind == "pid":
            c("unshare", NAMESPACES[kind])
            return "the next child is process 1"
        return _changed(kind, lambda: c("unshare", NAMESPACES[kind]))


for _kind in NAMESPACES:
    _unshare(_kind)


def _in_cloned(child: int) -> str:
    """The status of a child that exits with 7 where it found itself in another user namespace."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise Stopped(f"killed by {signal.Signals(os.WTERMSIG(status)).name}")
    if os.WEXITSTATUS(status) != 7:
        raise Stopped("it is the same namespace")
    return "the child had another user namespace"


@attack("syscalls: a user namespace by clone", proof="seen", needs="x86_64")
def clone(given: Given) -> str:
    before = _namespace("user")
    child = call("clone", NEWUSER | signal.SIGCHLD, 0, 0, 0, 0)
    if child == 0:
        os._exit(7 if _namespace("user") != before else 0)
    return _in_cloned(child)


@attack("syscalls: a user namespace by clone3", proof="seen")
def clone3(given: Given) -> str:
    before = _namespace("user")
    arguments = ctypes.create_string_buffer(struct.pack("8Q", NEWUSER, 0, 0, 0, signal.SIGCHLD, 0, 0, 0), 64)
    child = call("clone3", arguments, 64)
    if child == 0:
        os._exit(7 if _namespace("user") != before else 0)
    return _in_cloned(child)


def _rootlike(given: Given) -> None:
    """What a mount needs: namespaces of its own (also in the control, where root would mount for everybody)."""
    if given["bare"]:
        c("unshare", NEWNS)
        c("mount", b"none", b"/", None, (1 << 18) | 16384, None)  # MS_PRIVATE | MS_REC
    else:
        c("unshare", NEWUSER | NEWNS)


def _mounted(directory: str) -> str:
    for line in lines("/proc/self/mountinfo"):
        if line.split()[4] == directory:
            return line.strip()
    raise Stopped("nothing is mounted")


def _places(given: Given, wanted: Callable[[list[str]], bool]) -> list[str]:
    """Where something is mounted, the last first; in the control, where root could do harm, in its own place only."""
    mounts = [line.split() for line in lines("/proc/self/mountinfo")]
    found = [words[4] for words in mounts[::-1] if wanted(words)]
    return [place for place in found if place == _directory()] if given["bare"] else found


def _read_only(words: list[str]) -> bool:
    return words[5].split(",")[0] == "ro"


def _directory() -> str:
    path = os.path.join(os.path.realpath(os.path.expanduser("~")), "place")
    os.makedirs(path, exist_ok=True)
    return path


@attack("syscalls: mount", proof="seen")
def mount(given: Given) -> str:
    """With the rights that the process has, and with those of a namespace of its own."""
    if not given["bare"]:
        try:
            c("mount", b"none", _directory().encode(), b"tmpfs", 0, None)
            return _mounted(_directory())
        except OSError:
            pass
    _rootlike(given)
    c("mount", b"none", _directory().encode(), b"tmpfs", 0, None)
    return _mounted(_directory())


@attack("syscalls: a bind mount over something that is read-only", proof="seen")
def bind(given: Given) -> str:
    _rootlike(given)
    c("mount", _directory().encode(), b"/usr", None, 4096, None)  # MS_BIND
    return _mounted("/usr")


@attack("syscalls: umount of what covers the host", proof="seen")
def umount(given: Given) -> str:
    """Every mount that the process sees: below one of them lies what the sandbox hides."""
    if given["bare"]:
        _rootlike(given)
        c("mount", b"none", _directory().encode(), b"tmpfs", 0, None)

    def off(place: str) -> str:
        c("umount2", place.encode(), 2)  # MNT_DETACH
        return f"{place} is gone"

    return first([lambda p=place: off(p) for place in _places(given, lambda words: True)])  # type: ignore[misc]


@attack("syscalls: a read-only mount made writable", proof="seen")
def remount(given: Given) -> str:
    if given["bare"]:
        _rootlike(given)
        c("mount", b"none", _directory().encode(), b"tmpfs", 1, None)

    def writable(place: str) -> str:
        c("mount", None, place.encode(), None, 32 | 4096, None)  # MS_REMOUNT | MS_BIND
        return f"{place} is writable"

    return first([lambda p=place: writable(p) for place in _places(given, _read_only)])  # type: ignore[misc]


@attack("syscalls: mount attributes", proof="seen")
def mount_attributes(given: Given) -> str:
    if given["bare"]:
        _rootlike(given)
        c("mount", b"none", _directory().encode(), b"tmpfs", 1, None)
    attributes = ctypes.create_string_buffer(struct.pack("4Q", 0, 1, 0, 0), 32)  # clear MOUNT_ATTR_RDONLY

    def writable(place: str) -> str:
        call("mount_setattr", -100, place.encode(), 0, attributes, 32)
        return f"{place} is writable"

    return first([lambda p=place: writable(p) for place in _places(given, _read_only)])  # type: ignore[misc]


@attack("syscalls: the new mount calls (fsopen, fsmount, open_tree, move_mount)", proof="seen")
def new_mount(given: Given) -> str:
    def file_system() -> str:
        descriptor = call("fsopen", b"tmpfs", 0)
        call("fsconfig", descriptor, 6, None, None, 0)  # FSCONFIG_CMD_CREATE
        made = call("fsmount", descriptor, 0, 0)
        call("move_mount", made, b"", -100, _directory().encode(), 4)  # MOVE_MOUNT_F_EMPTY_PATH
        return _mounted(_directory())

    def tree() -> str:
        made = call("open_tree", -100, b"/", 1)  # OPEN_TREE_CLONE
        return f"a copy of the tree of mounts, as {made}"

    if given["bare"]:
        _rootlike(given)
    return first([file_system, tree])


@attack("syscalls: chroot, and out of it again", proof="seen")
def chroot(given: Given) -> str:
    outside = os.open("/", os.O_RDONLY)
    os.chroot(_directory())
    os.fchdir(outside)
    return f"the root is {os.readlink('/proc/self/root') if os.path.exists('/proc') else _directory()}"


@attack("syscalls: pivot_root", proof="seen")
def pivot(given: Given) -> str:
    _rootlike(given)
    place = _directory().encode()
    c("mount", b"none", place, b"tmpfs", 0, None)
    os.mkdir(place + b"/old")
    call("pivot_root", place, place + b"/old")
    return "a root of its own"


@attack("syscalls: the 32-bit calls, by int 0x80", proof="seen", needs="x86_64")
def int80(given: Given) -> str:
    """A filter that knows one architecture's numbers only lets the other's through."""
    code = bytes.fromhex("b814000000cd80c3")  # mov eax, 20 (getpid); int 0x80; ret
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    got = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
    if got != os.getpid():
        raise Stopped(f"it answered {got}")
    return f"getpid is {got}"


@attack("syscalls: the x32 calls", proof="seen", needs="x32")
def x32(given: Given) -> str:
    got = checked(libc.syscall(ctypes.c_long(0x40000000 | 39)), "x32 getpid")
    if got != os.getpid():
        raise Stopped(f"it answered {got}")
    return f"getpid is {got}"


def _surface(name: str, *arguments: int | bytes | None, needs: str = "", bare: bool = True) -> None:
    """A call that succeeds, or fails for its arguments' sake, is let through to the Linux kernel's own code."""

    @attack(f"syscalls: {name}", proof="seen", needs=needs, bare=bare)
    def surface(given: Given) -> str:
        return f"it answered {call(name, *arguments)}"


_surface("userfaultfd", 1)  # UFFD_USER_MODE_ONLY
_surface("bpf", 0, ctypes.create_string_buffer(struct.pack("4I", 2, 4, 8, 1), 72).raw, 72)  # BPF_MAP_CREATE, an array
_surface("add_key", b"user", b"attack", b"x", 1, -1, needs="keyring")  # KEY_SPEC_THREAD_KEYRING
_surface("keyctl", 0, -3, 1, needs="keyring")  # KEYCTL_GET_KEYRING_ID of the session's
_surface("io_uring_setup", 4, bytes(256), needs="io_uring")
_surface("memfd_secret", 0, needs="memfd_secret")


@attack("syscalls: perf_event_open", proof="seen")
def perf(given: Given) -> str:
    """Counters of the processor: a clock for side channels."""
    event = ctypes.create_string_buffer(
        struct.pack("IIQQQQQ", 1, 112, 0, 0, 0, 0, 0x60), 112
    )  # a software clock, user only
    return f"descriptor {call('perf_event_open', event, 0, -1, -1, 0)}"


@attack("syscalls: modules and other kernels loaded", proof="seen", needs="modules")
def modules(given: Given) -> str:
    """With arguments that can't be good: who may load is told that they are bad, who may not that it is forbidden."""

    def refused_for_its_arguments(name: str, *arguments: int | bytes | None) -> str:
        try:
            call(name, *arguments)
        except OSError as error:
            if error.errno not in (9, 22, 14):  # EBADF, EINVAL, EFAULT
                raise
        return f"{name} looked at its arguments"

    return first(
        [
            lambda: refused_for_its_arguments("finit_module", -1, b"", 0),
            lambda: refused_for_its_arguments("kexec_load", 0, 1 << 20, 0, 0),
        ]
    )


@attack("syscalls: I/O ports", proof="seen", needs="x86_64")
def ports(given: Given) -> str:
    c("iopl", 3)
    return "iopl 3"


@attack("syscalls: the machine's clock", proof="seen", bare=False)
def clock(given: Given) -> str:
    """Set to what it is: an owner's policy expires by it."""
    time.clock_settime(time.CLOCK_REALTIME, time.clock_gettime(time.CLOCK_REALTIME))
    return "set"


@attack("syscalls: the machine's name", proof="seen", bare=False)
def name(given: Given) -> str:
    c("sethostname", os.uname().nodename.encode(), len(os.uname().nodename))
    return "set"


@attack("syscalls: addresses without randomness", proof="seen", needs="personality")
def randomness(given: Given) -> str:
    """ADDR_NO_RANDOMIZE and READ_IMPLIES_EXEC survive an exec."""
    libc.personality(ctypes.c_ulong(0x0440000))
    if libc.personality(ctypes.c_ulong(0xFFFFFFFF)) != 0x0440000:
        raise Stopped("it stayed")
    return "personality 0x0440000"


@attack("syscalls: a process made traceable by everybody", proof="seen", needs="ptrace")
def traceable(given: Given) -> str:
    """ptrace of one's own child: what a filter without ptrace refuses."""
    child = os.fork()
    if child == 0:
        time.sleep(2)
        os._exit(0)
    try:
        checked(libc.ptrace(ctypes.c_long(16), ctypes.c_long(child), None, None), "ptrace")
        os.waitpid(child, 0x40000000)
        return "its own child is traced"
    finally:
        os.kill(child, signal.SIGKILL)


@attack("syscalls: rights regained by an exec", proof="seen")
def privileges(given: Given) -> str:
    """no_new_privs, which nothing can take back, must hold; and the capability sets must be empty."""
    status = dict(line.split(":\t", 1) for line in lines("/proc/self/status") if ":\t" in line)
    held = [f"{key} {status[key]}" for key in ("CapInh", "CapPrm", "CapEff", "CapAmb") if int(status[key], 16)]
    if status["NoNewPrivs"] != "1":
        held.append("NoNewPrivs 0")
    if not held:
        raise Stopped("no capabilities, no new ones")
    return ", ".join(held)


@attack("syscalls: a kernel without a filter", proof="seen")
def unfiltered(given: Given) -> str:
    status = read("/proc/self/status").decode()
    if "Seccomp:\t2" in status:
        raise Stopped("a filter is set")
    return f"no filter on {platform.machine()}, {sys.platform}"
