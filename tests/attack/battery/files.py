"""Files of the host, of the guard and of other kernels: reading them, and writing where others will read."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import stat
import struct
import subprocess
import time
from collections.abc import Callable, Iterator

from tests.attack.battery.native import c, call
from tests.attack.battery.registry import Given, Stopped, attack, find_mark, first

ORDINARY = {"null", "zero", "full", "random", "urandom", "tty", "ptmx"}
"""Character devices that every process may have: they lead nowhere."""


def read(path: str, limit: int = 1 << 20) -> bytes:
    """At most so many bytes; what is read of /proc or of a device comes in pieces."""
    descriptor, data = os.open(path, os.O_RDONLY | os.O_NONBLOCK), b""
    try:
        while len(data) < limit and (piece := os.read(descriptor, limit - len(data))):
            data += piece
            if path.startswith("/dev/"):
                break
        return data
    finally:
        os.close(descriptor)


def lines(path: str) -> list[str]:
    return read(path).decode("utf-8", "replace").splitlines()


def secret(path: str) -> str:
    return find_mark(read(path), path)


def _pids() -> Iterator[str]:
    return (name for name in os.listdir("/proc") if name.isdigit())


@attack("files: a world-readable secret in /tmp")
def tmp_secret(given: Given) -> str:
    return secret(given["secrets"]["tmp"])


@attack("files: a world-readable secret elsewhere")
def other_secret(given: Given) -> str:
    return secret(given["secrets"]["run"])


@attack("files: the state directory")
def state_secret(given: Given) -> str:
    return secret(given["secrets"]["state"])


@attack("files: another kernel's home")
def victim_home(given: Given) -> str:
    return secret(given["secrets"]["victim_home"])


@attack("files: another kernel's home through /proc/PID/root and /proc/PID/cwd", needs="victim")
def victim_home_through_proc(given: Given) -> str:
    pid, path = given["victim"]["pid"], given["secrets"]["victim_home"]
    return first(
        [lambda: secret(f"/proc/{pid}/root{path}"), lambda: secret(f"/proc/{pid}/cwd/{os.path.basename(path)}")]
    )


@attack("files: a secret through any process's /proc/PID/root")
def through_any_root(given: Given) -> str:
    wanted = [given["secrets"]["tmp"], given["secrets"]["run"]]
    return first([lambda p=pid, w=path: secret(f"/proc/{p}/root{w}") for pid in _pids() for path in wanted])  # type: ignore[misc]


@attack("files: a secret through any process's /proc/PID/cwd")
def through_any_cwd(given: Given) -> str:
    return first([lambda p=pid: secret(f"/proc/{p}/cwd/{given['decoy']['file']}") for pid in _pids()])  # type: ignore[misc]


@attack("files: /etc/shadow", proof="seen", needs="shadow")
def shadow(given: Given) -> str:
    data = read("/etc/shadow")
    if not data.startswith(b"root:"):
        raise Stopped("it holds no root")
    return "its first line is root's"


@attack("files: another kernel's /tmp, /var/tmp and /dev/shm", needs="victim")
def shared_scratch(given: Given) -> str:
    return first([lambda p=path: secret(p) for path in given["victim"]["scratch"]])  # type: ignore[misc]


@attack("files: a file by its handle", needs="file_handles")
def by_handle(given: Given) -> str:
    kind, handle = given["handle"]["type"], bytes.fromhex(given["handle"]["bytes"])
    packed = ctypes.create_string_buffer(struct.pack("Ii", len(handle), kind) + handle)

    def through(mount: str) -> str:
        directory = os.open(mount, os.O_RDONLY)
        descriptor = c("open_by_handle_at", directory, packed, os.O_RDONLY)
        return find_mark(os.read(descriptor, 4096), "the file")

    return first(
        [lambda m=mount: through(m) for mount in ("/", "/usr", os.path.expanduser("~"), "/tmp", "/etc", "/run")]
    )  # type: ignore[misc]


@attack("files: kernel memory through /proc/kcore", proof="seen", needs="kcore")
def kcore(given: Given) -> str:
    if read("/proc/kcore", 4) != b"\x7fELF":
        raise Stopped("it is empty")
    return "an ELF header"


@attack("files: addresses of the Linux kernel in /proc/kallsyms", proof="seen", needs="kallsyms")
def kallsyms(given: Given) -> str:
    line = read("/proc/kallsyms", 4096).split(b"\n")[0]
    if not line or int(line.split()[0], 16) == 0:
        raise Stopped("zeros only")
    return line.decode()


@attack("files: the Linux kernel's messages", proof="seen", needs="kmsg")
def kmsg(given: Given) -> str:
    def log() -> str:
        buffer = ctypes.create_string_buffer(4096)
        return f"{call('syslog', 3, buffer, 4096)} bytes of dmesg"

    return first([lambda: f"{len(read('/dev/kmsg', 8192))} bytes of /dev/kmsg", log])


@attack("files: counters of the whole machine in /proc", proof="seen")
def counters(given: Given) -> str:
    """Each tells what other processes do, by the tick: interrupts, page faults, the disk, the scheduler."""
    found = []
    for name in (
        "stat",
        "vmstat",
        "interrupts",
        "softirqs",
        "diskstats",
        "schedstat",
        "pressure/cpu",
        "zoneinfo",
        "slabinfo",
    ):
        with contextlib.suppress(OSError):
            if read(f"/proc/{name}").strip():
                found.append(name)
    if not found:
        raise Stopped("none shows anything")
    return ", ".join(found)


@attack("files: /sys", proof="seen")
def sysfs(given: Given) -> str:
    found = os.listdir("/sys/devices")
    if not found:
        raise Stopped("it is empty")
    return ", ".join(sorted(found)[:6])


@attack("files: devices in /dev", proof="seen")
def devices(given: Given) -> str:
    """Any device that opens, beyond those that lead nowhere: disks, fuse, tun, kvm, the TEE's own."""
    opened = []
    for directory, _, names in os.walk("/dev"):
        if directory.startswith(("/dev/shm", "/dev/pts", "/dev/mqueue")):
            continue
        for name in names:
            path = os.path.join(directory, name)
            # Opening is harmless, but for watchdogs and tapes; the control, which is root, tries some only.
            if (directory == "/dev" and name in ORDINARY) or name.startswith(("watchdog", "st", "nst")):
                continue
            if given["bare"] and name not in ("kmsg", "fuse", "tun", "mem"):
                continue
            with contextlib.suppress(OSError):
                if stat.S_IFMT(os.stat(path).st_mode) in (stat.S_IFCHR, stat.S_IFBLK):
                    os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
                    opened.append(path)
    if not opened:
        raise Stopped("none opens")
    return ", ".join(opened[:8])


