"""The life of one guard process: open, listen, say ready, wait for a signal, close."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import structlog

from cloister_attest.collect import simulated_hardware
from cloister_data.errors import CloisterError, ConfigurationError
from cloister_guard.companion import answering, stay_met, supervise
from cloister_guard.config import GuardConfig
from cloister_guard.control import ControlServer
from cloister_guard.guard import Guard
from cloister_guard.http.servers import KernelSockets, laptop_server, listen_tcp

logger = structlog.get_logger()


def run(config: GuardConfig, companion: Sequence[str] | None, restore: Path | None = None) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        companion: the command of the kernel service, which the guard then starts, watches and ends; None where it is a
            unit of its own, which goes on with its kernels when this guard ends.
        restore: the directory of a copy of the audit log, where the database is an older backup.

    Raises ConfigurationError or StorageError where it can't start. A guard that is killed leaves the kernel service
    running for the next one.
    """
    os.umask(0o077)
    _set_up_logging()
    # The address first: a port in use must not cost a start's evidence and leaves.
    config.make_directories()
    with _alone(config), contextlib.closing(listen_tcp(config.host, config.port)) as listener:
        asyncio.run(_serve(config, companion, listener, restore))


@contextlib.contextmanager
def _alone(config: GuardConfig) -> Iterator[None]:
    """Hold this cloister's directories: a second guard would settle the first one's jobs and end its kernels.

    Raises ConfigurationError where another guard holds one. Linux lets go when the process ends, however it ends.
    """
    with contextlib.ExitStack() as held:
        for directory in (config.state_dir, config.runtime_dir):
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            held.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigurationError(
                    f"Another cloister runs in {directory}.",
                    why="Two at once would undo each other's work.",
                    next_step="Stop that one first, or set another state_dir and runtime_dir.",
                ) from error
        yield


def _set_up_logging() -> None:
    """JSON lines on stderr; names and figures of the guard itself, never a request's content."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    # Tracebacks of servers could hold a request's content.
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


async def _serve(
    config: GuardConfig, companion: Sequence[str] | None, listener: socket.socket, restore: Path | None
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    # SIGHUP: its terminal was closed, which must not leave the kernels behind, unless nohup says that it may.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if name != signal.SIGHUP or signal.getsignal(name) is not signal.SIG_IGN:
            loop.add_signal_handler(name, stop.set)
    # It starts beside the guard.
    supervising = asyncio.create_task(
        stop.wait() if companion is None else supervise(companion, config.service_socket, stop)
    )
    await asyncio.sleep(0)
    try:
        guard = Guard(config)
        guard.recover(restore)
    except BaseException:
        stop.set()
        await asyncio.gather(supervising, return_exceptions=True)
        raise
    sockets = KernelSockets(guard)
    control = ControlServer(guard, sockets)
    await control.start()
    server = laptop_server(guard, guard.evidence.identity)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    meeting = asyncio.create_task(stay_met(guard.kernels, sockets))
    watching = asyncio.create_task(guard.watch())
    ready = config.state_dir / "ready.json"
    try:
        waiting = asyncio.create_task(stop.wait())
        parts = {waiting, serving, supervising, meeting, watching}
        if companion is not None:
            listening = asyncio.create_task(answering(config.service_socket))
            await asyncio.wait({listening, *parts}, return_when=asyncio.FIRST_COMPLETED)
            listening.cancel()
        if not any(part.done() for part in parts):
            _say_ready(config, ready, listener.getsockname()[1])
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        for forever in (meeting, watching):
            if forever.done():
                # It ends by a fault alone: a guard that doesn't watch its leases must not go on. Its kernels may.
                supervising.cancel()
                forever.result()
    finally:
        logger.info("stopping")
        ready.unlink(missing_ok=True)
        stop.set()
        meeting.cancel()
        watching.cancel()
        await guard.stop()
        (ended,) = await asyncio.gather(supervising, return_exceptions=True)
        kernels_ended = companion is not None and not supervising.cancelled()
        await sockets.close_all(remove=kernels_ended)
        server.should_exit = True
        await serving
        await control.stop()
        guard.database.close()
        if kernels_ended:
            shutil.rmtree(config.runtime_dir / "g", ignore_errors=True)
    if isinstance(ended, CloisterError):
        raise ended


def _say_ready(config: GuardConfig, path: Path, port: int) -> None:
    host = f"[{config.host}]" if ":" in config.host else config.host
    trust = config.trust or config.state_dir / "trust.toml"
    if config.platform == "simulated":
        # Whoever reads this file trusts this machine's own word: good for a demonstration, and for nothing else.
        trust.write_text(simulated_hardware(config.state_dir).trust().to_toml())
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps({"url": f"https://{host}:{port}", "trust": str(trust), "pid": os.getpid()}))
    temporary.replace(path)
    logger.info("ready", url=f"https://{host}:{port}", platform=config.platform)
