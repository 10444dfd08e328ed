"""Requests to a guard: over a verified channel from a laptop, or over the kernel's own unix socket.

Answers are bounded and validated; refusals come back as the errors that the guard meant.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self, TypeVar

import httpx
from pydantic import ValidationError

from cloister_data.base import Wire
from cloister_data.errors import (
    AttestationRefusedError,
    CloisterError,
    Problem,
    TooLargeError,
    UnavailableError,
    UnreachableError,
    from_problem,
)
from cloister_data.events import Event

W = TypeVar("W", bound=Wire)

API = "/api/v1"
MAX_ANSWER = 64 << 20
"""Bytes of a JSON answer."""
MAX_RAW_ANSWER = 1 << 30
"""Bytes of a binary answer (weights)."""
MAX_PROBLEM = 1 << 20
MAX_EVENT = 4 << 20

TIMEOUT = httpx.Timeout(connect=10, read=120, write=120, pool=10)
"""Seconds; `read` and `write` are the longest silence, not the whole."""
EVENT_SILENCE = 45.0
"""Seconds without a sign of life after which an event stream counts as dead; the guard sends one every 15."""

_JSON = "application/json"


class CertificateChangedError(AttestationRefusedError):
    """The server shows another certificate than the verified one. The request wasn't sent."""


