"""A small TLS server in the guard's place: kernel routes and the websocket splice, over a real kernel service.

It runs in a thread of its own. `cut()` breaks every channel, `black_hole()` keeps new ones from being made.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self, TypeVar

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response, WebSocket
from starlette.websockets import WebSocketDisconnect

from cloister.transport import Transport
from cloister_attest.channel import make_server_identity, pinned_context
from cloister_data.base import Wire
from cloister_data.errors import CloisterError, NotFoundError, from_problem
from cloister_data.framing import MAX_CHANNEL_FRAME, frame_length, pack_frame
from cloister_data.kernels import (
    KernelAnswer,
    KernelAttach,
    KernelLaunch,
    KernelQuery,
    KernelSignal,
    KernelStart,
)
from tests.fakes.guard_control import FakeControl

USER = "scientist"
R = TypeVar("R", bound="KernelRelay")


class FakeVerdict(Wire):
    platform: str = "simulated"


class FakeProfile:
    """`key` opens the home; "" asks for one that isn't kept."""

    def __init__(self, key: str) -> None:
        self._key = key

    def home_key(self) -> str:
        return self._key


class FakeSession:
    """What the provisioner uses of `cloister.session.Session`."""

    def __init__(self, url: str, token: str, certificate_der: bytes, home_key: str = "") -> None:
        self.ssl_context = pinned_context(certificate_der)
        headers = {"Authorization": f"Bearer {token}"}
        self.client = httpx.Client(base_url=url, verify=self.ssl_context, trust_env=False, headers=headers)
        self.transport = Transport(self.client)
        self.verdict = FakeVerdict()
        self.token = token
        self.profile = FakeProfile(home_key)
        self.doubt = None
        self.proof_left = 3600.0
        self._url = url

    def when_ended(self, _listener: Callable[[], None]) -> Callable[[], None]:
        return lambda: None

    def websocket_url(self, path: str) -> str:
        return self._url.replace("https", "wss") + path

    def close(self) -> None:
        self.client.close()


