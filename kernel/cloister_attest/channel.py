"""The TLS channel that evidence is bound to: made in the VM at start, pinned by its certificate on the client's side.

Python's ssl has no exporter (RFC 5705), so evidence binds the server's key instead of the session.
"""

from __future__ import annotations

import os
import socket
import ssl
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cloister_data.errors import AttestationRefusedError, UnreachableError

CERTIFICATE_DAYS = 397
CLOCK_SKEW = timedelta(days=1)


@dataclass(frozen=True)
class ServerIdentity:
    """The guard's TLS identity of one start. The private key is in this process's memory and nowhere else.

    Attributes:
        certificate_der: the self-signed certificate.
        spki: its key's SubjectPublicKeyInfo, DER: what evidence is bound to.
        context_for_server: TLS 1.3 only, with the certificate and its key loaded.
    """

    certificate_der: bytes
    spki: bytes
    context_for_server: ssl.SSLContext = field(repr=False)


def make_server_identity(name: str = "cloister") -> ServerIdentity:
    """A new P-256 key, a self-signed certificate that can't issue others, and a server context that holds both.

    `name` becomes the certificate's common name; clients don't look at it, they pin the certificate.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _self_signed(key, name)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["http/1.1"])
    # Without tickets no session outlives its connection, and none is resumed without the key that was attested.
    context.num_tickets = 0
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + certificate.public_bytes(Encoding.PEM)
    # ssl loads keys from paths only: this file lives in memory and is gone when its descriptor is closed.
    descriptor = os.memfd_create("cloister-tls", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    der = certificate.public_bytes(Encoding.DER)
    return ServerIdentity(der, spki_of(der), context)


def spki_of(certificate_der: bytes) -> bytes:
    """The SubjectPublicKeyInfo (DER) of a certificate (DER). Raises ValueError."""
    key = x509.load_der_x509_certificate(certificate_der).public_key()
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def fetch_certificate(host: str, port: int, timeout: float = 10.0) -> bytes:
    """The certificate (DER) that a server shows in a TLS 1.3 handshake. Nothing is believed of it, and nothing is sent.

    Raises UnreachableError where nobody answers, AttestationRefusedError where the answer isn't TLS 1.3.
    """
    context = _bare_client_context()
    context.verify_mode = ssl.CERT_NONE
    try:
        with (
            socket.create_connection((host, port), timeout) as plain,
            context.wrap_socket(plain, server_hostname=host) as channel,
        ):
            certificate = channel.getpeercert(binary_form=True)
    except ssl.SSLError as error:
        raise AttestationRefusedError(
            f"{host}:{port} doesn't speak TLS 1.3.",
            why=f"The handshake ended with {error.reason or 'an early end of the connection'}. Nothing was sent.",
            next_step="Check the address and the port; an older proxy in between also has this effect.",
        ) from error
    except (OSError, ValueError) as error:
        raise UnreachableError(
            f"No cloister answers at {host}:{port}.",
            why=f"{error}.",
            next_step="Check the address, and that the cloister is running.",
        ) from error
    if not certificate:
        raise AttestationRefusedError(f"{host}:{port} shows no certificate.", why="Nothing was sent.")
    return certificate


def pinned_context(certificate_der: bytes) -> ssl.SSLContext:
    """A client context that trusts this one certificate and nothing else, over TLS 1.3 only.

    It is bare: no system roots, and no SSLKEYLOGFILE (`ssl.create_default_context` honours it). Host names aren't
    compared: the pin says more. Raises AttestationRefusedError for a certificate that could issue others or isn't
    self-signed: with such an anchor the pin would hold more than one key.
    """
    try:
        certificate = x509.load_der_x509_certificate(certificate_der)
        certificate.verify_directly_issued_by(certificate)
        issuing = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        context = _bare_client_context()
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VERIFY_X509_STRICT
        context.load_verify_locations(cadata=certificate_der)
    except Exception as error:
        # cryptography raises several classes for malformed certificates; each of them means the same here.
        raise AttestationRefusedError(
            "The server's certificate isn't a cloister's.",
            why=f"It can't be read, or isn't self-signed ({type(error).__name__}). Nothing was sent.",
            next_step="Check the address; a proxy that opens TLS in between also has this effect.",
        ) from error
    if issuing:
        raise AttestationRefusedError(
            "The server's certificate isn't a cloister's.",
            why="It may issue other certificates. Nothing was sent.",
            next_step="Check the address; a proxy that opens TLS in between also has this effect.",
        )
    return context


class _NeverPlain(ssl.SSLSocket):
    """Never sends in plain text. ssl's own class forgets its TLS state before it closes the connection: what another
    thread sends between the two would go out as it is.
    """

    def close(self) -> None:
        with suppress(OSError):
            # That of TCP: ssl's own shutdown() forgets the state first too.
            socket.socket.shutdown(self, socket.SHUT_RDWR)
        super().close()


def _bare_client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.sslsocket_class = _NeverPlain
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.set_alpn_protocols(["http/1.1"])
    return context


def _self_signed(key: ec.EllipticCurvePrivateKey, name: str) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .issuer_name(subject)
        .subject_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=CERTIFICATE_DAYS))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=False,
                crl_sign=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("cloister.invalid")]), critical=False)
        .sign(key, SHA256())
    )