class Transport:
    """Calls to one guard. May be used from several threads at once."""

    def __init__(self, client: httpx.Client, prove: Callable[[], None] | None = None) -> None:
        """`prove` is called before each request and each event, and raises where the guard isn't proven."""
        self.client = client
        self._prove = prove

    @classmethod
    def unix(cls, path: str | Path) -> Self:
        """Over the unix socket of a kernel. Who asks is known by the socket; there is no token."""
        return cls(
            httpx.Client(
                transport=httpx.HTTPTransport(uds=str(path), trust_env=False),
                base_url="http://cloister",
                trust_env=False,
                follow_redirects=False,
                timeout=TIMEOUT,
            )
        )

    def call(
        self,
        method: str,
        path: str,
        send: Wire | bytes | None = None,
        receive: type[W] | None = None,
        content_type: str | None = None,
        *,
        timeout: httpx.Timeout = TIMEOUT,
    ) -> W:
        """One request answered by the message `receive`.

        Args:
            path: below `/api/v1` ("/me"); one that begins with `/api/` or `/.well-known/` is taken as it is.
            content_type: of a `bytes` body; a message goes as JSON.

        Raises the error that the guard meant, UnreachableError, CertificateChangedError where the guard's key is no
        longer the verified one, or AttestationRefusedError where it didn't prove itself again.
        """
        if receive is None:
            raise TypeError("call() needs the message to receive; raw() takes any answer")
        content = self.raw(method, path, send, content_type, limit=MAX_ANSWER, timeout=timeout)
        return _parsed(content, receive, f"{method} {path}")

    def raw(
        self,
        method: str,
        path: str,
        send: Wire | bytes | None = None,
        content_type: str | None = None,
        *,
        limit: int = MAX_RAW_ANSWER,
        timeout: httpx.Timeout = TIMEOUT,
    ) -> bytes:
        """One request answered by at most `limit` bytes; empty for 204. Raises as `call` does."""
        body = send.to_json() if isinstance(send, Wire) else send
        headers = {"accept": f"{_JSON}, application/problem+json, */*;q=0.5", "accept-encoding": "identity"}
        if body is not None:
            headers["content-type"] = content_type or (_JSON if isinstance(send, Wire) else "application/octet-stream")
        with (
            self._reachable(),
            self.client.stream(
                method, _route(path), content=body, headers=headers, timeout=timeout, follow_redirects=False
            ) as response,
        ):
            if response.is_success:
                return _read(response, limit)
            raise _refusal(response, _read(response, MAX_PROBLEM))

    def upload(self, path: str, chunks: Iterable[bytes], size: int, receive: type[W]) -> W:
        """PUT a body of `size` bytes as it comes, answered by the message `receive`. Raises as `call` does."""
        headers = {"accept": f"{_JSON}, application/problem+json", "accept-encoding": "identity"}
        headers |= {"content-type": "application/octet-stream", "content-length": str(size)}
        with (
            self._reachable(),
            self.client.stream(
                "PUT", _route(path), content=chunks, headers=headers, follow_redirects=False
            ) as response,
        ):
            content = _read(response, MAX_PROBLEM)
            if not response.is_success:
                raise _refusal(response, content)
        return _parsed(content, receive, f"PUT {path}")

    @contextmanager
    def download(self, path: str, limit: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """(size, the bytes as they come) of a GET. Raises as `call` does, TooLargeError above `limit` bytes."""
        headers = {"accept": "application/octet-stream, application/problem+json", "accept-encoding": "identity"}
        with (
            self._reachable(),
            self.client.stream("GET", _route(path), headers=headers, follow_redirects=False) as response,
        ):
            if not response.is_success:
                raise _refusal(response, _read(response, MAX_PROBLEM))
            length = response.headers.get("content-length", "")
            if not length.isdecimal() or int(length[:16]) > limit:
                raise TooLargeError(f"The cloister's answer has more than {limit} bytes, or doesn't say how many.")
            yield int(length), _exactly(_parts(response), int(length))

    def events(self, last_id: str | None = None) -> Iterator[Event]:
        """The events after `last_id`, as they happen, until the stream ends or breaks (UnreachableError).

        Resume with the id of the last one that was received. A `ResetEvent` says that some in between are gone.
        """
        headers = {"accept": "text/event-stream", "cache-control": "no-store", "accept-encoding": "identity"}
        if last_id is not None:
            headers["last-event-id"] = last_id
        timeout = httpx.Timeout(connect=10, read=EVENT_SILENCE, write=10, pool=10)
        with (
            self._reachable(),
            self.client.stream(
                "GET", _route("/events"), headers=headers, timeout=timeout, follow_redirects=False
            ) as response,
        ):
            if not response.is_success:
                raise _refusal(response, _read(response, MAX_PROBLEM))
            for data in read_event_stream(_parts(response)):
                try:
                    event = Event.from_json(data)
                except ValidationError as error:
                    raise CloisterError(
                        "The cloister sent an event that can't be read.",
                        next_step="Update the client to the cloister's version: pip install -U cloister.",
                    ) from error
                if self._prove is not None:
                    self._prove()
                yield event

    def close(self) -> None:
        self.client.close()

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        """Turns what breaks on the way into errors for people."""
        if self._prove is not None:
            self._prove()
        if self.client.is_closed:
            raise UnreachableError(
                "The connection to the cloister is closed.",
                why="Its session has ended: it was closed, or the evidence no longer convinced.",
                next_step="Open a new session: it verifies the evidence again. In a notebook, restart the kernel.",
            )
        try:
            yield
        except httpx.TimeoutException as error:
            raise UnreachableError(
                "The cloister didn't answer in time.",
                why="It may still carry out the request.",
                next_step="Try again: the same request, with its id, is never charged twice.",
            ) from error
        except httpx.RequestError as error:
            if _broken_pin(error):
                raise CertificateChangedError(
                    "The cloister's key isn't the one that was verified. Nothing was sent.",
                    why="The cloister was restarted, or somebody stands in between.",
                    next_step="Open a new session: it verifies the evidence again. In a notebook, restart the kernel.",
                ) from error
            if isinstance(error, (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)):
                raise UnreachableError(
                    "The connection to the cloister broke before its answer had come.",
                    why=f"{error or type(error).__name__}. The cloister may have restarted.",
                    next_step="Try again: the same request, with its id, is never charged twice.",
                ) from error
            raise UnreachableError(
                "The cloister can't be reached.",
                why=f"{error or type(error).__name__}.",
                next_step="Check that it is running, and the network.",
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_event_stream(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The `data` of each event of a server-sent stream (WHATWG HTML, 9.2.6), in UTF-8. Raises TooLargeError.

    Names and ids of the stream are left aside: an `Event` carries both in its data.
    """
    data: list[bytes] = []
    size = 0
    for line in _lines(chunks):
        if not line:
            if data:
                yield b"\n".join(data)
            data, size = [], 0
            continue
        name, _, value = line.partition(b":")
        if name == b"data":
            value = value.removeprefix(b" ")
            size += len(value) + 1
            if size > MAX_EVENT:
                raise TooLargeError(f"An event of more than {MAX_EVENT} bytes arrived.")
            data.append(value)


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines that end in LF or CR LF."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.removesuffix(b"\r") for line in lines)
        if len(rest) > MAX_EVENT:
            raise TooLargeError(f"An event of more than {MAX_EVENT} bytes arrived.")


def _route(path: str) -> str:
    if not path.startswith("/"):
        raise ValueError("a path begins with /")
    return path if path.startswith((f"{API}/", "/.well-known/")) else API + path


def _parts(response: httpx.Response) -> Iterator[bytes]:
    """The body as it comes. Raises CloisterError where it is compressed: a part could unfold to any size, unseen."""
    if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise CloisterError(
            "The cloister's answer is compressed, which wasn't asked for.",
            next_step="Check the address; a proxy in between also has this effect.",
        )
    return response.iter_bytes()


def _parsed(content: bytes, receive: type[W], what: str) -> W:
    try:
        return receive.from_json(content)
    except ValidationError as error:
        raise CloisterError(
            f"The cloister's answer to {what} can't be read.",
            why=f"It isn't a {receive.__name__} that this version knows ({error.error_count()} faults).",
            next_step="Update the client to the cloister's version: pip install -U cloister.",
        ) from error


def _exactly(parts: Iterator[bytes], size: int) -> Iterator[bytes]:
    """Raises UnreachableError where more or less than `size` bytes come."""
    for part in parts:
        size -= len(part)
        if size < 0:
            break
        yield part
    if size:
        raise UnreachableError("The cloister's answer isn't as long as it said.", next_step="Try again.")


def _read(response: httpx.Response, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    for part in _parts(response):
        size += len(part)
        if size > limit:
            raise TooLargeError(f"The cloister's answer has more than {limit} bytes.")
        parts.append(part)
    return b"".join(parts)


def _refusal(response: httpx.Response, content: bytes) -> CloisterError:
    """The error that an answer other than success stands for."""
    kind = response.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "application/problem+json":
        try:
            return from_problem(Problem.from_json(content))
        except ValidationError:
            pass
    if response.status_code in (502, 503, 504):
        return UnavailableError("The cloister can't answer at the moment.", next_step="Try again in a while.")
    return CloisterError(
        f"The cloister answered with HTTP status {response.status_code} and no explanation.",
        next_step="Check that the client's version fits the cloister's; the operator's log may say more.",
    )


def _broken_pin(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False
