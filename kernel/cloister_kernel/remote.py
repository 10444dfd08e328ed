"""A kernel in a cloister as the laptop drives it: start, interrupt, end, and the connection that the bridge keeps."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

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

SUBPROTOCOL = Subprotocol("cloister.kernel.v1")
SIGNAL_TIMEOUT = httpx.Timeout(connect=5, read=15, write=5, pool=5)
"""Seconds. Somebody waits: an interrupted cell, a JupyterLab that shuts down."""
DISPLAY_NAMES = ("COLUMNS", "LINES", "TZ", "LANG", "NO_COLOR")


def display_environment(environment: dict[str, str] | None = None) -> dict[str, str]:
    """The display settings of the local environment: the only ones that travel."""
    found = os.environ if environment is None else environment
    return {name: found[name] for name in DISPLAY_NAMES if found.get(name) and len(found[name]) <= 64}


class WebsocketConnection:
    """One websocket of the kernel's channel."""

    def __init__(self, websocket: websockets.asyncio.client.ClientConnection) -> None:
        self._websocket = websocket

    async def send(self, data: bytes) -> None:
        try:
            await self._websocket.send(data)
        except WebSocketException as error:
            raise UnreachableError("The kernel's connection broke.", why=type(error).__name__) from error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for message in self._websocket:
                if isinstance(message, bytes):
                    yield message
        except WebSocketException as error:
            raise UnreachableError("The kernel's connection broke.", why=type(error).__name__) from error


class RemoteKernel:
    """One kernel of one profile's cloister. Its methods block; they are safe from several threads.

    Every call goes through a verified session; after an outage the cloister is verified anew before anything is sent.
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
        launch = KernelLaunch(verdict=session.verdict.to_json().decode(), environment=display_environment(environment))
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

    def _call(self, method: str, path: str) -> KernelView:
        """One call; where the connection or the machine's identity changed, once more over a new session."""
        try:
            return self.session().transport.call(method, path, receive=KernelView, timeout=SIGNAL_TIMEOUT)
        except (UnreachableError, SessionExpiredError, AttestationRefusedError):
            self.renew()
            return self.session().transport.call(method, path, receive=KernelView, timeout=SIGNAL_TIMEOUT)

    def session(self) -> Session:
        """The verified session, opened where there is none."""
        with self._lock:
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
        try:
            websocket = await websockets.asyncio.client.connect(
                session.websocket_url(f"/api/v1/kernels/{self.identifier}/channels"),
                ssl=session.ssl_context,
                additional_headers={"Authorization": f"Bearer {session.token}"},
                subprotocols=[SUBPROTOCOL],
                compression=None,
                max_size=MAX_CHANNEL_FRAME,
                open_timeout=20,
                ping_interval=20,
                ping_timeout=40,
                close_timeout=2,
                proxy=None,
            )
        except InvalidStatus as error:
            await asyncio.to_thread(self.renew)
            raise _refusal(error.response.status_code) from error
        except (OSError, WebSocketException, TimeoutError) as error:
            # The guard may have restarted with another key: verify it anew before the next attempt.
            await asyncio.to_thread(self.renew)
            raise UnreachableError("The cloister can't be reached.", why=f"{type(error).__name__}: {error}") from error
        try:
            if websocket.subprotocol != SUBPROTOCOL:
                raise UnavailableError("The cloister speaks another version of the kernel's channel.")
            yield WebsocketConnection(websocket)
        finally:
            await websocket.close()


def _refusal(status: int) -> CloisterError:
    if status == 404:
        return NotFoundError(
            "The kernel is gone.", why="The cloister or its kernel service has restarted, or it was idle for too long."
        )
    if status in (401, 403):
        return SessionExpiredError(
            "Your session at the cloister has ended.", next_step="Sign in again: cloister connect URL --trust FILE."
        )
    return UnreachableError("The cloister refused the kernel's channel.", why=f"HTTP {status}")
