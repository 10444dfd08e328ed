"""The audit log's routes: for owners and admins, over HTTPS alone."""

from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Depends, Query, Response

from cloister_data.audit import LEAVES_MEDIA_TYPE, AuditSearch
from cloister_data.checkpoint import MAX_SIZE
from cloister_guard.guard import Guard
from cloister_guard.http.messages import answer, reads, takes
from cloister_guard.identity import Caller


def make_router(guard: Guard, who: object) -> APIRouter:
    """`who` is the dependency that gives the Caller."""
    router = APIRouter(prefix="/api/v1/audit")

    @router.get("/leaves")
    async def leaves(
        caller: Annotated[Caller, Depends(who)], start: Annotated[int, Query(ge=0, le=MAX_SIZE)] = 0
    ) -> Response:
        lines = await anyio.to_thread.run_sync(guard.audit.leaves, caller, start)
        return Response(lines, media_type=LEAVES_MEDIA_TYPE, headers={"Cache-Control": "no-store"})

    @router.get("/names")
    async def names(
        caller: Annotated[Caller, Depends(who)], after: Annotated[str, Query(pattern=r"^([0-9a-f]{64})?$")] = ""
    ) -> Response:
        return answer(await anyio.to_thread.run_sync(guard.audit.names, caller, after))

    @router.post("/search", openapi_extra=takes(AuditSearch))
    async def search(
        caller: Annotated[Caller, Depends(who)], wanted: Annotated[AuditSearch, Depends(reads(AuditSearch))]
    ) -> Response:
        return answer(await anyio.to_thread.run_sync(guard.audit.search, caller, wanted))

    return router
