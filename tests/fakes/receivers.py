"""What stands for a SIEM in tests: syslog and HTTP receivers on loopback, and a throw-away authority for their TLS."""

from __future__ import annotations

import ipaddress
import json
import socket
import ssl
import struct
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

LOOPBACK = "127.0.0.1"


def frames(data: bytes) -> tuple[list[bytes], bytes]:
    """The messages of an octet-counted stream (RFC 6587, 3.4.1), and what is left of an unfinished one."""
    found = []
    while True:
        length, space, rest = data.partition(b" ")
        if not space:
            break
        assert length.isdigit(), length
        assert not length.startswith(b"0"), length
        if len(rest) < int(length):
            break
        found.append(rest[: int(length)])
        data = rest[int(length) :]
    return found, data


class SyslogReceiver:
    """Takes messages, one connection after the other. The first ones may be treated badly, as `plan` says.

    "take" reads to the end; "drop" resets after some bytes; "leave" closes after some bytes without a word; "hold"
    reads to the end and never closes; "rude" ends TLS without close_notify.
    """

    def __init__(self, plan: tuple[str, ...] = (), context: ssl.SSLContext | None = None, port: int = 0) -> None:
        self.messages: list[bytes] = []
        self.connections = 0
        self._plan, self._context = list(plan), context
        self._listener = socket.create_server((LOOPBACK, port))
        self._listener.settimeout(0.05)
        self.port = self._listener.getsockname()[1]
        self._ended = threading.Event()
        self._held: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._listener.close()
        for connection in self._held:
            connection.close()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                plain, _ = self._listener.accept()
            except TimeoutError:
                continue
            self.connections += 1
            plain.settimeout(5)
            with suppress(OSError):
                self._serve(plain, self._plan.pop(0) if self._plan else "take")

    def _serve(self, connection: socket.socket, how: str) -> None:
        if self._context is not None:
            try:
                connection = self._context.wrap_socket(connection, server_side=True)
            except OSError:
                connection.close()
                raise
        if how in ("drop", "leave"):
            connection.recv(100)
            if how == "drop":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
            return
        data = b""
        while part := connection.recv(65536):
            data += part
        found, rest = frames(data)
        assert not rest, "the stream ended within a message"
        self.messages += found
        if how == "hold":
            self._held.append(connection)
            return
        if isinstance(connection, ssl.SSLSocket) and how != "rude":
            connection = connection.unwrap()
        connection.close()


Answer = tuple[int, dict[str, str], bytes]


class Collector:
    """Takes OTLP/HTTP requests. The first ones get the answers in `plan`."""

    def __init__(self, plan: tuple[Answer, ...] = (), context: ssl.SSLContext | None = None) -> None:
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        answers = list(plan)
        taken = self.requests

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                taken.append((self.path, {key.lower(): value for key, value in self.headers.items()}, body))
                status, headers, content = answers.pop(0) if answers else (200, {}, b"{}")
                self.send_response(status)
                for name, value in (headers | {"content-length": str(len(content))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
        self._server.daemon_threads = False
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        if context is not None:
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def records(self) -> list[dict[str, Any]]:
        found = []
        for _, _, body in self.requests:
            for resource in body["resourceLogs"]:
                for scope in resource["scopeLogs"]:
                    found += scope["logRecords"]
        return found

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Authority:
    """A throw-away authority: `ca` is its certificate (PEM), `context` a server's for a host that it vouches for."""

    def __init__(self, folder: Path, name: str, host: str = LOOPBACK) -> None:
        key, own = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.ca = folder / f"{name}.pem"
        root = _certificate(issuer, issuer, key, key, ca=True)
        self.ca.write_bytes(root.public_bytes(Encoding.PEM))
        leaf = _certificate(x509.Name([]), issuer, own, key, ca=False, host=host)
        chain = folder / f"{name}-server.pem"
        secret = own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        chain.write_bytes(secret + leaf.public_bytes(Encoding.PEM))
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(chain)


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    *,
    ca: bool,
    host: str = "",
) -> x509.Certificate:
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if host:
        try:
            alternative: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            alternative = x509.DNSName(host)
        made = made.add_extension(x509.SubjectAlternativeName([alternative]), critical=True)
    return made.sign(signer, SHA256())


def free_port() -> int:
    """A port of loopback that nobody listens at."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        return int(listener.getsockname()[1])
