"""System calls that Python has no function for. Numbers: syscall_64.tbl and asm-generic/unistd.h of Linux."""

from __future__ import annotations

import ctypes
import os
import platform

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

# The same on every architecture since Linux 5.1.
NUMBERS = {
    "pidfd_send_signal": 424,
    "io_uring_setup": 425,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "clone3": 435,
    "pidfd_getfd": 438,
    "process_madvise": 440,
    "mount_setattr": 442,
    "quotactl_fd": 443,
    "memfd_secret": 447,
    "process_mrelease": 448,
}
if platform.machine() == "aarch64":
    NUMBERS |= {
        "add_key": 217,
        "keyctl": 219,
        "bpf": 280,
        "perf_event_open": 241,
        "userfaultfd": 282,
        "kcmp": 272,
        "move_pages": 239,
        "kexec_load": 104,
        "finit_module": 273,
        "clone": 220,
        "ioprio_set": 30,
        "ioprio_get": 31,
        "tgkill": 131,
        "rt_sigqueueinfo": 138,
        "syslog": 116,
        "lookup_dcookie": 18,
        "fanotify_init": 262,
        "pivot_root": 41,
        "execveat": 281,
    }
else:
    NUMBERS |= {
        "add_key": 248,
        "keyctl": 250,
        "bpf": 321,
        "perf_event_open": 298,
        "userfaultfd": 323,
        "kcmp": 312,
        "move_pages": 279,
        "kexec_load": 246,
        "finit_module": 313,
        "clone": 56,
        "ioprio_set": 251,
        "ioprio_get": 252,
        "tgkill": 234,
        "rt_sigqueueinfo": 129,
        "syslog": 103,
        "lookup_dcookie": 212,
        "fanotify_init": 300,
        "pivot_root": 155,
        "execveat": 322,
    }

Argument = int | bytes | None | ctypes.Array[ctypes.c_char] | ctypes.Structure


def checked(result: int, what: str) -> int:
    """Raises OSError with errno where a C function has failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _pass(argument: Argument) -> object:
    if isinstance(argument, int):
        return ctypes.c_long(argument)
    if isinstance(argument, ctypes.Structure):
        return ctypes.byref(argument)
    return argument


def call(name: str, *arguments: Argument) -> int:
    """A system call by its name. Raises OSError."""
    return checked(libc.syscall(ctypes.c_long(NUMBERS[name]), *map(_pass, arguments)), name)


def c(name: str, *arguments: Argument) -> int:
    """A function of the C library that returns an int. Raises OSError where it is negative."""
    return checked(getattr(libc, name)(*map(_pass, arguments)), name)
