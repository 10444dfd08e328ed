"""A small guard on a unix socket: it answers with real messages and records what it was asked."""

from __future__ import annotations

import contextlib
import re
import socketserver
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from cloister_data.base import Wire
from cloister_data.errors import CloisterError, NotFoundError

Answer = Wire | bytes | CloisterError
Route = Callable[[bytes], Answer]


@dataclass
class Asked:
    method: str
    path: str
    body: bytes
    content_type: str


@dataclass
class RecordingGuard:
    """`routes` maps "METHOD /path" (a regular expression, below /api/v1) to the answer or to what computes it."""

    socket: Path
    asked: list[Asked] = field(default_factory=list)
    routes: dict[str, Answer | Route] = field(default_factory=dict)

    def paths(self, method: str = "POST") -> list[str]:
        return [each.path for each in self.asked if each.method == method]

    def answer(self, asked: Asked) -> Answer:
        self.asked.append(asked)
        for pattern, found in self.routes.items():
            if re.fullmatch(pattern, f"{asked.method} {asked.path}"):
                return found(asked.body) if callable(found) else found
        return NotFoundError(f"no route {asked.method} {asked.path}")


@contextlib.contextmanager
def recording_guard() -> Iterator[RecordingGuard]:
    with tempfile.TemporaryDirectory(prefix="clo-") as directory:
        guard = RecordingGuard(Path(directory) / "guard.sock")

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _handle(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                path = self.path.removeprefix("/api/v1")
                asked = Asked(self.command, path, body, self.headers.get("content-type", ""))
                found = guard.answer(asked)
                if isinstance(found, CloisterError):
                    problem = found.to_problem()
                    self._send(problem.status, problem.to_json(), "application/problem+json")
                elif isinstance(found, Wire):
                    self._send(200, found.to_json(), "application/json")
                else:
                    self._send(200, found, "application/octet-stream")

            do_GET = do_POST = do_DELETE = do_PUT = _handle  # noqa: N815

            def _send(self, status: int, body: bytes, kind: str) -> None:
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def address_string(self) -> str:
                return "unix"

            def log_message(self, *_: object) -> None:
                pass

        class Server(socketserver.ThreadingUnixStreamServer):
            daemon_threads = True
            block_on_close = False

        with Server(str(guard.socket), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
            thread.start()
            try:
                yield guard
            finally:
                server.shutdown()
                thread.join()
