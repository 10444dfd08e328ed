"""The notebook kernel's system-call filter: an allow-list in classic BPF, for x86-64 and AArch64.

The program searches the call's number by halves, so that each answer is some ten instructions away. Where an argument
decides, only its low 32 bits are read: Linux reads no more of any of these, whatever a caller puts above them.
A filter can't follow pointers, so `clone3` doesn't exist here: the C library falls back to `clone`.
"""

from __future__ import annotations

import ctypes
import errno
import os

from cloister_data import bpf
from cloister_kernel.sandbox.layers import LayerError, need_no_new_privileges
from cloister_kernel.sandbox.syscalls import ALLOWED, NUMBERS, REFUSED, UNSUPPORTED

LAYER = "system-call filter"

# linux/sched.h: NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET. Bit 7, NEWTIME elsewhere, is a signal here.
_CLONE_NEW = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000

_AF_UNIX = 1
_AF_NETLINK = 16

# asm-generic/ioctls.h: type into a terminal, paste into a console, load a line discipline.
_TIOCSTI, _TIOCLINUX, _TIOCSETD = 0x5412, 0x541C, 0x5423
# linux/sockios.h, linux/wireless.h: any socket passes these on to network devices, and some load modules (8021q,
# bridge). The requests to sockets proper lie below.
_DEVICE_REQUESTS_FIRST, _DEVICE_REQUESTS_END = 0x8910, 0x8C00

# linux/fcntl.h: as inotify, a signal for each time that somebody reads a file of a directory.
_F_NOTIFY = 1026

_READ_PERSONALITY = 0xFFFFFFFF
_MADV_MERGEABLE = 12
_RWF_NOWAIT = 0x8
# S_IFCHR and S_IFBLK have this bit; regular files, pipes and sockets don't.
_S_DEVICE_BIT = 0x2000

# linux/prctl.h. Left out are those that share a core's cookie or merged pages with others, rewrite the process's own
# map (SET_MM) or need a capability.
_PRCTL = (
    1, 2,  # PDEATHSIG
    3, 4,  # DUMPABLE
    7, 8,  # KEEPCAPS
    13, 14,  # TIMING
    15, 16,  # NAME
    21, 22,  # SECCOMP
    23,  # CAPBSET_READ
    25,  # GET_TSC
    27,  # GET_SECUREBITS
    29, 30,  # TIMERSLACK
    33, 34,  # MCE_KILL
    36, 37,  # CHILD_SUBREAPER
    38, 39,  # NO_NEW_PRIVS
    40,  # GET_TID_ADDRESS
    41, 42,  # THP_DISABLE
    50, 51,  # SVE
    52, 53,  # SPECULATION_CTRL
    54,  # PAC_RESET_KEYS
    55, 56,  # TAGGED_ADDR_CTRL
    60, 61,  # PAC_ENABLED_KEYS
    63, 64,  # SME
    65, 66,  # MDWE
    0x41555856,  # GET_AUXV
    0x53564D41,  # SET_VMA
)  # fmt: skip


def _refuse(number: int) -> list[bytes]:
    return [bpf.instruction(bpf.RETURN, bpf.ERRNO | number)]


def _match(argument: int, answers: dict[int, int], otherwise: int) -> list[bytes]:
    checks = [bpf.instruction(bpf.LOAD, bpf.argument_low(argument))]
    for value, verdict in answers.items():
        checks += bpf.answer(value, verdict)
    return [*checks, bpf.instruction(bpf.RETURN, otherwise)]


def _refuse_bits(argument: int, bits: int, number: int) -> list[bytes]:
    return [
        bpf.instruction(bpf.LOAD, bpf.argument_low(argument)),
        bpf.instruction(bpf.JUMP_ANY_BIT, bits, 0, 1),
        bpf.instruction(bpf.RETURN, bpf.ERRNO | number),
        bpf.instruction(bpf.RETURN, bpf.ALLOW),
    ]


def _ioctl() -> list[bytes]:
    refused = bpf.ERRNO | errno.EPERM
    return [
        bpf.instruction(bpf.LOAD, bpf.argument_low(1)),
        *(each for request in (_TIOCSTI, _TIOCLINUX, _TIOCSETD) for each in bpf.answer(request, refused)),
        bpf.instruction(bpf.JUMP_AT_LEAST, _DEVICE_REQUESTS_FIRST, 0, 2),
        bpf.instruction(bpf.JUMP_AT_LEAST, _DEVICE_REQUESTS_END, 1, 0),
        bpf.instruction(bpf.RETURN, refused),
        bpf.instruction(bpf.RETURN, bpf.ALLOW),
    ]


