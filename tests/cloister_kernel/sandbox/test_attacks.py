"""Each attempt of attacks.py without the filter, where it must reach Linux, and with it, where it must not."""

import os
import platform
import subprocess
import sys
from functools import cache

import pytest

from tests.cloister_kernel.sandbox import attacks

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NOT CHECKED: without the filter these need root")
# What stops an attempt with the filter, where that isn't EPERM.
OTHERWISE = {
    **dict.fromkeys(("clone3",), "ENOSYS"),
    **dict.fromkeys(("clear_ambient", "prctl_high", "mergeable", "dnotify"), "EINVAL"),
    **dict.fromkeys(("netlink", "preadv2_nowait"), "ENOTSUP"),
    **dict.fromkeys(("x32", "int_0x80"), "SIGSYS"),
    **dict.fromkeys(("inet", "inet6", "inet_high", "udp", "packet", "own_lenient_filter"), "EAFNOSUPPORT"),
    **dict.fromkeys(("vsock", "vsock_pair", "alg", "inet_pair", "tipc_pair"), "EAFNOSUPPORT"),
    "exec_from_memory": "EINPROGRESS",
}


@cache
def outcomes(how: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", attacks.__file__, how],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def stopped(name: str) -> None:
    assert outcomes("confined")[name] == OTHERWISE.get(name, "EPERM")


def passed_before(name: str) -> None:
    """The same attempt, unconfined, gets another answer: it works, or Linux finds fault with its arguments."""
    assert outcomes("free")[name] not in {OTHERWISE.get(name, "EPERM"), "EPERM"}


@pytest.mark.parametrize("name", attacks.ANYONE)
def test_what_anyone_could_do_is_stopped(name: str) -> None:
    stopped(name)
    passed_before(name)


@needs_root
@pytest.mark.parametrize("name", attacks.ROOT)
def test_what_root_could_do_is_stopped(name: str) -> None:
    stopped(name)
    passed_before(name)


@pytest.mark.parametrize("name", attacks.FAMILIES)
def test_rare_parts_of_linux_are_stopped(name: str) -> None:
    stopped(name)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other ABIs of x86-64")
@pytest.mark.parametrize("name", attacks.X86)
def test_the_other_abis_of_x86_are_stopped(name: str) -> None:
    stopped(name)
    passed_before(name)


@pytest.mark.parametrize("name", attacks.NEEDED)
def test_what_is_needed_works_either_way(name: str) -> None:
    assert outcomes("free")[name] == "works"
    assert outcomes("confined")[name] == "works"


RACE = """
import os, socket, sys, threading
from cloister_data import bpf
from cloister_kernel.process import no_new_privileges
from cloister_kernel.sandbox import filter as kernel_filter
import ctypes

go, stop, tried, made = threading.Event(), threading.Event(), [], []

def attempt():
    go.wait()
    try:
        socket.socket(socket.AF_INET).close()
        made.append(1)
    except OSError:
        pass
    tried.append(1)

def breed():
    # Threads come and go all through the installation; a generation is born before it and tries after it.
    while not stop.is_set():
        threading.Thread(target=lambda: None).start()
    attempt()

threads = [threading.Thread(target=target) for target in [attempt] * 20 + [breed] * 4]
for thread in threads:
    thread.start()
no_new_privileges()
if sys.argv[1] == "every thread":
    kernel_filter.install()
else:
    machine = os.uname().machine
    code = kernel_filter.program(machine)
    program = bpf._Program(len(code) // 8, code)
    assert ctypes.CDLL(None).syscall(bpf.SECCOMP[machine], 1, 0, ctypes.byref(program)) == 0
stop.set()
go.set()
for thread in threads:
    thread.join()
print(len(tried), len(made))
"""


@pytest.mark.parametrize(("how", "made"), [("every thread", 0), ("this thread", 24)])
def test_threads_that_run_already_are_filtered_too(how: str, made: int) -> None:
    done = subprocess.run([sys.executable, "-c", RACE, how], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["24", str(made)], done.stderr
