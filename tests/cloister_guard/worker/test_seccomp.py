"""The filter by its numbers, and what it does to a process: each call works before it and fails after it."""

import ctypes
import errno
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from cloister_guard.worker import seccomp
from cloister_guard.worker.seccomp import AARCH64, X86_64, Abi, assemble

PROBE = """
import ctypes, errno, os, socket, subprocess, sys, threading
from cloister_guard.worker.confine import confine

def code(call):
    try:
        call()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "works"

def thread():
    found = []
    worker = threading.Thread(target=lambda: found.append(1))
    worker.start(); worker.join()
    return "works" if found else "fails"

def fork():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)

libc = ctypes.CDLL(None, use_errno=True)
def raw(*arguments):
    ctypes.set_errno(0)
    if libc.syscall(*(ctypes.c_long(argument) for argument in arguments)) < 0:
        raise OSError(ctypes.get_errno(), "")

here = int(sys.argv[2])
listener = socket.socket(); listener.bind(("127.0.0.1", 0)); listener.listen()
port = listener.getsockname()[1]
if sys.argv[1] == "confined":
    listener.close()
    confine(parent=os.getppid(), memory_bytes=1 << 40, cpu_seconds=60, keep=frozenset({0, 1, 2}))
print("inet", code(lambda: socket.create_connection(("127.0.0.1", port)).close()))
print("unix", code(lambda: socket.socket(socket.AF_UNIX).close()))
print("pair", code(lambda: [end.close() for end in socket.socketpair()]))
print("exec", code(lambda: subprocess.run(["/bin/true"], check=True)))
print("fork", code(fork))
print("kill", code(lambda: os.kill(os.getpid(), 0)))
print("ptrace", code(lambda: raw(here, 16, 2**22 - 1, 0, 0)))
print("write", code(lambda: open("/tmp/cloister-worker-probe-%d" % os.getpid(), "w").write("x" * 9000)))
print("rename", code(lambda: os.rename("/tmp/none-of-this", "/tmp/none-of-that")))
print("thread", thread())
print("dumpable", libc.prctl(3, 0, 0, 0, 0))
print("descriptors", len(os.listdir("/proc/self/fd")))
"""


def probe(how: str) -> dict[str, str]:
    number = {"x86_64": "101"}.get(seccomp.platform.machine(), "117")
    command = [sys.executable, "-I", "-W", "ignore", "-c", PROBE, how, number]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for path in Path("/tmp").glob("cloister-worker-probe-*"):
        path.unlink()
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def test_what_the_filter_stops_and_that_it_worked_before() -> None:
    free, confined = probe("free"), probe("confined")
    for call in ("inet", "unix", "pair", "exec", "fork", "kill", "write", "thread"):
        assert free[call] == "works", call
    assert (free["ptrace"], free["rename"], free["dumpable"]) == ("ESRCH", "ENOENT", "1")
    for call in ("inet", "unix", "pair", "exec", "fork", "kill", "ptrace", "rename"):
        assert confined[call] == "EPERM", call
    assert confined["write"] == "EFBIG"
    assert confined["thread"] == "works"
    assert confined["dumpable"] == "0"
    # The three standard ones, and that of the listing.
    assert confined["descriptors"] == "4"
    assert int(free["descriptors"]) > 4


@pytest.mark.parametrize("abi", [X86_64, AARCH64])
def test_the_program_is_well_formed(abi: Abi) -> None:
    code = assemble(abi)
    assert len(code) % 8 == 0
    assert len(code) // 8 < 4096
    assert {"socket", "connect", "io_uring_setup", "execve", "ptrace"} <= set(abi.denied)
    assert abi.clone not in abi.denied.values()
    assert abi.seccomp not in abi.denied.values()


def run(code: bytes, arch: int, number: int, flags: int = 0) -> int:
    """A small classic-BPF machine: what the kernel would answer."""
    at, accumulator = 0, 0
    data = {0: number, 4: arch, 16: flags}
    while True:
        operation, true, false, k = struct.unpack_from("=HBBI", code, at * 8)
        at += 1
        if operation == 0x20:
            accumulator = data[k]
        elif operation == 0x06:
            return int(k)
        else:
            taken = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[operation]
            at += true if taken else false


@pytest.mark.parametrize("abi", [X86_64, AARCH64])
def test_the_program_answers_as_meant(abi: Abi) -> None:
    code = assemble(abi)
    allow, denied, killed = 0x7FFF0000, 0x50000 | errno.EPERM, 0x80000000
    for number in range(600):
        answer = run(code, abi.audit_arch, number, 0x10000)
        if number in abi.denied.values():
            assert answer == denied
        elif number == abi.clone3:
            assert answer == 0x50000 | errno.ENOSYS
        else:
            assert answer == allow
    assert run(code, abi.audit_arch, abi.clone, 0x11) == denied
    assert run(code, 0x40000003, 1) == killed
    assert run(code, abi.audit_arch, 0x40000000 | 41) == killed


HEADERS = {"unistd_64.h": X86_64, "unistd.h": AARCH64}


@pytest.mark.parametrize(
    ("path", "abi", "prefix"),
    [
        ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", X86_64, "__NR_"),
        ("/usr/include/asm-generic/unistd.h", AARCH64, "__NR3264_|__NR_"),
    ],
)
def test_the_numbers_are_the_kernels(path: str, abi: Abi, prefix: str) -> None:
    header = Path(path)
    if not header.exists():
        pytest.skip(f"{path} isn't installed: the numbers aren't compared with the kernel's")
    known = {
        name: int(number)
        for name, number in re.findall(rf"#define (?:{prefix})(\w+)\s+(\d+)", header.read_text(encoding="utf-8"))
    }
    shared = set(abi.denied) & set(known)
    assert len(shared) > 50
    assert {name: abi.denied[name] for name in shared} == {name: known[name] for name in shared}
    assert known["clone"] == abi.clone
    assert known["seccomp"] == abi.seccomp


def test_an_unknown_architecture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp.platform, "machine", lambda: "riscv64")
    with pytest.raises(seccomp.UnavailableError, match="seccomp"):
        seccomp.install_filter(ctypes.CDLL(None))
