"""System-call filters in classic BPF: the assembler and the installer (seccomp(2), linux/filter.h, linux/seccomp.h).

For x86-64 and AArch64, both little-endian with 64-bit arguments. A process installs a filter on itself before it does
anything else, so this imports the standard library only and raises OSError; the caller says it in its own words.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
JUMP = 0x05  # BPF_JMP | BPF_JA: forward by k instructions
JUMP_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
JUMP_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
JUMP_ANY_BIT = 0x45  # BPF_JMP | BPF_JSET | BPF_K
RETURN = 0x06  # BPF_RET | BPF_K

ALLOW = 0x7FFF0000
KILL_PROCESS = 0x80000000
ERRNO = 0x00050000

# struct seccomp_data: nr (u32), arch (u32), instruction pointer (u64), args (6 x u64, little-endian here).
NUMBER, ARCH = 0, 4

# By uname's machine (linux/audit.h; asm/unistd.h).
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
SECCOMP = {"x86_64": 317, "aarch64": 277}

INSTRUCTION_BYTES = 8
MAX_INSTRUCTIONS = 4096  # BPF_MAXINSNS
MAX_CONDITIONAL_JUMP = 255  # the two targets are bytes; JUMP's is a u32

_SECCOMP_SET_MODE_FILTER = 1
_SECCOMP_FILTER_FLAG_TSYNC = 1
_X32_BIT = 0x40000000


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def argument_low(index: int) -> int:
    """The offset of the low 32 bits of argument `index` (0 to 5): all that Linux reads of an int or unsigned int."""
    return 16 + 8 * index


def instruction(code: int, k: int, true: int = 0, false: int = 0) -> bytes:
    """One struct sock_filter of 8 bytes: u16 code, u8 jump if true, u8 jump if false, u32 k."""
    return struct.pack("=HBBI", code, true, false, k)


def answer(number: int, value: int) -> list[bytes]:
    """Return `value` if the accumulator holds `number`, else go on."""
    return [instruction(JUMP_EQUAL, number, 0, 1), instruction(RETURN, value)]


def prologue(audit_arch: int) -> list[bytes]:
    """Kill the process on a call of any other ABI; then the accumulator holds the call's number."""
    return [
        instruction(LOAD, ARCH),
        instruction(JUMP_EQUAL, audit_arch, 1, 0),
        instruction(RETURN, KILL_PROCESS),
        instruction(LOAD, NUMBER),
        # x32 on x86-64; nothing has so large a number elsewhere.
        instruction(JUMP_AT_LEAST, _X32_BIT, 0, 1),
        instruction(RETURN, KILL_PROCESS),
    ]


def install(code: bytes, machine: str, libc: ctypes.CDLL) -> None:
    """Put the filter on every thread of this process; needs no_new_privs. `libc` keeps errno (use_errno=True).

    Raises OSError; ESRCH where a thread has a filter of its own and can't take this one. Then no thread has it.
    """
    program = _Program(len(code) // INSTRUCTION_BYTES, code)
    done = libc.syscall(
        ctypes.c_long(SECCOMP[machine]),
        ctypes.c_ulong(_SECCOMP_SET_MODE_FILTER),
        ctypes.c_ulong(_SECCOMP_FILTER_FLAG_TSYNC),
        ctypes.byref(program),
    )
    if done > 0:
        raise OSError(errno.ESRCH, "a thread refused it")
    if done < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
