"""The scientist's routes: the only ones on a kernel's socket, and offered over HTTPS too."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Depends, Path, Request, Response
from starlette.responses import StreamingResponse

from cloister_data.accounts import AccountList
from cloister_data.base import Wire
from cloister_data.events import Event
from cloister_data.identity import WhoAmI
from cloister_data.requests import BudgetRequest
from cloister_data.statistics import QueryCostRequest, QueryRequest
from cloister_data.training import MAX_MODEL_BYTES, EvaluationRequest, TrainingPlan, TrainingRequest
from cloister_guard.guard import VERSION, Guard
from cloister_guard.http.messages import answer, body_bytes, reads, takes
from cloister_guard.identity import Caller

Id = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$")]
DigestPath = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]


def make_router(guard: Guard, who: object) -> APIRouter:
    """`who` is the dependency that gives the Caller: a bearer token's, or the socket's."""
    router = APIRouter(prefix="/api/v1")

    @router.get("/me")
    async def me(caller: Annotated[Caller, Depends(who)]) -> Response:
        return answer(
            WhoAmI(
                user=caller.user,
                role=caller.role,
                cloister=guard.config.name,
                simulated=guard.evidence.simulated,
                version=VERSION,
                sandbox=caller.sandbox,
            )
        )

    @router.get("/datasets")
    async def datasets(caller: Annotated[Caller, Depends(who)]) -> Response:
        return answer(await anyio.to_thread.run_sync(guard.catalogue.list, caller))

    @router.get("/datasets/{owner}/{name}")
    async def dataset(owner: Name, name: Name, caller: Annotated[Caller, Depends(who)]) -> Response:
        return answer(await anyio.to_thread.run_sync(guard.catalogue.show, caller, f"{owner}/{name}"))

    @router.get("/accounts")
    async def accounts(caller: Annotated[Caller, Depends(who)]) -> Response:
        return answer(AccountList(accounts=tuple(await guard.accounts(caller))))

    @router.get("/accounts/history")
    async def histories(caller: Annotated[Caller, Depends(who)]) -> Response:
        return answer(await guard.histories(caller))

    @router.post("/queries/cost", openapi_extra=takes(QueryCostRequest))
    async def query_cost(
        caller: Annotated[Caller, Depends(who)], request: Annotated[QueryCostRequest, Depends(reads(QueryCostRequest))]
    ) -> Response:
        return answer(await guard.refusals.counted(caller, request, lambda: guard.answers.cost(caller, request)))

    @router.post("/queries", openapi_extra=takes(QueryRequest))
    async def query(
        caller: Annotated[Caller, Depends(who)], request: Annotated[QueryRequest, Depends(reads(QueryRequest))]
    ) -> Response:
        work = guard.refusals.counted(caller, request, lambda: guard.answers.query(caller, request))
        return answer(await guard.paid(work))

    @router.post("/models", status_code=201, openapi_extra=takes(media_type="application/vnd.cloister.model"))
    async def models(caller: Annotated[Caller, Depends(who)], request: Request) -> Response:
        async with guard.large_bodies[caller.user]:
            body = await body_bytes(request, MAX_MODEL_BYTES)
            return answer(await anyio.to_thread.run_sync(guard.models.add, caller.user, body), 201)

    @router.post("/jobs/cost", openapi_extra=takes(TrainingPlan))
    async def job_cost(
        caller: Annotated[Caller, Depends(who)], plan: Annotated[TrainingPlan, Depends(reads(TrainingPlan))]
    ) -> Response:
        return answer(await guard.refusals.counted(caller, plan, lambda: guard.jobs.cost(caller, plan)))

    @router.post("/rehearsals", openapi_extra=takes(TrainingPlan))
    async def rehearse(
        caller: Annotated[Caller, Depends(who)], plan: Annotated[TrainingPlan, Depends(reads(TrainingPlan))]
    ) -> Response:
        return answer(await guard.refusals.counted(caller, plan, lambda: guard.jobs.rehearse(caller, plan)))

    @router.post("/jobs", status_code=201, openapi_extra=takes(TrainingRequest))
    async def submit(
        caller: Annotated[Caller, Depends(who)], request: Annotated[TrainingRequest, Depends(reads(TrainingRequest))]
    ) -> Response:
        work = guard.refusals.counted(caller, request, lambda: guard.jobs.submit(caller, request))
        return answer(await guard.paid(work), 201)

    @router.get("/jobs")
    async def jobs(caller: Annotated[Caller, Depends(who)]) -> Response:
        return answer(await guard.jobs.list(caller))

    @router.get("/jobs/{job}")
    async def job(job: Id, caller: Annotated[Caller, Depends(who)]) -> Response:
        return answer(await guard.jobs.view(caller, job))

    @router.delete("/jobs/{job}")
    async def cancel(job: Id, caller: Annotated[Caller, Depends(who)]) -> Response:
        return answer(await guard.paid(guard.jobs.cancel(caller, job)))

    @router.get("/jobs/{job}/result")
    async def result(job: Id, caller: Annotated[Caller, Depends(who)]) -> Response:
        weights = await guard.jobs.result(caller, job)
        return Response(weights, media_type="application/octet-stream", headers={"Cache-Control": "no-store"})

    @router.post("/evaluations", openapi_extra=takes(EvaluationRequest))
    async def evaluate(
        caller: Annotated[Caller, Depends(who)],
        request: Annotated[EvaluationRequest, Depends(reads(EvaluationRequest))],
    ) -> Response:
        work = guard.refusals.counted(caller, request, lambda: guard.answers.evaluate(caller, request))
        return answer(await guard.paid(work))

    @router.get("/releases")
    async def releases(caller: Annotated[Caller, Depends(who)]) -> Response:
        return answer(await guard.answers.history(caller))

    @router.get("/releases/{release}")
    async def release(release: Id, caller: Annotated[Caller, Depends(who)]) -> Response:
        return answer(await guard.answers.release(caller, release))

    @router.get("/audit/checkpoint")
    async def checkpoint(caller: Annotated[Caller, Depends(who)]) -> Response:
        return answer(await anyio.to_thread.run_sync(guard.audit.state))

    @router.get("/audit/evidence/{digest}")
    async def evidence(digest: DigestPath, caller: Annotated[Caller, Depends(who)]) -> Response:
        return answer(await anyio.to_thread.run_sync(guard.audit.evidence, digest))

    @router.post("/requests", status_code=201, openapi_extra=takes(BudgetRequest))
    async def ask(
        caller: Annotated[Caller, Depends(who)], request: Annotated[BudgetRequest, Depends(reads(BudgetRequest))]
    ) -> Response:
        return answer(await guard.paid(guard.ask_for_budget(caller, request)), 201)

    @router.get("/requests")
    async def requests(caller: Annotated[Caller, Depends(who)]) -> Response:
        return answer(await anyio.to_thread.run_sync(guard.requests.list, caller))

    @router.get("/events")
    async def events(request: Request, caller: Annotated[Caller, Depends(who)]) -> Response:
        last = request.headers.get("last-event-id")
        stream = _while_signed_in(guard, caller, guard.events.listen(caller.user, last[:64] if last else None))
        return StreamingResponse(
            _server_sent(stream), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )

    return router


async def _while_signed_in(
    guard: Guard, caller: Caller, stream: AsyncGenerator[Event | None, None]
) -> AsyncGenerator[Event | None, None]:
    """A stream outlives the request that began it: each event is for a session that still holds."""
    async with contextlib.aclosing(stream):
        async for event in stream:
            if not await anyio.to_thread.run_sync(guard.identity.signed_in, caller):
                return
            yield event


async def _server_sent(stream: AsyncIterator[Event | None]) -> AsyncIterator[bytes]:
    """Events in the text/event-stream form (WHATWG HTML, 9.2); a comment where there is nothing to say."""
    yield b": cloister\n\n"
    async for event in stream:
        if event is None:
            yield b": alive\n\n"
        else:
            yield f"id: {event.id}\nevent: {event.body.kind}\ndata: {_line(event)}\n\n".encode()


def _line(message: Wire) -> str:
    return message.model_dump_json()
