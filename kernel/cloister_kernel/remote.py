"""A kernel in a cloister as the laptop drives it: start, interrupt, end, and the connection that the bridge keeps."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any
from urllib.parse import quote

import httpx
import websockets.asyncio.client
from websockets.exceptions import InvalidStatus, WebSocketException
from websockets.typing import Subprotocol

import cloister.session
from cloister.session import Session
from cloister_data.errors import (
    AttestationRefusedError,
    CloisterError,
    NotFoundError,
    SessionExpiredError,
    UnavailableError,
    UnreachableError,
)
from cloister_data.framing import MAX_CHANNEL_FRAME
from cloister_data.kernels import KernelLaunch, KernelView
from cloister_data.transfers import MAX_TRANSFER_BYTES, TransferTerms, TransferView

SUBPROTOCOL = Subprotocol("cloister.kernel.v1")
SIGNAL_TIMEOUT = httpx.Timeout(connect=5, read=15, write=5, pool=5)
"""Seconds. Somebody waits: an interrupted cell, a JupyterLab that shuts down."""
LOOK_SECONDS = 5.0
"""The longest time between two looks at the proof's age: while a computer sleeps, its timers do too."""
PING_SECONDS = 10.0
"""A connection that swallows everything is given up after three times as long. Slices are small, so that a slow one
answers in time, and what it had carried counts: nothing of it is sent again.
"""
DISPLAY_NAMES = ("COLUMNS", "LINES", "TZ", "LANG", "NO_COLOR")


def display_environment(environment: dict[str, str] | None = None) -> dict[str, str]:
    """The display settings of the local environment: the only ones that travel."""
    found = os.environ if environment is None else environment
    return {name: found[name] for name in DISPLAY_NAMES if found.get(name) and len(found[name]) <= 64}


