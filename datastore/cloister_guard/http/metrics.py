"""The metrics' route, for admins over HTTPS alone, and the counting of what the servers answer."""

import asyncio
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Depends, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cloister_budget.log import size
from cloister_data.errors import StorageError
from cloister_guard.guard import Guard
from cloister_guard.http.messages import PROBLEM_CODE
from cloister_guard.identity import Caller
from cloister_guard.metrics import MEDIA_TYPE, Figures, Metrics

NO_ANSWER = 0
"""Stands for the status of a request that ended without one: its client has gone."""


def make_router(guard: Guard, who: Any) -> APIRouter:
    """`who` is the dependency that gives the Caller."""
    router = APIRouter(prefix="/api/v1")
    one_at_a_time = asyncio.Lock()

    @router.get("/metrics")
    async def metrics(caller: Annotated[Caller, Depends(who)]) -> Response:
        caller.require("admin")
        async with one_at_a_time:
            text = guard.metrics.standing()
            if text is None:
                text = guard.metrics.show(await _figures(guard))
        return Response(text, media_type=MEDIA_TYPE, headers={"Cache-Control": "no-store"})

    return router


async def _figures(guard: Guard) -> Figures:
    return Figures(
        query_workers=guard.answers.workers_busy,
        job_workers=guard.jobs.workers_busy,
        jobs=guard.jobs.running,
        uploads=guard.upload_slots.borrowed_tokens,
        kernels=guard.kernels.registered,
        entries=await anyio.to_thread.run_sync(_entries, guard),
        service=guard.kernels.figures,
        service_starts=guard.kernels.services,
    )


def _entries(guard: Guard) -> int | None:
    try:
        with guard.database.read() as session:
            return size(session)
    except StorageError:
        return None


class Counted:
    """An application whose answers are counted, whatever becomes of them inside."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        status = NO_ANSWER

        async def noting(message: Message) -> None:
            nonlocal status
            kind = message["type"]
            if kind in ("http.response.start", "websocket.http.response.start"):
                status = message["status"]
            elif kind == "websocket.accept":
                status = 101
            elif kind == "websocket.close" and status == NO_ANSWER:
                status = 403
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            # The router has put the route that it found into the scope: its template is the code's, not the caller's.
            route = getattr(scope.get("route"), "path", None)
            method = scope["method"] if scope["type"] == "http" else "WEBSOCKET"
            self._metrics.answered(route, method, status, scope.get(PROBLEM_CODE))
