"""The routes that only HTTPS offers: evidence, signing in, kernels, and what owners and admins do."""

from typing import Annotated, Literal

import anyio.to_thread
from fastapi import APIRouter, Depends, Request, Response, WebSocket
from starlette.websockets import WebSocketState

from cloister_attest.evidence import AttestRequest
from cloister_data.consistency import ConsistencyRequest
from cloister_data.datasets import MAX_UPLOAD_BYTES
from cloister_data.errors import CloisterError, SessionExpiredError
from cloister_data.framing import MAX_HEAD
from cloister_data.identity import LoginRequest, NewUser
from cloister_data.kernels import KernelLaunch
from cloister_data.policy import Policy, SignedPolicy
from cloister_data.requests import BudgetAnswer
from cloister_data.terms import SignedGap, TermsRequest
from cloister_data.witness import SignedCall
from cloister_guard.guard import Guard
from cloister_guard.http.messages import answer, body_bytes, problem_response, reads, takes
from cloister_guard.http.scientist import Id, Name
from cloister_guard.identity import Caller
from cloister_guard.kernels import SUBPROTOCOL


def bearer(guard: Guard) -> object:
    """The dependency that finds the caller behind `Authorization: Bearer`."""

    async def who(request: Request) -> Caller:
        return await _authenticate(guard, request.headers.get("authorization"))

    return who


async def _authenticate(guard: Guard, header: str | None) -> Caller:
    scheme, _, token = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not 16 <= len(token) <= 256:
        raise SessionExpiredError("You are not signed in.", next_step="Sign in: cloister connect URL --trust FILE.")
    return await anyio.to_thread.run_sync(guard.identity.authenticate, token)