def _by_argument() -> dict[str, list[bytes]]:
    """The calls whose arguments decide."""
    refused = bpf.ERRNO | errno.EPERM
    # libzmq and the C library take EOPNOTSUPP from netlink for "not here"; on EAFNOSUPPORT libzmq aborts.
    family = _match(0, {_AF_UNIX: bpf.ALLOW, _AF_NETLINK: bpf.ERRNO | errno.EOPNOTSUPP}, bpf.ERRNO | errno.EAFNOSUPPORT)
    return {
        "clone": _refuse_bits(0, _CLONE_NEW, errno.EPERM),
        "socket": family,
        "socketpair": family,
        "ioctl": _ioctl(),
        "fcntl": _match(1, {_F_NOTIFY: bpf.ERRNO | errno.EINVAL}, bpf.ALLOW),
        "personality": _match(0, {0: bpf.ALLOW, _READ_PERSONALITY: bpf.ALLOW}, refused),
        "prctl": _match(0, dict.fromkeys(_PRCTL, bpf.ALLOW), bpf.ERRNO | errno.EINVAL),
        "mknod": _refuse_bits(1, _S_DEVICE_BIT, errno.EPERM),
        "mknodat": _refuse_bits(2, _S_DEVICE_BIT, errno.EPERM),
        # Equal pages of two kernels must not become one: a write tells by its time.
        "madvise": _match(2, {_MADV_MERGEABLE: bpf.ERRNO | errno.EINVAL}, bpf.ALLOW),
        # It tells whether a page of a shared file is in memory, which is what another process read.
        "preadv2": _refuse_bits(5, _RWF_NOWAIT, errno.EOPNOTSUPP),
    }


def _search(ranges: list[tuple[int, list[bytes]]]) -> list[bytes]:
    """Find the last range that begins at or below the number, by halves. Every range's instructions end in a return."""
    if len(ranges) == 1:
        return ranges[0][1]
    middle = len(ranges) // 2
    low, high = _search(ranges[:middle]), _search(ranges[middle:])
    first = ranges[middle][0]
    if len(low) <= bpf.MAX_CONDITIONAL_JUMP:
        choice = [bpf.instruction(bpf.JUMP_AT_LEAST, first, len(low), 0)]
    else:
        choice = [bpf.instruction(bpf.JUMP_AT_LEAST, first, 0, 1), bpf.instruction(bpf.JUMP, len(low))]
    return [*choice, *low, *high]


def program(machine: str) -> bytes:
    """The filter for uname's `machine`: struct sock_filter[] of 8 bytes each. Raises LayerError."""
    if machine not in NUMBERS:
        raise LayerError(
            LAYER,
            f"The architecture {machine} isn't known.",
            "Run kernels on 64-bit Linux on x86-64 or AArch64.",
        )
    verdicts = {name: [bpf.instruction(bpf.RETURN, bpf.ALLOW)] for name in ALLOWED}
    verdicts |= {name: _refuse(errno.EPERM) for name in REFUSED}
    verdicts |= {name: _refuse(errno.ENOTSUP) for name in UNSUPPORTED}
    verdicts |= _by_argument()
    answers = {number: verdicts[name] for name, number in NUMBERS[machine].items() if name in verdicts}
    ranges: list[tuple[int, list[bytes]]] = []
    for number in range(max(answers) + 2):
        wanted = answers.get(number, _refuse(errno.ENOSYS))
        if not ranges or ranges[-1][1] != wanted:
            ranges.append((number, wanted))
    instructions = [*bpf.prologue(bpf.AUDIT_ARCH[machine]), *_search(ranges)]
    if len(instructions) > bpf.MAX_INSTRUCTIONS:
        raise LayerError(LAYER, "It is too long.", f"Linux takes {bpf.MAX_INSTRUCTIONS} instructions.")
    return b"".join(instructions)


def install() -> None:
    """Put the filter on every thread of this process, for good; needs no_new_privs. Raises LayerError."""
    machine = os.uname().machine
    code = program(machine)
    if ctypes.sizeof(ctypes.c_void_p) != 8:
        raise LayerError(LAYER, "This Python is a 32-bit program.", "Install a 64-bit Python for kernels.")
    need_no_new_privileges(LAYER)
    try:
        bpf.install(code, machine, ctypes.CDLL(None, use_errno=True))
    except OSError as error:
        raise LayerError(
            LAYER,
            f"Linux refused it: {error.strerror}.",
            "Use a Linux with CONFIG_SECCOMP_FILTER.",
        ) from error
