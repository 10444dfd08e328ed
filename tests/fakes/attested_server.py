"""A small HTTPS server that proves itself as a cloister does, and machines in the middle that try to.

It records every byte that a client sends inside TLS, so that a test can look for what must not have left.
"""

from __future__ import annotations

import base64
import json
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister_attest.binding import gpu_digest, report_data
from cloister_attest.channel import ServerIdentity, make_server_identity
from cloister_attest.collateral.items import Item
from cloister_attest.evidence import AttestRequest, Evidence
from cloister_attest.simulated.hardware import SimulatedHardware, issue_root
from cloister_budget import merkle
from cloister_data.checkpoint import key_id
from cloister_data.consistency import ConsistencyProof, ConsistencyRequest

MEASUREMENT = bytes(range(48))


@dataclass
class FakeLog:
    """An audit log with a key, a name, and so many entries that follow from `seed`."""

    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    origin: str = "hospital-cloister"
    size: int = 7
    seed: bytes = b"r"

    @property
    def public_key(self) -> bytes:
        return self.key.public_key().public_bytes_raw()

    def _hashes(self) -> merkle.Read:
        tree, stored = merkle.Growing(), dict[tuple[int, int], bytes]()
        for index in range(self.size):
            leaf = merkle.leaf_hash(self.seed + str(index).encode())
            for level, found in enumerate(tree.add(leaf)):
                stored[level, index >> level] = found
        return lambda level, place: stored[level, place]

    @property
    def root(self) -> bytes:
        return merkle.root(self.size, self._hashes())

    def consistency(self, first: int, second: int) -> tuple[bytes, ...]:
        if not first <= second <= self.size:
            return ()
        return tuple(merkle.consistency_proof(first, second, self._hashes()))

    def checkpoint(self) -> str:
        body = f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"
        signature = key_id(self.origin, self.public_key) + self.key.sign(body.encode())
        return f"{body}\n— {self.origin} {base64.b64encode(signature).decode()}\n"


class FakeRoot:
    """A maker of processors, which can make several of the same kind."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP384R1())
        self.certificate = issue_root(self.key)

    def chip(self, measurement: bytes = MEASUREMENT, **changes: Any) -> SimulatedHardware:
        return SimulatedHardware(self.key, self.certificate, measurement, **changes)


@dataclass
class FakeMachine:
    """What a guard has at hand when it makes evidence: `hardware` is an Attester. Tests bend one part at a time."""

    hardware: Any = field(default_factory=lambda: FakeRoot().chip())
    log: FakeLog = field(default_factory=FakeLog)
    gpu: bytes | None = None
    collateral: tuple[Item, ...] = ()

    def evidence(self, spki: bytes, nonce: bytes) -> Evidence:
        checkpoint = self.log.checkpoint()
        bound = report_data(spki, nonce, gpu_digest(self.gpu), checkpoint.encode(), self.log.public_key)
        report, certificates = self.hardware.collect(bound)
        return Evidence(
            platform=self.hardware.platform,
            report=report,
            certificates=certificates,
            checkpoint=checkpoint,
            log_key=self.log.public_key,
            gpu=self.gpu,
            collateral=self.collateral,
        )


class AttestedServer:
    """Answers /.well-known/attest by `answer(nonce)`, and the routes of `routes` ((method, path) -> status, body).

    Attributes:
        received: every byte that came inside TLS, from all connections.
    """

    def __init__(
        self,
        machine: FakeMachine | None = None,
        *,
        identity: ServerIdentity | None = None,
        answer: Callable[[bytes], Evidence | bytes] | None = None,
        context: ssl.SSLContext | None = None,
        port: int = 0,
    ) -> None:
        self.machine = machine or FakeMachine()
        self.identity = identity or make_server_identity()
        self.answer = answer or (lambda nonce: self.machine.evidence(self.identity.spki, nonce))
        self.routes: dict[tuple[str, str], Callable[[bytes], tuple[int, str, bytes]]] = {}
        self.received = bytearray()
        self.nonces: list[bytes] = []
        self._server = _Server(("127.0.0.1", port), _handler_for(self))
        self._server.socket = (context or self.identity.context_for_server).wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def on(self, method: str, path: str, status: int, content: bytes, content_type: str = "application/json") -> None:
        self.routes[method, path] = lambda _: (status, content_type, content)

    def respond(self, method: str, path: str, body: bytes) -> tuple[int, str, bytes]:
        if (method, path) == ("POST", "/.well-known/attest"):
            nonce = AttestRequest.from_json(body).nonce
            self.nonces.append(nonce)
            answer = self.answer(nonce)
            return 200, "application/json", answer if isinstance(answer, bytes) else answer.to_json()
        if (method, path) == ("POST", "/.well-known/consistency"):
            wanted = ConsistencyRequest.from_json(body)
            shown = ConsistencyProof(hashes=self.machine.log.consistency(wanted.first, wanted.second))
            return 200, "application/json", shown.to_json()
        handler = self.routes.get((method, path))
        if handler is None:
            return 404, "application/json", json.dumps({"detail": "no such route"}).encode()
        return handler(body)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.cut()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True

    def __init__(self, *args: Any) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def cut(self) -> None:
        """Break the connections that clients keep open, so that their threads end."""
        for request in list(self._open):
            with suppress(OSError):
                # Below TLS: the connection's own thread may be reading from it.
                socket.socket.shutdown(request, socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken handshakes are what these tests are about."""


class _Recorder:
    """A file that keeps what is read from it."""

    def __init__(self, inner: Any, kept: bytearray) -> None:
        self._inner, self._kept = inner, kept

    def readline(self, *args: int) -> bytes:
        return self._keep(self._inner.readline(*args))

    def read(self, *args: int) -> bytes:
        return self._keep(self._inner.read(*args))

    def close(self) -> None:
        self._inner.close()

    @property
    def closed(self) -> bool:
        return bool(self._inner.closed)

    def _keep(self, data: bytes) -> bytes:
        self._kept += data
        return data


def _handler_for(owner: AttestedServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Head and body are two writes: without this the second waits 40 ms for the client to acknowledge the first.
        disable_nagle_algorithm = True
        timeout = 10

        def setup(self) -> None:
            super().setup()
            self.rfile = _Recorder(self.rfile, owner.received)  # type: ignore[assignment]

        def handle(self) -> None:
            with suppress(OSError):
                super().handle()

        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            status, content_type, content = owner.respond(self.command, self.path, body)
            self.send_response(status)
            self.send_header("content-type", content_type)
            self.send_header("content-length", str(len(content)))
            if 300 <= status < 400:
                self.send_header("location", content.decode())
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_DELETE = _do  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