def make_router(guard: Guard) -> APIRouter:
    router = APIRouter()
    who = bearer(guard)

    @router.post("/.well-known/attest", openapi_extra=takes(AttestRequest))
    async def attest(request: Annotated[AttestRequest, Depends(reads(AttestRequest))]) -> Response:
        return answer(await guard.show_evidence(request.nonce))

    @router.post("/.well-known/consistency", openapi_extra=takes(ConsistencyRequest))
    async def consistency(request: Annotated[ConsistencyRequest, Depends(reads(ConsistencyRequest))]) -> Response:
        return answer(await anyio.to_thread.run_sync(guard.evidence.consistency, request))

    @router.post("/api/v1/login", openapi_extra=takes(LoginRequest))
    async def login(request: Annotated[LoginRequest, Depends(reads(LoginRequest))]) -> Response:
        async with guard.login_slots:
            return answer(await anyio.to_thread.run_sync(guard.identity.login, request))

    @router.post("/api/v1/logout", status_code=204)
    async def logout(caller: Annotated[Caller, Depends(who)]) -> Response:
        await anyio.to_thread.run_sync(guard.identity.logout, caller)
        return Response(status_code=204)

    @router.post("/api/v1/kernels", status_code=201, openapi_extra=takes(KernelLaunch))
    async def start_kernel(
        caller: Annotated[Caller, Depends(who)], launch: Annotated[KernelLaunch, Depends(reads(KernelLaunch))]
    ) -> Response:
        caller.require("scientist")
        return answer(await guard.start_kernel(caller, launch), 201)

    @router.get("/api/v1/kernels")
    async def list_kernels(caller: Annotated[Caller, Depends(who)]) -> Response:
        return answer(await guard.kernels.list(caller))

    @router.get("/api/v1/kernels/{kernel}")
    async def show_kernel(kernel: Id, caller: Annotated[Caller, Depends(who)]) -> Response:
        return answer(await guard.kernels.signal(caller, kernel, "state"))

    @router.post("/api/v1/kernels/{kernel}/{action}")
    async def signal_kernel(
        kernel: Id, action: Literal["interrupt"], caller: Annotated[Caller, Depends(who)]
    ) -> Response:
        return answer(await guard.kernels.signal(caller, kernel, action))

    @router.delete("/api/v1/kernels/{kernel}")
    async def end_kernel(kernel: Id, caller: Annotated[Caller, Depends(who)]) -> Response:
        return answer(await guard.kernels.signal(caller, kernel, "end"))

    @router.delete("/api/v1/home")
    async def wipe_home(caller: Annotated[Caller, Depends(who)]) -> Response:
        caller.require("scientist")
        return answer(await guard.kernels.wipe_home(caller))

    @router.websocket("/api/v1/kernels/{kernel}/channels")
    async def channels(websocket: WebSocket, kernel: str) -> None:
        try:
            caller = await _authenticate(guard, websocket.headers.get("authorization"))
            if SUBPROTOCOL not in websocket.scope.get("subprotocols", []):
                raise SessionExpiredError("The websocket doesn't speak this kernel protocol.")
            await guard.kernels.splice(caller, kernel, websocket)
        except CloisterError as error:
            if websocket.application_state is WebSocketState.CONNECTING:
                await websocket.send_denial_response(problem_response(error, websocket.scope))

    @router.post("/api/v1/datasets", status_code=201, openapi_extra=takes(media_type="application/vnd.cloister.upload"))
    async def upload(caller: Annotated[Caller, Depends(who)], request: Request) -> Response:
        caller.require("owner")
        async with guard.large_bodies[caller.user]:
            body = await body_bytes(request, MAX_UPLOAD_BYTES + MAX_HEAD)
            slots = guard.upload_slots
            return answer(await anyio.to_thread.run_sync(guard.catalogue.upload, caller, body, limiter=slots), 201)

    @router.get("/api/v1/datasets/{owner}/{name}/policy")
    async def policy(owner: Name, name: Name, caller: Annotated[Caller, Depends(who)]) -> Response:
        return answer(await anyio.to_thread.run_sync(guard.catalogue.policy, caller, f"{owner}/{name}"))

    @router.put("/api/v1/datasets/{owner}/{name}/policy", openapi_extra=takes(SignedPolicy))
    async def set_policy(
        owner: Name,
        name: Name,
        caller: Annotated[Caller, Depends(who)],
        signed: Annotated[SignedPolicy, Depends(reads(SignedPolicy))],
    ) -> Response:
        return answer(await guard.paid(guard.set_policy(caller, f"{owner}/{name}", signed)))

    @router.post("/api/v1/datasets/{owner}/{name}/what-if", openapi_extra=takes(Policy))
    async def what_if(
        owner: Name,
        name: Name,
        caller: Annotated[Caller, Depends(who)],
        draft: Annotated[Policy, Depends(reads(Policy))],
    ) -> Response:
        return answer(await guard.what_if(caller, f"{owner}/{name}", draft))

    @router.post("/api/v1/requests/{request}/answer", openapi_extra=takes(BudgetAnswer))
    async def answer_request(
        request: Id,
        caller: Annotated[Caller, Depends(who)],
        given: Annotated[BudgetAnswer, Depends(reads(BudgetAnswer))],
    ) -> Response:
        return answer(await guard.paid(guard.answer_request(caller, request, given)))

    @router.get("/api/v1/owner")
    async def owner(caller: Annotated[Caller, Depends(who)]) -> Response:
        return answer(await anyio.to_thread.run_sync(guard.owners.view, caller))

    @router.put("/api/v1/owner", openapi_extra=takes(TermsRequest))
    async def set_terms(
        caller: Annotated[Caller, Depends(who)], request: Annotated[TermsRequest, Depends(reads(TermsRequest))]
    ) -> Response:
        return answer(await anyio.to_thread.run_sync(guard.owners.set_terms, caller, request))

    @router.post("/api/v1/owner/restore", openapi_extra=takes(SignedGap))
    async def accept_restore(
        caller: Annotated[Caller, Depends(who)], signed: Annotated[SignedGap, Depends(reads(SignedGap))]
    ) -> Response:
        return answer(await anyio.to_thread.run_sync(guard.owners.accept, caller, signed))

    @router.post("/api/v1/witness", openapi_extra=takes(SignedCall))
    async def witness(signed: Annotated[SignedCall, Depends(reads(SignedCall))]) -> Response:
        return answer(await guard.witness.answer(signed))

    @router.post("/api/v1/users", status_code=201, openapi_extra=takes(NewUser))
    async def add_user(
        caller: Annotated[Caller, Depends(who)], new: Annotated[NewUser, Depends(reads(NewUser))]
    ) -> Response:
        caller.require("admin")
        return answer(await anyio.to_thread.run_sync(guard.identity.create, new), 201)

    @router.get("/api/v1/users")
    async def list_users(caller: Annotated[Caller, Depends(who)]) -> Response:
        caller.require("admin")
        return answer(await anyio.to_thread.run_sync(guard.identity.users))

    return router
