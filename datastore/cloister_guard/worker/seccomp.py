"""The worker's system-call filter: classic BPF (seccomp(2), linux/filter.h), for x86-64 and AArch64.

Calls that reach another process, the network, the keyring, or a new program fail with EPERM; `clone3` says ENOSYS, so
that the C library falls back to `clone`, whose flags a filter can read; a foreign ABI kills the process.
"""

from __future__ import annotations

import ctypes
import errno
import platform
from dataclasses import dataclass

from cloister_data.bpf import (
    ALLOW,
    AUDIT_ARCH,
    ERRNO,
    JUMP_ANY_BIT,
    JUMP_EQUAL,
    LOAD,
    RETURN,
    SECCOMP,
    answer,
    argument_low,
    install,
    instruction,
    prologue,
)
from cloister_data.errors import UnavailableError

_CLONE_THREAD = 0x00010000


@dataclass(frozen=True)
class Abi:
    """One architecture's numbers (asm/unistd.h). `denied` fail with EPERM."""

    audit_arch: int
    seccomp: int
    io_uring_setup: int
    clone: int
    clone3: int
    denied: dict[str, int]


# Numbers from 424 on are the same everywhere.
_COMMON = {
    "pidfd_send_signal": 424,
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "pidfd_open": 434,
    "pidfd_getfd": 438,
    "process_madvise": 440,
    "mount_setattr": 442,
    "process_mrelease": 448,
}

X86_64 = Abi(
    audit_arch=AUDIT_ARCH["x86_64"],
    seccomp=SECCOMP["x86_64"],
    io_uring_setup=425,
    clone=56,
    clone3=435,
    denied={
        "socket": 41, "connect": 42, "accept": 43, "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47,
        "bind": 49, "listen": 50, "socketpair": 53, "accept4": 288, "recvmmsg": 299, "sendmmsg": 307,
        "fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "kill": 62, "tkill": 200, "rt_sigqueueinfo": 129,
        "rt_tgsigqueueinfo": 297, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312,
        "shmget": 29, "shmat": 30, "semget": 64, "msgget": 68, "mq_open": 240, "add_key": 248, "request_key": 249,
        "keyctl": 250, "unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161,
        "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "open_by_handle_at": 304, "init_module": 175,
        "finit_module": 313, "kexec_load": 246, "mknod": 133, "mknodat": 259, "link": 86, "linkat": 265,
        "symlink": 88, "symlinkat": 266, "rename": 82, "renameat": 264, "renameat2": 316, "unlink": 87,
        "unlinkat": 263, "mkdir": 83, "mkdirat": 258, "rmdir": 84, "truncate": 76, "chmod": 90, "fchmodat": 268,
        "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190,
        **_COMMON,
    },
)  # fmt: skip

AARCH64 = Abi(
    audit_arch=AUDIT_ARCH["aarch64"],
    seccomp=SECCOMP["aarch64"],
    io_uring_setup=425,
    clone=220,
    clone3=435,
    denied={
        "socket": 198, "socketpair": 199, "bind": 200, "listen": 201, "accept": 202, "connect": 203, "sendto": 206,
        "recvfrom": 207, "sendmsg": 211, "recvmsg": 212, "accept4": 242, "recvmmsg": 243, "sendmmsg": 269,
        "execve": 221, "execveat": 281, "kill": 129, "tkill": 130, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240,
        "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "shmget": 194, "shmat": 196,
        "semget": 190, "msgget": 186, "mq_open": 180, "add_key": 217, "request_key": 218, "keyctl": 219,
        "unshare": 97, "setns": 268, "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "bpf": 280,
        "perf_event_open": 241, "userfaultfd": 282, "open_by_handle_at": 265, "init_module": 105,
        "finit_module": 273, "kexec_load": 104, "mknodat": 33, "linkat": 37, "symlinkat": 36, "renameat": 38,
        "renameat2": 276, "unlinkat": 35, "mkdirat": 34, "truncate": 45, "fchmodat": 53, "setxattr": 5,
        "lsetxattr": 6, "fsetxattr": 7,
        **_COMMON,
    },
)  # fmt: skip

_ABIS = {"x86_64": X86_64, "aarch64": AARCH64}


def abi() -> Abi:
    """This machine's. Raises UnavailableError on any other than the two known ones."""
    found = _ABIS.get(platform.machine())
    if found is None or ctypes.sizeof(ctypes.c_void_p) != 8:
        raise _refused(f"the architecture {platform.machine()} isn't known")
    return found


def assemble(numbers: Abi) -> bytes:
    """The filter: struct sock_filter[] of 8 bytes each."""
    program = prologue(numbers.audit_arch)
    for number in sorted(set(numbers.denied.values())):
        program += answer(number, ERRNO | errno.EPERM)
    program += answer(numbers.clone3, ERRNO | errno.ENOSYS)
    program += [
        instruction(JUMP_EQUAL, numbers.clone, 0, 3),
        instruction(LOAD, argument_low(0)),
        # A thread is welcome, a process isn't.
        instruction(JUMP_ANY_BIT, _CLONE_THREAD, 1, 0),
        instruction(RETURN, ERRNO | errno.EPERM),
        instruction(RETURN, ALLOW),
    ]
    return b"".join(program)


def install_filter(libc: ctypes.CDLL) -> None:
    """Put the filter on every thread of this process; needs no_new_privs. Raises UnavailableError."""
    code = assemble(abi())
    try:
        install(code, platform.machine(), libc)
    except OSError as error:
        raise _refused(str(error.strerror)) from error


def probe_io_uring(libc: ctypes.CDLL) -> int:
    """The error number with which io_uring_setup fails (0 where it doesn't)."""
    failed = libc.syscall(ctypes.c_long(abi().io_uring_setup), ctypes.c_ulong(0), None)
    return ctypes.get_errno() if failed < 0 else 0


def _refused(why: str) -> UnavailableError:
    return UnavailableError(
        "A worker can't be confined on this machine: seccomp filter.",
        why=f"{why[:1].upper()}{why[1:]}.",
        next_step="Nothing was charged. The cloister needs a Linux kernel with seccomp filters on x86-64 or AArch64.",
    )
