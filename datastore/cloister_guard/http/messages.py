"""Bodies in, answers and problems out. Bodies are read to a stated limit and parsed from their bytes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from cloister_data.base import Wire
from cloister_data.errors import CloisterError, InvalidRequestError, NotFoundError, TooLargeError
from cloister_guard.http import unambiguous
from cloister_guard.release import problem

PROBLEM = "application/problem+json"
PROBLEM_CODE = "cloister.problem"
"""Under this name a request's scope holds the code of the problem that it was answered with."""
MAX_JSON_BODY = 4 << 20
SMALL_BODY = 64 << 10
SLOT = "cloister.slot"
"""Under this name a kernel's request has in its scope the one slot that its connections share for a larger body."""
STALLED_SECONDS = 60.0
_ROUTES = "docs/protocol.md lists the routes."

W = TypeVar("W", bound=Wire)


async def body_chunks(request: Request) -> AsyncIterator[bytes]:
    """The body as it comes. Raises InvalidRequestError where it stalls."""
    stream = aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout(STALLED_SECONDS):
                chunk = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise InvalidRequestError(
                "The request stopped half-way.",
                why=f"Nothing more of it came for {STALLED_SECONDS:.0f} seconds.",
                next_step="Send it again.",
            ) from None
        yield chunk


async def body_bytes(request: Request, limit: int, slot: asyncio.Lock | None = None) -> bytes:
    """The whole body. Raises TooLargeError as soon as it passes `limit` bytes, InvalidRequestError where it stalls.

    With a `slot`, only one body at a time that shares it gets larger than SMALL_BODY; the others wait, half read.
    """
    parts = bytearray()
    async with contextlib.AsyncExitStack() as held:
        async for chunk in body_chunks(request):
            parts += chunk
            if len(parts) > limit:
                raise TooLargeError(
                    "The request is too large.", why=f"The limit here is {limit} bytes.", next_step="Send less."
                )
            if slot is not None and len(parts) > SMALL_BODY:
                await held.enter_async_context(slot)
                slot = None
    return bytes(parts)


def reads(model: type[W]) -> Callable[[Request], Awaitable[W]]:
    """A dependency that parses the body as `model` from its raw bytes: no NaN, no unknown field, none twice."""

    async def parse(request: Request) -> W:
        return unambiguous.parse(model, await body_bytes(request, MAX_JSON_BODY, request.scope.get(SLOT)))

    return parse


def takes(model: type[Wire] | None = None, *, media_type: str = "application/json") -> dict[str, object]:
    """The OpenAPI part that says what a route's body is, since `reads` parses it past FastAPI."""
    if model is None:
        schema: dict[str, object] = {"type": "string", "format": "binary"}
    else:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schema.pop("$defs", None)
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}


def answer(message: Wire, status: int = 200) -> Response:
    return Response(message.to_json(), status, media_type="application/json", headers={"Cache-Control": "no-store"})


def problem_response(error: Exception, scope: MutableMapping[str, Any], status: int | None = None) -> Response:
    """The error as a problem, noted in the request's scope; `status` stands for its own where HTTP knows better."""
    told = problem(error)
    scope[PROBLEM_CODE] = told.code
    if status is not None:
        told = told.model_copy(update={"status": status})
    return Response(told.to_json(), told.status, media_type=PROBLEM, headers={"Cache-Control": "no-store"})


def install_handlers(app: FastAPI) -> None:
    """Every error leaves as a problem. What is not foreseen leaves as one constant."""

    async def handle(request: Request, error: Exception) -> Response:
        scope = request.scope
        if isinstance(error, RequestValidationError):
            # Bodies are parsed by `reads`, so only a name in the address can be meant.
            return problem_response(NotFoundError("There is nothing at this address."), scope)
        if isinstance(error, HTTPException) and error.status_code == 404:
            return problem_response(NotFoundError("There is no such route.", next_step=_ROUTES), scope)
        if isinstance(error, HTTPException):
            refused = InvalidRequestError("This route isn't called like that.", next_step=_ROUTES)
            return problem_response(refused, scope, error.status_code)
        return problem_response(error, scope)

    for kind in (CloisterError, HTTPException, RequestValidationError, ValidationError, Exception):
        app.add_exception_handler(kind, handle)
