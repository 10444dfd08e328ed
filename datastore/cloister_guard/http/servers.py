"""The servers of one guard: HTTPS for laptops, one unix socket for each kernel."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI, Request
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from cloister_attest.channel import ServerIdentity
from cloister_data.errors import ConfigurationError, ConflictError, ForbiddenError
from cloister_data.framing import MAX_CHANNEL_FRAME
from cloister_guard.guard import VERSION, Guard
from cloister_guard.http import audit, files, laptop, metrics, scientist
from cloister_guard.http.messages import SLOT, install_handlers
from cloister_guard.http.unambiguous import OneLength
from cloister_guard.identity import Caller

logger = structlog.get_logger()

STOP_SECONDS = 3
LAPTOP_CONNECTIONS = 8192
KERNEL_CONNECTIONS = 256
"""Each costs the guard a descriptor; without a bound one hostile kernel would take them all, and stop everybody."""


class _Server(uvicorn.Server):
    """Signals belong to the guard as a whole, not to each of its servers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _app(title: str) -> FastAPI:
    app = FastAPI(title=title, version=VERSION, docs_url=None, redoc_url=None, openapi_url=None)
    install_handlers(app)
    return app


def laptop_app(guard: Guard) -> FastAPI:
    """Everything that HTTPS offers, with its OpenAPI document."""
    app = _app("Cloister")
    app.openapi_url = "/api/v1/openapi.json"
    app.setup()
    app.include_router(laptop.make_router(guard))
    app.include_router(scientist.make_router(guard, laptop.bearer(guard)))
    app.include_router(files.make_router(guard, laptop.bearer(guard)))
    app.include_router(audit.make_router(guard, laptop.bearer(guard)))
    app.include_router(metrics.make_router(guard, laptop.bearer(guard)))
    return app


def kernel_app(guard: Guard) -> FastAPI:
    """The scientist's routes alone. The caller is put into the scope by the socket's server."""

    async def who(request: Request) -> Caller:
        caller: Caller = request.scope["cloister.caller"]
        return caller

    app = _app("Cloister kernel socket")
    app.include_router(scientist.make_router(guard, who))
    return app


def _bounded(connections: int) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol; what comes above `connections` of one server is closed at once."""

    def connection_made(self: Any, transport: asyncio.Transport) -> None:
        AutoHTTPProtocol.connection_made(self, transport)
        if len(self.connections) > connections:
            transport.abort()

    return type("BoundedProtocol", (AutoHTTPProtocol,), {"connection_made": connection_made})


def _config(app: Any, connections: int, **options: Any) -> uvicorn.Config:
    return uvicorn.Config(
        OneLength(app),
        http=_bounded(connections),
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        date_header=False,
        ws_max_size=MAX_CHANNEL_FRAME,
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=STOP_SECONDS,
        **options,
    )


def listen_tcp(host: str, port: int) -> socket.socket:
    """Raises ConfigurationError where the address can't be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Without the protocol asyncio doesn't see TCP, leaves Nagle's algorithm on, and every small answer waits 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        # From here on connections wait in the backlog, so the address may be told before the server takes them.
        listener.listen(2048)
    except OSError as error:
        listener.close()
        used = error.errno == errno.EADDRINUSE
        raise ConfigurationError(
            f"The cloister can't listen on {host}:{port}.",
            why="Another program uses that port." if used else f"{error.strerror}.",
            next_step="Stop that program, or set another port as `listen`." if used else "Correct `listen`.",
        ) from error
    listener.setblocking(False)
    return listener


def laptop_server(guard: Guard, identity: ServerIdentity) -> uvicorn.Server:
    app = metrics.Counted(laptop_app(guard), guard.metrics)
    return _Server(_config(app, LAPTOP_CONNECTIONS, ssl_context_factory=lambda *_: identity.context_for_server))


@dataclass
class _Open:
    """A kernel's listening socket: whose it is, and the run of the kernel service that said so."""

    path: Path
    uid: int
    caller: Caller
    service: str
    server: uvicorn.Server
    task: asyncio.Task[None]


class KernelSockets:
    """One listening socket for each registered kernel; the socket is the identity."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._app = metrics.Counted(kernel_app(guard), guard.metrics)
        self._open: dict[str, _Open] = {}
        self._one_at_a_time = asyncio.Lock()

    async def open(self, kernel: str, uid: int, caller: Caller, service: str) -> Path:
        """Make the kernel's socket, owned by `uid`, in a directory of its own that nobody else may enter.

        A kernel may be registered twice by the service that runs it: then its socket is left as it is. The directory
        may be there already: a kernel that an earlier guard knew looks into it. Raises ConflictError for a kernel that
        is registered as another's.
        """
        async with self._one_at_a_time:
            await self.keep(service)
            found = self._open.get(kernel)
            if found is not None:
                if (found.uid, found.caller) != (uid, caller):
                    raise ConflictError("This kernel is registered as another's.")
                return found.path
            path = self._guard.config.kernel_socket(kernel)
            listener = _listen_for_kernel(path, uid)
            inner, slot = self._app, asyncio.Lock()

            async def app(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
                scope["cloister.caller"], scope[SLOT] = caller, slot
                await inner(scope, receive, send)

            server = _Server(_config(app, KERNEL_CONNECTIONS))
            task = asyncio.create_task(server.serve(sockets=[listener]), name=f"kernel socket {kernel}")
            self._open[kernel] = _Open(path, uid, caller, service, server, task)
            self._count()
            return path

    async def keep(self, service: str) -> None:
        """Close the sockets of kernels of an earlier run of the kernel service: they died with it."""
        await asyncio.gather(*(self.close(kernel) for kernel, of in list(self._open.items()) if of.service != service))

    async def close(self, kernel: str) -> None:
        """The kernel has ended: its socket goes, with its directory."""
        await self._close(kernel, remove=True)

    async def _close(self, kernel: str, *, remove: bool) -> None:
        found = self._open.pop(kernel, None)
        self._count()
        if found is None:
            return
        found.server.should_exit = True
        with contextlib.suppress(Exception):
            await found.task
        if remove:
            found.path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                found.path.parent.rmdir()

    async def close_all(self, *, remove: bool) -> None:
        """`remove` where the kernels have ended; those that go on find the next guard's sockets in the same places."""
        await asyncio.gather(*(self._close(kernel, remove=remove) for kernel in list(self._open)))

    def _count(self) -> None:
        self._guard.kernels.registered = len(self._open)


def _listen_for_kernel(path: Path, uid: int) -> socket.socket:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    found = path.parent.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise ForbiddenError("The place of a kernel's socket belongs to somebody else.")
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)
    if os.geteuid() == 0:
        os.chown(path, uid, uid)
        # The kernel may enter the directory, and not write there: the socket can't be replaced.
        os.chown(path.parent, 0, uid)
        path.parent.chmod(0o710)
    # Listening before its path is told: the kernel may connect before the server's task has run.
    listener.listen(128)
    listener.setblocking(False)
    return listener
