"""The trampoline between the spawner and a notebook kernel: `python -I -m cloister_kernel.launch`.

It runs with the spawner's rights, reads one LaunchPlan from its standard input, gives the rights up for good and
becomes the kernel. Whatever fails is told on the status descriptor as one Problem, and the kernel doesn't start.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from typing import NoReturn

from pydantic import Field

from cloister_data.base import Text, Wire
from cloister_data.errors import CloisterError, ConfigurationError
from cloister_kernel.mounts import MountPlan, carry_out, own_mount_namespace
from cloister_kernel.process import die_with_parent, no_new_privileges
from cloister_kernel.uids import UID_FIRST, UID_LAST

MAX_PROCESSES = 2048


class LaunchPlan(Wire):
    """What becomes of this process. `uid` None: it keeps the spawner's own, unprivileged uid."""

    uid: int | None = Field(default=None, ge=UID_FIRST, le=UID_LAST)
    parent: int
    mounts: MountPlan = MountPlan()
    closed_to: tuple[Text, ...] = Field(default=(), max_length=64)
    scratch_bytes: int = Field(default=1 << 30, ge=1 << 20)
    home: Text
    arguments: tuple[Text, ...] = Field(min_length=1, max_length=64)
    environment: dict[str, str] = Field(max_length=64)
    must_read: tuple[Text, ...] = Field(default=(), max_length=64)
    keep: tuple[int, ...] = Field(default=(), max_length=16)


def _view(plan: LaunchPlan) -> bool:
    """Give the process its own view of the file system, where one is needed or can be had; False where it has none."""
    if not plan.mounts.covers:
        return False
    try:
        own_mount_namespace()
    except OSError as error:
        needed = [cover.path for cover in plan.mounts.covers if cover.needed]
        if needed:
            raise ConfigurationError(
                f"A kernel of its own uid can't reach what it needs below {needed[0]}, nor mount a view of its own.",
                why=str(error),
                next_step="Install Python and Cloister where every user can read them (for example /opt), or allow the "
                "kernel service CAP_SYS_ADMIN.",
            ) from error
        return False
    try:
        carry_out(plan.mounts, plan.scratch_bytes)
    except OSError as error:
        raise ConfigurationError(
            "The kernel's own view of the file system can't be made.",
            why=str(error),
            next_step="Give the kernel service CAP_SYS_ADMIN, or run it without root for kernels of one uid.",
        ) from error
    return True


def _give_up_rights(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    if os.getresuid() != (uid, uid, uid) or os.getresgid() != (uid, uid, uid) or os.getgroups():
        raise ConfigurationError("The kernel's uid didn't take hold.")


def _capabilities() -> int:
    """The union of the inheritable, permitted, effective and ambient sets."""
    union = 0
    with open("/proc/self/status", "rb") as status:
        for line in status:
            name, _, value = line.partition(b":")
            if name in (b"CapInh", b"CapPrm", b"CapEff", b"CapAmb"):
                union |= int(value, 16)
    return union


def confine(plan: LaunchPlan) -> None:
    """Everything before the exec. Raises CloisterError or OSError; the process must then end."""
    own_view = False
    # Short of memory, Linux takes a kernel before the guard. A changed uid may not write here any more.
    with open("/proc/self/oom_score_adj", "wb") as adjustment:
        adjustment.write(b"500")
    if plan.uid is not None:
        # What Python imports from must be listable. The view holds only what is bound back into it: nothing else shows.
        os.umask(0o022)
        own_view = _view(plan)
        _give_up_rights(plan.uid)
        if _capabilities() != 0:
            raise ConfigurationError("The kernel would keep capabilities.", why="They survived the change of uid.")
    os.umask(0o077)
    if not no_new_privileges():
        raise ConfigurationError("no_new_privs didn't take hold.")
    # After the change of uid, which clears it; then look whether the parent was gone before.
    die_with_parent(signal.SIGKILL)
    if os.getppid() != plan.parent:
        raise ConfigurationError("The kernel service ended while this kernel was starting.")
    _limits(apart=plan.uid is not None)
    os.chdir(plan.home)
    for path in plan.must_read:
        if not os.access(path, os.R_OK):
            raise ConfigurationError(
                f"The kernel's uid can't read {path}.",
                why="A file or directory on the way there is closed to other users.",
                next_step=f"Open it: chmod -R go+rX {os.path.dirname(path)}",
            )
    for path in plan.closed_to:
        if not own_view and (os.access(path, os.R_OK) or os.access(path, os.X_OK)):
            raise ConfigurationError(
                f"The kernel could look into {path}.",
                why="Kernels can't get their own view of the file system here, and the directory is open to others.",
                next_step=f"chmod 700 {path}, or allow the kernel service CAP_SYS_ADMIN.",
            )


def _limits(*, apart: bool) -> None:
    """No core files; a fork bomb ends at its own uid's limit."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if apart:
        resource.setrlimit(resource.RLIMIT_NPROC, (MAX_PROCESSES, MAX_PROCESSES))


def main() -> NoReturn:
    status = int(sys.argv[1])
    os.set_inheritable(status, False)
    try:
        plan = LaunchPlan.from_json(sys.stdin.buffer.read())
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        confine(plan)
        for descriptor in os.listdir("/proc/self/fd"):
            number = int(descriptor)
            if number > 2 and number not in plan.keep:
                try:
                    os.set_inheritable(number, False)
                except OSError:
                    continue  # the directory's own descriptor, closed by now
        os.execve(plan.arguments[0], list(plan.arguments), plan.environment)  # noqa: S606
    except CloisterError as error:
        _report(status, error)
    except Exception as error:  # whatever it is, the kernel must not start
        _report(status, ConfigurationError("The kernel can't be launched.", why=f"{type(error).__name__}: {error}"))


def _report(status: int, error: CloisterError) -> NoReturn:
    os.write(status, error.to_problem().to_json()[:60_000])
    os._exit(71)  # EX_OSERR


if __name__ == "__main__":
    main()