class KernelRelay:
    def __init__(self, directory: Path, *options: str) -> None:
        self.directory = directory
        self.token = secrets.token_hex(16)
        self.identity = make_server_identity()
        self.url = ""
        self.home_key = ""
        self.launches: list[KernelLaunch] = []
        self.service_socket = directory / "kernels.sock"
        self.control = FakeControl(directory / "control.sock", directory / "g")
        self.reachable = True
        self.connections = 0
        self._splices: set[asyncio.Task[None]] = set()
        self._options = options
        self.service: subprocess.Popen[bytes] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)

    def session(self, _profile: object = None, **_: object) -> FakeSession:
        return FakeSession(self.url, self.token, self.identity.certificate_der, self.home_key)

    def __enter__(self) -> Self:
        (self.directory / "g").mkdir(mode=0o711)
        self._thread.start()
        assert self._ready.wait(20)
        self.start_service()
        return self

    def start_service(self) -> None:
        """Also after the service was killed."""
        self.service_socket.unlink(missing_ok=True)
        self.service = subprocess.Popen(
            [
                *(sys.executable, "-m", "cloister_kernel.service", "--die-with-parent"),
                *("--socket", self.service_socket, "--control", self.control.path),
                *("--vault", self.directory / "vault", "--runtime", self.directory),
                *self._options,
            ],
            stdin=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 20
        while not self.service_socket.exists():
            assert self.service.poll() is None, "the kernel service ended"
            assert time.monotonic() < deadline, "the kernel service doesn't listen"
            time.sleep(0.02)

    def __exit__(self, *_: object) -> None:
        assert self.service is not None
        assert self._loop is not None
        self.service.send_signal(signal.SIGTERM)
        try:
            assert self.service.wait(20) == 0
        finally:
            self.service.kill()
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10)

    def cut(self) -> None:
        """Break every channel now, between two bytes."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in self._splices])

    @contextlib.contextmanager
    def black_hole(self) -> Iterator[None]:
        self.reachable = False
        self.cut()
        yield
        self.reachable = True

    def protocols(self) -> dict[str, type[asyncio.Protocol]]:
        """Others than uvicorn's own."""
        return {}

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        # With the protocol named, or asyncio leaves Nagle on: 40 ms a message.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.bind(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            self._app(),
            log_config=None,
            lifespan="off",
            ws_max_size=MAX_CHANNEL_FRAME,
            ws_per_message_deflate=False,
            timeout_graceful_shutdown=2,
            ssl_context_factory=lambda *_: self.identity.context_for_server,
            **self.protocols(),
        )
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
        async with self.control:
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            while not server.started:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            self._ready.set()
            await self._stop.wait()
            for task in self._splices:
                task.cancel()
            server.should_exit = True
            await serving
        listener.close()

    async def _order(self, order: Wire) -> KernelAnswer:
        reader, writer = await asyncio.open_unix_connection(self.service_socket)
        try:
            return await _ask(reader, writer, order)
        finally:
            writer.close()

    def _app(self) -> FastAPI:
        app = FastAPI()

        async def answer(request: Request, order: Wire, status: int = 200) -> Response:
            if request.headers.get("authorization") != f"Bearer {self.token}":
                return Response(status_code=401)
            try:
                found = await self._order(order)
            except CloisterError as error:
                problem = error.to_problem()
                return Response(problem.to_json(), problem.status, media_type="application/problem+json")
            body = found.kernel or found.kernels
            assert body is not None
            return Response(body.to_json(), status, media_type="application/json")

        @app.post("/api/v1/kernels")
        async def start(request: Request) -> Response:
            launch = KernelLaunch.from_json(await request.body())
            self.launches.append(launch)
            return await answer(request, KernelStart(user=USER, launch=launch), 201)

        @app.get("/api/v1/kernels")
        async def listing(request: Request) -> Response:
            return await answer(request, KernelQuery(user=USER))

        @app.get("/api/v1/kernels/{kernel}")
        async def show(kernel: str, request: Request) -> Response:
            return await answer(request, KernelSignal(op="state", kernel=kernel))

        @app.post("/api/v1/kernels/{kernel}/interrupt")
        async def interrupt(kernel: str, request: Request) -> Response:
            return await answer(request, KernelSignal(op="interrupt", kernel=kernel))

        @app.delete("/api/v1/kernels/{kernel}")
        async def end(kernel: str, request: Request) -> Response:
            return await answer(request, KernelSignal(op="end", kernel=kernel))

        @app.websocket("/api/v1/kernels/{kernel}/channels")
        async def channels(websocket: WebSocket, kernel: str) -> None:
            if not self.reachable:
                await websocket.send_denial_response(Response(status_code=503))
                return
            reader, writer = await asyncio.open_unix_connection(self.service_socket)
            try:
                await _ask(reader, writer, KernelAttach(kernel=kernel))
            except NotFoundError:
                writer.close()
                await websocket.send_denial_response(Response(status_code=404))
                return
            pumps: set[asyncio.Task[None]] = set()
            try:
                await websocket.accept(subprotocol="cloister.kernel.v1")
                self.connections += 1
                pumps |= {asyncio.create_task(_out(websocket, writer)), asyncio.create_task(_back(websocket, reader))}
                self._splices |= pumps
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in pumps:
                    task.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
                self._splices -= pumps
                writer.close()
                with contextlib.suppress(RuntimeError, WebSocketDisconnect):
                    await websocket.close()

        return app


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, order: Wire) -> KernelAnswer:
    writer.write(pack_frame(order.to_json()))
    answer = KernelAnswer.from_json(await reader.readexactly(frame_length(await reader.readexactly(4), 1 << 20)))
    if answer.problem is not None:
        raise from_problem(answer.problem)
    return answer


async def _out(websocket: WebSocket, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(WebSocketDisconnect, OSError):
        while True:
            writer.write(pack_frame(await websocket.receive_bytes()))
            await writer.drain()


async def _back(websocket: WebSocket, reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(WebSocketDisconnect, OSError, EOFError):
        while True:
            length = frame_length(await reader.readexactly(4), MAX_CHANNEL_FRAME)
            await websocket.send_bytes(await reader.readexactly(length))


@contextlib.contextmanager
def running_relay(*options: str, kind: type[R] = KernelRelay) -> Iterator[R]:  # type: ignore[assignment]
    """A relay and its kernel service in a short directory that is removed afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="cl-"))
    os.chmod(directory, 0o711)
    try:
        with kind(directory, *options) as relay:
            yield relay
    finally:
        shutil.rmtree(directory, ignore_errors=True)
