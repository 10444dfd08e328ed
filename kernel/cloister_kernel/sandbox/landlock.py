"""The notebook kernel's file-system view and reach, restricted by Landlock (landlock(7), linux/landlock.h).

A rule stands for the directory or file that its path names now, and for what lies below it, across mounts. It doesn't
stand for what is mounted OVER that directory later: the new root isn't below the old one, only below the old one's
parent. So where the home is mounted over /home/cloister after `restrict`, the rule has to be on /home.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Sequence

from cloister_kernel.sandbox.layers import LayerError, need_no_new_privileges

LAYER = "Landlock"

# Linux 6.2, the first that can refuse truncate(2).
MIN_ABI = 3

# The same numbers everywhere.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1

_EXECUTE = 1 << 0
_WRITE_FILE = 1 << 1
_READ_FILE = 1 << 2
_READ_DIR = 1 << 3
_MAKE_CHAR = 1 << 6
_MAKE_BLOCK = 1 << 11
_TRUNCATE = 1 << 14
_IOCTL_DEV = 1 << 15
# Bits 0 to 12 since ABI 1; then REFER, TRUNCATE and IOCTL_DEV.
_FILE_SYSTEM = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
# What a rule on a file, not a directory, may hold.
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV

# BIND_TCP and CONNECT_TCP, since ABI 4; no port gets a rule.
_NETWORK = 0b11
# ABSTRACT_UNIX_SOCKET and SIGNAL, since ABI 6: only those of the kernel's own processes are in reach.
_SCOPES = 0b11

# What programs expect to open, where it exists: read and write, but no directory of devices is writable.
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
# Terminals take their requests (window size, modes) by ioctl.
TERMINALS = ("/dev/tty", "/dev/ptmx", "/dev/pts")
# Shared memory of multiprocessing and torch: a directory of plain files.
SHARED_MEMORY = "/dev/shm"  # noqa: S108


def abi() -> int:
    """The version of Landlock that this Linux has, 0 for none."""
    try:
        return _call(
            _CREATE_RULESET, ctypes.c_void_p(None), ctypes.c_size_t(0), ctypes.c_uint32(_CREATE_RULESET_VERSION)
        )
    except OSError:
        return 0


def restrict(readable: Sequence[str], writable: Sequence[str]) -> None:
    """Leave this process, and all that it starts, the files below these paths; needs no_new_privs. Not to be undone.

    `readable` may be read and executed; in `writable` everything may be done but making device nodes. Both must exist.
    DEVICES, TERMINALS and SHARED_MEMORY are given where they exist. TCP is refused (from ABI 4), and abstract sockets
    and signals reach no process outside (from ABI 6).

    Raises LayerError below MIN_ABI, for a path that isn't there, and where there are other threads: a ruleset holds
    for the calling thread only.
    """
    version = abi()
    if version < MIN_ABI:
        found = f"offers version {version}" if version else "doesn't offer it"
        raise LayerError(
            LAYER,
            f"It needs version {MIN_ABI}, and this Linux {found}.",
            "Use Linux 6.2 or newer with `landlock` in CONFIG_LSM or in the boot parameter lsm=.",
        )
    need_no_new_privileges(LAYER)
    try:
        if len(os.listdir("/proc/self/task")) != 1:
            raise LayerError(LAYER, "There are other threads already.", "Confine the process before it starts any.")
        _restrict(version, readable, writable)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise LayerError(
            LAYER,
            f"Linux refused it: {error.strerror}{where}.",
            "Mount /proc, and name only paths that exist.",
        ) from error


def _restrict(version: int, readable: Sequence[str], writable: Sequence[str]) -> None:
    handled = max(rights for since, rights in _FILE_SYSTEM.items() if since <= version)
    attributes = struct.pack("=QQQ", handled, _NETWORK, _SCOPES)
    # A version knows a prefix of the structure.
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _call(_CREATE_RULESET, ctypes.c_char_p(attributes), ctypes.c_size_t(size), ctypes.c_uint32(0))
    try:
        for path in readable:
            _allow(ruleset, path, _READ_FILE | _READ_DIR | _EXECUTE)
        for path in writable:
            _allow(ruleset, path, handled & ~(_MAKE_CHAR | _MAKE_BLOCK | _IOCTL_DEV))
        for path in filter(os.path.exists, DEVICES):
            _allow(ruleset, path, _READ_FILE | _WRITE_FILE)
        for path in filter(os.path.exists, TERMINALS):
            _allow(ruleset, path, handled & (_READ_FILE | _WRITE_FILE | _READ_DIR | _IOCTL_DEV))
        if os.path.exists(SHARED_MEMORY):
            _allow(ruleset, SHARED_MEMORY, handled & ~(_MAKE_CHAR | _MAKE_BLOCK | _IOCTL_DEV))
        _call(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(beneath).st_mode):
            rights &= _ON_FILES
        # struct landlock_path_beneath_attr, packed: u64 rights, s32 descriptor.
        rule = ctypes.c_char_p(struct.pack("=Qi", rights, beneath))
        _call(_ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(_RULE_PATH_BENEATH), rule, ctypes.c_uint32(0))
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
    finally:
        os.close(beneath)


def _call(number: int, *arguments: object) -> int:
    """Raises OSError."""
    result = ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return int(result)