class _Channel(websockets.asyncio.client.ClientConnection):
    """Looks at the proof once more when TLS stands: who delays that would delay the token past a refusal."""

    def __init__(self, session: Session, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._session = session

    async def handshake(self, *args: Any, **options: Any) -> None:
        if (doubt := self._session.doubt) is not None:
            raise doubt
        await super().handshake(*args, **options)


class WebsocketConnection:
    """One websocket of the kernel's channel. It carries nothing, either way, once `session` is in doubt."""

    def __init__(self, websocket: websockets.asyncio.client.ClientConnection, session: Session) -> None:
        self._websocket, self._session = websocket, session

    async def send(self, data: bytes) -> None:
        self._refuse_doubt()
        try:
            await self._websocket.send(data)
        except WebSocketException as error:
            self._refuse_doubt()
            raise UnreachableError("The kernel's connection broke.", why=type(error).__name__) from error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for message in self._websocket:
                self._refuse_doubt()
                if isinstance(message, bytes):
                    yield message
            self._refuse_doubt()
        except WebSocketException as error:
            self._refuse_doubt()
            raise UnreachableError("The kernel's connection broke.", why=type(error).__name__) from error

    async def watch(self) -> None:
        """Break the connection, with all that it still holds, as soon as the session is in doubt."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(ended.set)

        forget = self._session.when_ended(tell)
        try:
            while self._session.doubt is None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(LOOK_SECONDS, max(0.01, self._session.proof_left))):
                        await ended.wait()
            # Not close(): that would first send what waits.
            self._websocket.transport.abort()
        finally:
            forget()

    def _refuse_doubt(self) -> None:
        if (doubt := self._session.doubt) is not None:
            raise doubt


class RemoteKernel:
    """One kernel of one profile's cloister. Its methods block; they are safe from several threads.

    Every call goes through a verified session. After an outage, and where the machine didn't prove itself again in
    time, the cloister is verified anew before anything is sent. What is in doubt is the machine: the kernel there is
    left alone, and goes on when the machine is proven.
    """

    def __init__(self, profile: str) -> None:
        self.profile = profile
        self.view: KernelView | None = None
        self._session: Session | None = None
        self._lock = threading.Lock()

    @property
    def identifier(self) -> str:
        if self.view is None:
            raise NotFoundError("The kernel hasn't been started.")
        return self.view.kernel

    def start(self, environment: dict[str, str] | None = None) -> KernelView:
        """Ask the cloister for a kernel. Raises CloisterError."""
        session = self.session()
        launch = KernelLaunch(
            verdict=session.verdict.to_json().decode(),
            environment=display_environment(environment),
            home_key=session.profile.home_key(),
        )
        self.view = session.transport.call("POST", "/api/v1/kernels", send=launch, receive=KernelView)
        return self.view

    def adopt(self, identifier: str) -> KernelView:
        """Take over a kernel that runs already. Raises NotFoundError where it doesn't."""
        self.view = self.session().transport.call("GET", f"/api/v1/kernels/{identifier}", receive=KernelView)
        return self.view

    def interrupt(self) -> KernelView:
        return self._call("POST", f"/api/v1/kernels/{self.identifier}/interrupt")

    def end(self) -> KernelView:
        """Kill the kernel. Raises NotFoundError where it is gone already."""
        return self._call("DELETE", f"/api/v1/kernels/{self.identifier}")

    def transfer_terms(self) -> TransferTerms:
        """What may be moved. Raises PolicyRefusedError where an owner forbids it."""
        return self.session().transport.call("GET", f"/kernels/{self.identifier}/files", receive=TransferTerms)

    def put_file(self, path: str, chunks: Iterable[bytes], size: int) -> TransferView:
        """A file of `size` bytes into the kernel's home. Where `chunks` raises, nothing of it remains there."""
        return self.session().transport.upload(self._file(path), chunks, size, TransferView)

    @contextmanager
    def get_file(self, path: str) -> Iterator[tuple[int, Iterator[bytes]]]:
        """(size, the bytes as they come) of a file in the kernel's home."""
        with self.session().transport.download(self._file(path), MAX_TRANSFER_BYTES) as found:
            yield found

    def _file(self, path: str) -> str:
        return f"/kernels/{self.identifier}/files/{quote(path)}"

    def _call(self, method: str, path: str) -> KernelView:
        """One call; where the connection or the machine's identity changed, once more over a new session."""
        try:
            return self.session().transport.call(method, path, receive=KernelView, timeout=SIGNAL_TIMEOUT)
        except (UnreachableError, SessionExpiredError, AttestationRefusedError):
            self.renew()
            return self.session().transport.call(method, path, receive=KernelView, timeout=SIGNAL_TIMEOUT)

    def session(self) -> Session:
        """The verified session, opened where there is none, and anew where the one that was is in doubt."""
        with self._lock:
            if self._session is not None and self._session.doubt is not None:
                self._session.close()
                self._session = None
            if self._session is None:
                self._session = cloister.session.open(self.profile)
            return self._session

    def renew(self) -> None:
        """Forget the session: the next use verifies the cloister again."""
        with self._lock:
            if self._session is not None:
                self._session.close()
            self._session = None

    def close(self) -> None:
        self.renew()

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[WebsocketConnection]:
        """The channel's websocket, over the verified session's pinned TLS. Raises CloisterError."""
        session = await asyncio.to_thread(self.session)
        token = session.token
        if (doubt := session.doubt) is not None:
            raise doubt
        try:
            websocket = await websockets.asyncio.client.connect(
                session.websocket_url(f"/api/v1/kernels/{self.identifier}/channels"),
                ssl=session.ssl_context,
                additional_headers={"Authorization": f"Bearer {token}"},
                subprotocols=[SUBPROTOCOL],
                compression=None,
                max_size=MAX_CHANNEL_FRAME,
                open_timeout=20,
                ping_interval=PING_SECONDS,
                ping_timeout=2 * PING_SECONDS,
                close_timeout=2,
                proxy=None,
                create_connection=partial(_Channel, session),  # type: ignore[arg-type]
            )
        except InvalidStatus as error:
            await asyncio.to_thread(self.renew)
            raise _refusal(error.response.status_code) from error
        except (OSError, WebSocketException, TimeoutError) as error:
            # The guard may have restarted with another key: verify it anew before the next attempt.
            await asyncio.to_thread(self.renew)
            raise UnreachableError("The cloister can't be reached.", why=f"{type(error).__name__}: {error}") from error
        connection = WebsocketConnection(websocket, session)
        watch = asyncio.create_task(connection.watch())
        try:
            if websocket.subprotocol != SUBPROTOCOL:
                raise UnavailableError("The cloister speaks another version of the kernel's channel.")
            yield connection
        finally:
            watch.cancel()
            try:
                if session.doubt is None:
                    await websocket.close()
            finally:
                # Also where the bridge is stopped while the other side takes its time to say goodbye.
                websocket.transport.abort()
                await websocket.wait_closed()


def _refusal(status: int) -> CloisterError:
    if status == 404:
        return NotFoundError(
            "The kernel is gone.",
            why="The cloister's kernel service has restarted, or no laptop was there for too long.",
        )
    if status in (401, 403):
        return SessionExpiredError(
            "Your session at the cloister has ended.", next_step="Sign in again: cloister connect URL --trust FILE."
        )
    return UnreachableError("The cloister refused the kernel's channel.", why=f"HTTP {status}")
