"""The routes by which a kernel's owner moves files to and from its home. HTTPS only: the kernel's socket has none."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

from cloister_data.errors import InvalidRequestError
from cloister_data.transfers import Direction, TransferQuery, TransferRequest, fault_of_path
from cloister_guard.guard import Guard
from cloister_guard.http.messages import STALLED_SECONDS, answer, body_chunks, takes
from cloister_guard.http.scientist import Id
from cloister_guard.identity import Caller
from cloister_guard.transfers import Spool

CHUNK = 1 << 20
SLOWEST = 1 << 16
"""Bytes a second, on the whole: a file that waits here for its laptop keeps a place that others want."""


def make_router(guard: Guard, who: Any) -> APIRouter:
    router = APIRouter(prefix="/api/v1/kernels/{kernel}")

    @router.get("/files")
    async def terms(kernel: Id, caller: Annotated[Caller, Depends(who)]) -> Response:
        query = TransferQuery(kernel=kernel)
        return answer(await guard.refusals.counted(caller, query, lambda: guard.transfers.terms(caller, kernel)))

    @router.put("/files/{path:path}", openapi_extra=takes(media_type="application/octet-stream"))
    async def put(kernel: Id, path: str, caller: Annotated[Caller, Depends(who)], request: Request) -> Response:
        asked = _asked("put", kernel, path)
        length = request.headers.get("content-length", "")
        if not length.isdecimal() or len(length) > 15:
            raise InvalidRequestError("A file's length has to be said first.", next_step="Send a Content-Length.")
        body = body_chunks(request)
        work = guard.refusals.counted(caller, asked, lambda: guard.transfers.put(caller, asked, int(length), body))
        return answer(await work)

    @router.get("/files/{path:path}", response_class=Response)
    async def get(kernel: Id, path: str, caller: Annotated[Caller, Depends(who)]) -> Response:
        asked = _asked("get", kernel, path)
        return _Kept(await guard.refusals.counted(caller, asked, lambda: guard.transfers.get(caller, asked)))

    return router


def _asked(direction: Direction, kernel: str, path: str) -> TransferRequest:
    try:
        return TransferRequest(direction=direction, kernel=kernel, path=path)
    except ValidationError:
        raise InvalidRequestError("This can't be a file's path.", why=fault_of_path(path)) from None


class _Kept(Response):
    """A file as the answer; it is gone afterwards. A client that doesn't read on loses it."""

    def __init__(self, spool: Spool) -> None:
        super().__init__(media_type="application/octet-stream")
        self.headers["content-length"] = str(spool.size)
        self.headers["cache-control"] = "no-store"
        self._spool = spool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with asyncio.timeout(STALLED_SECONDS + self._spool.size / SLOWEST):
                async for chunk in self._chunks():
                    async with asyncio.timeout(STALLED_SECONDS):
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await self._spool.close()

    async def _chunks(self) -> AsyncIterator[bytes]:
        while chunk := await self._spool.read(CHUNK):
            yield chunk
