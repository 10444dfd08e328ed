"""What a process may ask of Linux about itself (prctl(2))."""

from __future__ import annotations

import ctypes

# linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39


def prctl(option: int, argument: int) -> int:
    """Raises OSError."""
    zero = ctypes.c_ulong(0)
    result = ctypes.CDLL(None, use_errno=True).prctl(ctypes.c_int(option), ctypes.c_ulong(argument), zero, zero, zero)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")
    return int(result)


def die_with_parent(number: int) -> None:
    """Have the kernel send signal `number` when the parent's thread that started this process ends."""
    prctl(PR_SET_PDEATHSIG, number)


def no_new_privileges() -> bool:
    """From here on no exec gives rights. False where it didn't take hold."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    return prctl(PR_GET_NO_NEW_PRIVS, 0) == 1
