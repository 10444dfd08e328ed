"""Requests that two readers could read differently are refused, and so are those that cost much only to be refused."""

from __future__ import annotations

import json
from typing import TypeVar

from starlette.types import ASGIApp, Receive, Scope, Send

from cloister_data.base import Wire
from cloister_data.errors import InvalidRequestError

MAX_NAMES = 4096
"""Names in one body. A validator notes every unknown one: a body full of them would take it seconds."""
MAX_COMMAS = 32_768
"""And so for the items of lists. Commas in text count too: requests hold no long texts but base64."""

W = TypeVar("W", bound=Wire)


class _Look:
    """Sees each object of a body when it ends. Raises InvalidRequestError."""

    def __init__(self) -> None:
        self._names = 0

    def __call__(self, pairs: list[tuple[str, object]]) -> None:
        self._names += len(pairs)
        if self._names > MAX_NAMES:
            raise InvalidRequestError("The request holds too many fields.", why=f"The limit is {MAX_NAMES}.")
        if len({name for name, _ in pairs}) != len(pairs):
            raise InvalidRequestError(
                "The request gives a field twice.",
                why="One reader would take the first value, another the last.",
                next_step="Nothing was charged. Give each field once.",
            )


def parse(model: type[W], body: bytes) -> W:
    """`model.from_json` for what comes from outside. Raises InvalidRequestError or pydantic.ValidationError."""
    if body.count(b",") > MAX_COMMAS:
        raise InvalidRequestError("The request holds too many values.", why=f"The limit is {MAX_COMMAS}.")
    try:
        # Nothing of it is kept: numbers stay text, and objects become None.
        json.loads(body, object_pairs_hook=_Look(), parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        model.from_json(body)  # says what is wrong with it
        raise InvalidRequestError("The request isn't JSON.", next_step="Nothing was charged.") from None
    return model.from_json(body)


class OneLength:
    """An application that is called only where the body's end is told in one way (RFC 9112, section 6.3)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        names = [name for name, _ in scope.get("headers", ())]
        if scope["type"] == "http" and b"transfer-encoding" in names and b"content-length" in names:
            problem = InvalidRequestError(
                "The request gives both a length and chunks.",
                why="Where it ends, two readers could see differently.",
                next_step="Send one of them.",
            ).to_problem()
            # What follows on this connection may be either's next request.
            headers = [(b"content-type", b"application/problem+json"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": 400, "headers": headers})
            await send({"type": "http.response.body", "body": problem.model_copy(update={"status": 400}).to_json()})
            return
        await self._app(scope, receive, send)