@attack("files: a device made by mknod", proof="seen")
def mknod(given: Given) -> str:
    path = os.path.join(os.path.expanduser("~"), f"device-{os.getpid()}")
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 8))
    try:
        return f"{len(read(path, 16))} random bytes came out of it"
    finally:
        os.unlink(path)


@attack("files: settings of the Linux kernel", proof="seen")
def sysctl(given: Given) -> str:
    """Write back what stands there already: harmless, and as good a proof."""

    def write(path: str) -> str:
        value = read(path)
        descriptor = os.open(path, os.O_WRONLY)
        os.write(descriptor, value)
        os.close(descriptor)
        return path

    paths = (
        "kernel/core_pattern",
        "kernel/modprobe",
        "vm/overcommit_memory",
        "kernel/yama/ptrace_scope",
        "fs/suid_dumpable",
    )
    return first([lambda p=path: write(f"/proc/sys/{p}") for path in paths])  # type: ignore[misc]


@attack("files: /proc/sysrq-trigger, opened to be written", proof="seen", needs="sysrq")
def sysrq(given: Given) -> str:
    os.close(os.open("/proc/sysrq-trigger", os.O_WRONLY))
    return "opened"


@attack("files: out of the cgroup", proof="seen", needs="cgroups")
def cgroup(given: Given) -> str:
    """Move to the root cgroup, where no limit holds."""

    def leave(controller: str) -> str:
        path = f"/sys/fs/cgroup/{controller}/cgroup.procs"
        descriptor = os.open(path, os.O_WRONLY)
        os.write(descriptor, str(os.getpid()).encode())
        os.close(descriptor)
        return f"moved by {path}"

    return first([lambda k=kind: leave(k) for kind in (".", "pids", "memory", "cpu", "unified")])  # type: ignore[misc]


@attack("files: own /proc/self/oom_score_adj lowered", proof="seen")
def oom_score(given: Given) -> str:
    descriptor = os.open("/proc/self/oom_score_adj", os.O_RDWR)
    before = int(os.read(descriptor, 16))
    wanted = before - 1
    os.pwrite(descriptor, str(wanted).encode(), 0)
    if int(read("/proc/self/oom_score_adj")) != wanted:
        raise Stopped("it stayed")
    return f"{before} became {wanted}"


@attack("files: something put where Python imports from", proof="host")
def planted_module(given: Given) -> str:
    """Into site-packages, the prefix, the standard library, the packages themselves: as a .txt, which nothing runs."""

    def write(directory: str) -> str:
        path = os.path.join(directory, given["plant"])
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        return path

    return first([lambda d=directory: write(d) for directory in given["import_directories"]])  # type: ignore[misc]


@attack("files: something put into the service's directories", proof="host")
def planted_in_service(given: Given) -> str:
    def write(directory: str) -> str:
        path = os.path.join(directory, "service-" + given["plant"])
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        return path

    return first([lambda d=directory: write(d) for directory in given["service_directories"]])  # type: ignore[misc]


