"""The kernel service of the confidential VM, as a process: starts kernels when the guard asks, carries their channels.

`python -m cloister_kernel.service --socket S --control C --vault DIR --runtime DIR [--hide DIR]...`

It outlives the guard: a guard that stops without a word leaves the kernels as they are, and the next one gets them
again. Where none comes for `--guard-away` seconds, the service ends its kernels and itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from cloister_data.errors import CloisterError, ConfigurationError
from cloister_data.kernels import MISCONFIGURED
from cloister_kernel.control import ControlClient
from cloister_kernel.door import Door, listen
from cloister_kernel.idling import IdleRule
from cloister_kernel.journal import log
from cloister_kernel.kernels import (
    GUARD_AWAY_SECONDS,
    IDLE_SECONDS,
    LEASE_SECONDS,
    KernelService,
    Rules,
    remove_socket,
)
from cloister_kernel.limits import Limits
from cloister_kernel.process import die_with_parent
from cloister_kernel.sandbox.cgroups import Limits as KernelLimits
from cloister_kernel.sandbox.confined import ConfinedSpawner
from cloister_kernel.unconfined import UnconfinedSpawner
from cloister_kernel.usage import Memory

MEMORY_MB, PROCESSES, HOME_MB = 4096, 1024, 1024


@contextlib.contextmanager
def alone(runtime: Path) -> Iterator[None]:
    """Wait until an earlier service, which is told to end or was killed, has ended its kernels."""
    descriptor = os.open(runtime / "k", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log("waiting for an earlier kernel service to end")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remove_stale_sockets(directory: Path) -> None:
    """The guard sockets of an earlier service's kernels, which died with it. `directory` holds one for each kernel."""
    with contextlib.suppress(FileNotFoundError):
        for path in directory.iterdir():
            if re.fullmatch("[0-9a-f]{32}", path.name):
                remove_socket(path / "guard.sock")


async def run(
    spawner: ConfinedSpawner | UnconfinedSpawner, control: ControlClient, rules: Rules, listener: socket.socket
) -> None:
    """Clear what an earlier service left, serve until SIGTERM, SIGINT or too long without a guard, end every kernel."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # Who starts it by nohup wants it to outlive a terminal.
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, stop.set)
    memory: Memory | None = None
    try:
        await spawner.recover()
        if isinstance(spawner, ConfinedSpawner):
            memory = spawner
            await spawner.check()
    except BaseException:
        await spawner.close()
        raise
    service = KernelService(spawner, control, rules, memory)
    server = await asyncio.start_unix_server(Door(service).serve, sock=listener)
    keeper = asyncio.create_task(service.housekeeping())
    log("listening", service=service.name)
    ends = [asyncio.create_task(event.wait()) for event in (stop, service.abandoned)]
    await asyncio.wait({keeper, *ends}, return_when=asyncio.FIRST_COMPLETED)
    server.close()
    for task in (keeper, *ends):
        task.cancel()
    await service.close()
    # A fault of the housekeeping: kernels that nobody looks after must not go on.
    results = await asyncio.gather(keeper, return_exceptions=True)
    if isinstance(results[0], Exception):
        raise results[0]


def make_spawner(options: argparse.Namespace) -> ConfinedSpawner | UnconfinedSpawner:
    """To be called while this process has a single thread. Raises CloisterError."""
    if options.unsafe_no_sandbox:
        log("KERNELS ARE NOT CONFINED (--unsafe-no-sandbox): never for real data")
        return UnconfinedSpawner(
            homes=options.runtime / "homes", runtime=options.runtime, hidden=(*options.hide, options.vault)
        )
    return ConfinedSpawner.open(
        options.runtime,
        options.vault,
        limits=KernelLimits(options.memory_mb << 20, options.processes, options.cpus),
        home_bytes=options.home_mb << 20,
        # An eighth for each of /tmp, /var/tmp and /dev/shm.
        tmp_bytes=options.memory_mb << 17,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cloister_kernel.service", description=__doc__.split("\n")[0])
    parser.add_argument("--socket", type=Path, required=True, help="where the guard gives its orders")
    parser.add_argument("--control", type=Path, required=True, help="the guard's control socket")
    parser.add_argument("--runtime", type=Path, required=True, help="a short path for the kernels' sockets")
    parser.add_argument("--vault", type=Path, required=True, help="where the users' homes are kept, encrypted")
    parser.add_argument("--hide", type=Path, action="append", default=[], help="a directory no kernel may see")
    parser.add_argument("--memory-mb", type=int, default=MEMORY_MB, help="MiB of memory that one kernel may have")
    parser.add_argument("--processes", type=int, default=PROCESSES, help="processes and threads of one kernel")
    parser.add_argument("--cpus", type=float, default=float(os.cpu_count() or 1), help="CPUs that one kernel may use")
    parser.add_argument("--home-mb", type=int, default=HOME_MB, help="MiB of a user's home")
    parser.add_argument("--warm", type=int, default=0, help="kernels that are started before anybody asks")
    parser.add_argument("--unsafe-no-sandbox", action="store_true", help="don't confine kernels: for trying out only")
    parser.add_argument(
        "--die-with-parent", action="store_true", help="stop when the process that started this one ends"
    )
    parser.add_argument("--per-user", type=int, default=Limits.per_user, help="kernels that one user may have")
    parser.add_argument("--total", type=int, default=Limits.total, help="kernels of all users together")
    parser.add_argument("--idle", type=float, default=IDLE_SECONDS, help="seconds an unused kernel lives")
    parser.add_argument("--lease", type=float, default=LEASE_SECONDS, help="seconds a kernel lives without its laptop")
    parser.add_argument(
        "--guard-away", type=float, default=GUARD_AWAY_SECONDS, help="seconds the kernels live without a guard"
    )
    options = parser.parse_args(arguments)
    rules = Rules(
        Limits(options.per_user, options.total),
        IdleRule(options.idle),
        options.lease,
        options.guard_away,
        0 if options.unsafe_no_sandbox else options.warm,
    )
    try:
        if options.die_with_parent:
            die_with_parent(signal.SIGTERM)
        (options.runtime / "k").mkdir(mode=0o711, parents=True, exist_ok=True)
        with alone(options.runtime):
            spawner = make_spawner(options)
            remove_stale_sockets(options.runtime / "g")
            listener = listen(options.socket)
            try:
                asyncio.run(run(spawner, ControlClient(options.control), rules, listener))
            finally:
                options.socket.unlink(missing_ok=True)
    except ConfigurationError as error:
        log(f"{error}")
        # For the guard, which then doesn't try again and again.
        options.socket.with_suffix(".problem").write_bytes(error.to_problem().to_json())
        return MISCONFIGURED
    except (CloisterError, OSError) as error:
        log(f"{error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
