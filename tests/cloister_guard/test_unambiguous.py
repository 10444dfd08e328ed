"""What two readers could read differently is refused."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from cloister_data.errors import InvalidRequestError
from cloister_data.statistics import QueryCostRequest
from cloister_guard.http.servers import KernelSockets
from cloister_guard.http.unambiguous import MAX_NAMES, parse
from cloister_guard.metrics import Metrics

GOOD = '{"question": {"source": {"dataset": "a/b"}, "operation": "count"}, "epsilon": 0.5}'


def test_a_request_is_read_as_before() -> None:
    assert parse(QueryCostRequest, GOOD.encode()) == QueryCostRequest.from_json(GOOD)


@pytest.mark.parametrize("place", ["outside", "inside"])
def test_a_field_given_twice_is_refused(place: str) -> None:
    body = GOOD[:-1] + ', "epsilon": 20}' if place == "outside" else GOOD.replace("{", '{"operation": "sum", ', 2)
    # The control: the model's own parser takes the last.
    if place == "outside":
        assert QueryCostRequest.from_json(body).epsilon == 20
    with pytest.raises(InvalidRequestError, match="twice"):
        parse(QueryCostRequest, body.encode())


def test_a_body_of_unknown_fields_is_refused_before_each_is_noted() -> None:
    body = ("{" + ",".join(f'"k{number}":0' for number in range(MAX_NAMES + 1)) + "}").encode()
    with pytest.raises(InvalidRequestError, match="too many"):
        parse(QueryCostRequest, body)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 100_000, b"\xff", GOOD.replace("0.5", "NaN").encode(), b'{"epsilon": 1e400}']
)
def test_what_is_no_request_is_refused_in_the_parsers_words(body: bytes) -> None:
    with pytest.raises(ValidationError):
        parse(QueryCostRequest, body)


def test_a_body_of_very_many_values_is_refused_unread() -> None:
    with pytest.raises(InvalidRequestError, match="too many values"):
        parse(QueryCostRequest, b'{"question": [' + b"{}," * 40_000 + b"{}]}")


def test_what_only_one_parser_reads_is_refused() -> None:
    with pytest.raises((ValidationError, InvalidRequestError)):
        parse(QueryCostRequest, json.dumps(json.loads(GOOD)).encode("utf-16"))


def test_a_request_with_a_length_and_chunks_is_refused_and_what_follows_it_is_not_read() -> None:
    hidden = b"GET /api/v1/nothing HTTP/1.1\r\nhost: cloister\r\n\r\n"

    async def scenario(folder: Path) -> tuple[bytes, bytes]:
        guard: Any = SimpleNamespace(
            config=SimpleNamespace(kernel_socket=lambda kernel: folder / kernel / "s"),
            kernels=SimpleNamespace(registered=0),
            metrics=Metrics("0", "simulated"),
        )
        sockets = KernelSockets(guard)
        caller: Any = SimpleNamespace(user="ann")
        path = await sockets.open("a", os.geteuid(), caller, "0" * 32)
        answers = []
        for more in (b"content-length: 60\r\n", b""):
            reader, writer = await asyncio.open_unix_connection(path)
            head = b"POST /api/v1/nothing HTTP/1.1\r\nhost: cloister\r\n" + more + b"transfer-encoding: chunked\r\n\r\n"
            writer.write(head + b"0\r\n\r\n" + hidden.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
            answers.append(await asyncio.wait_for(reader.read(), 5))
            writer.close()
        await sockets.close_all(remove=True)
        return answers[0], answers[1]

    with tempfile.TemporaryDirectory(prefix="clo-") as folder:
        both, chunks = asyncio.run(scenario(Path(folder)))
    assert both.startswith(b"HTTP/1.1 400 ")
    assert both.count(b"HTTP/1.1 ") == 1
    # The control: where chunks alone say where the body ends, the next request is another one, and answered.
    assert chunks.count(b"HTTP/1.1 404 ") == 2