@attack("files: a read-only file changed through /proc/self/mem", proof="host")
def forced_write(given: Given) -> str:
    """FOLL_FORCE writes to private pages that are read-only; to a shared one it must not."""
    path = given["secrets"]["readonly"]
    descriptor = os.open(path, os.O_RDONLY)
    with mmap.mmap(descriptor, 4096, mmap.MAP_SHARED, mmap.PROT_READ) as page:
        # No pointer to a read-only buffer can be had; its mapping's address is in maps.
        at = next(
            int(line.split(b"-")[0], 16)
            for line in read("/proc/self/maps").splitlines()
            if line.strip().endswith(path.encode())
        )
        memory = os.open("/proc/self/mem", os.O_RDWR)
        os.pwrite(memory, b"OVERWRITTEN", at)
        return page[:11].decode()


@attack("files: a program that is setuid root", proof="seen", needs="suid")
def setuid_program(given: Given) -> str:
    for path in given["suid"]:
        with contextlib.suppress(OSError):
            done = subprocess.run([path, "-u"], capture_output=True, timeout=3, check=False)
            if done.stdout.strip() == b"0":
                return "it ran as uid 0"
    raise Stopped("it isn't there, or gives no rights")


@attack("files: setuid(0)", proof="seen")
def become_root(given: Given) -> str:
    os.setresuid(0, 0, 0)
    if os.getuid() != 0 or "0 0 4294967295" not in " ".join(lines("/proc/self/uid_map")[0].split()):
        raise Stopped("root of its own namespace only")
    return "uid 0"


@attack("files: a copy in memory of a program, which reads a secret")
def memfd_program(given: Given) -> str:
    """Whatever confines a process must confine what it executes, wherever that lies."""
    descriptor = os.memfd_create("copy")
    with open("/bin/cat", "rb") as program:
        os.write(descriptor, program.read())
    wanted = [given["secrets"]["run"], given["secrets"]["tmp"]]
    done = subprocess.run(
        [f"/proc/self/fd/{descriptor}", *wanted], capture_output=True, pass_fds=[descriptor], check=False
    )
    return find_mark(done.stdout, "what the program read")


@attack("files: who uses a directory, watched by inotify")
def inotify(given: Given) -> str:
    """The host goes on making a file there, whose name is the secret."""
    descriptor = c("inotify_init1", os.O_NONBLOCK)
    c("inotify_add_watch", descriptor, given["inotify"].encode(), 0x100)  # IN_CREATE
    time.sleep(0.5)
    return find_mark(os.read(descriptor, 4096), "the events")


@attack("files: every access on the machine, watched by fanotify", proof="seen")
def fanotify(given: Given) -> str:
    return f"descriptor {call('fanotify_init', 0, os.O_RDONLY)} of class FAN_CLASS_NOTIF, without limits"


@attack("files: descriptors inherited from the service", needs="leaked_descriptor")
def inherited_secret(given: Given) -> str:
    """A directory that was left open leads to a secret beside it (the control leaks one)."""

    def beside(number: str) -> str:
        directory = int(number)
        return find_mark(os.read(os.open(given["decoy"]["file"], os.O_RDONLY, dir_fd=directory), 4096), "the file")

    return first([lambda n=number: beside(n) for number in os.listdir("/proc/self/fd")])  # type: ignore[misc]


@attack("files: what else is open in the kernel's process", proof="seen", forked=False)
def inherited(given: Given) -> str:
    """Only sockets, pipes, event counters and own files may be: no directory, namespace, device or foreign file."""
    home, strange = os.path.realpath(os.path.expanduser("~")), []
    harmless: tuple[Callable[[str], bool], ...] = (
        lambda name: name.split(":")[0] in ("pipe", "socket", "anon_inode"),
        lambda name: name in ("/dev/null", "/dev/urandom", "/dev/random"),
        lambda name: name.startswith((home + "/", "/memfd:", f"/proc/{os.getpid()}/fd", "/tmp/", "/dev/shm/")),
    )
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            name = os.readlink(f"/proc/self/fd/{number}")
            if not any(fine(name) for fine in harmless):
                strange.append(f"{number}={name}")
    if not strange:
        raise Stopped("nothing but its own")
    return ", ".join(strange)


@attack("files: secrets of the service's environment")
def environment(given: Given) -> str:
    own = b"\0".join(os.environb[name] for name in os.environb) + read("/proc/self/environ")
    return first([lambda: find_mark(own, "its own"), lambda: secret(f"/proc/{os.getppid()}/environ")])


@attack("files: the page cache asked whether somebody reads a file", proof="seen", needs="victim")
def page_cache(given: Given) -> str:
    """preadv2(RWF_NOWAIT) tells whether the guard's or another kernel's file is in memory."""
    descriptor = os.open(given["secrets"]["run"], os.O_RDONLY)
    return f"{os.preadv(descriptor, [bytearray(16)], 0, os.RWF_NOWAIT)} bytes without waiting"
