"""Tools of a machine in the middle: cloned certificates, weak contexts, and a switch that changes its mind."""

from __future__ import annotations

import re
import socket
import ssl
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cloister_attest.channel import ServerIdentity, spki_of
from tests.fakes.attested_server import AttestedServer


def clone(identity: ServerIdentity, folder: Path) -> ServerIdentity:
    """A certificate with everything of the original (names, serial number, dates, extensions) but its key."""
    original = x509.load_der_x509_certificate(identity.certificate_der)
    key = ec.generate_private_key(ec.SECP256R1())
    cloned = x509.CertificateBuilder(
        original.issuer,
        original.subject,
        key.public_key(),
        original.serial_number,
        original.not_valid_before_utc,
        original.not_valid_after_utc,
        list(original.extensions),
    ).sign(key, SHA256())
    der = cloned.public_bytes(Encoding.DER)
    return ServerIdentity(der, spki_of(der), _context(folder, key, [cloned]))


def tls_context(folder: Path, *, maximum: str = "TLSv1_3", issued: bool = False) -> ssl.SSLContext:
    """A server context with an old TLS, or with a certificate that an authority issued."""
    authority, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    signer = authority if issued else key
    issuer = _name("an authority") if issued else _name("cloister")
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .subject_name(_name("cloister"))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(signer, SHA256())
    )
    context = _context(folder, key, [certificate])
    version = ssl.TLSVersion[maximum]
    context.minimum_version = context.maximum_version = version
    return context


QUESTION = re.compile(
    rb"(POST /\.well-known/attest HTTP/1\.1\r\n"
    rb"((host|accept|accept-encoding|connection|user-agent|content-type|content-length): [^\r\n]*\r\n)+\r\n"
    rb'\{"nonce":"[A-Za-z0-9_-]{43}="\})*',
    re.IGNORECASE,
)
"""Requests for evidence, and nothing else: what an unproven machine may get."""


class HeldHandshake:
    """Holds back the next handshake with `server`, once it is `reached`, until `go_on` is set."""

    def __init__(self, server: AttestedServer) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        finish = server._server.finish_request

        def hold(request: Any, address: Any) -> None:
            if not self.reached.is_set():
                self.reached.set()
                self.go_on.wait(10)
            finish(request, address)

        server._server.finish_request = hold  # type: ignore[method-assign]


class Passthrough:
    """A TCP switch: its connections go to `first` in turn, and all later ones to `then`."""

    def __init__(self, first: list[int], *, then: int) -> None:
        self._ports, self._then = list(first), then
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.05)
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._ended = threading.Event()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self._listener.getsockname()[1]}"

    def divert(self, port: int) -> None:
        """Send the connections that are made from now on to `port`; those that are open stay."""
        self._then = port

    def cut(self) -> None:
        """Break all connections that are open."""
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.cut()
        for thread in list(self._threads):
            thread.join()
        for end in self._open:
            end.close()
        self._listener.close()

    def _start(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._ended.is_set():
            with suppress(TimeoutError):
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._ports.pop(0) if self._ports else self._then), 5)
                near.settimeout(10)
                self._open += (near, far)
                self._start(self._pump, near, far)
                self._start(self._pump, far, near)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common)])


def _context(folder: Path, key: ec.EllipticCurvePrivateKey, chain: list[x509.Certificate]) -> ssl.SSLContext:
    path = folder / "middle.pem"
    path.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        + b"".join(certificate.public_bytes(Encoding.PEM) for certificate in chain)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context
