"""The channel: one key, TLS 1.3, and no second way in."""

import os
import socket
import ssl
import threading
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cloister_attest.channel import fetch_certificate, make_server_identity, pinned_context, spki_of
from cloister_data.errors import AttestationRefusedError, UnreachableError


def certificate(key=None, *, ca=False, days=(-1, 10), signer=None, constraints=True, extension=None):
    key = key or ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "cloister")])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .issuer_name(name)
        .subject_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
    if constraints:
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    if extension:
        oid, value = extension
        builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), critical=False)
    return builder.sign(signer or key, SHA256())


def server_context(key, chain, tmp_path, version=ssl.TLSVersion.TLSv1_3):
    path = tmp_path / "server.pem"
    path.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        + b"".join(item.public_bytes(Encoding.PEM) for item in chain)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = version
    context.load_cert_chain(path)
    return context


@contextmanager
def echo(context):
    """A TLS server that answers one line per connection; yields its port."""
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)

        def serve():
            while not stop.is_set():
                with suppress(OSError):
                    plain, _ = listener.accept()
                    plain.settimeout(5)
                    with plain, suppress(OSError), context.wrap_socket(plain, server_side=True) as channel:
                        channel.sendall(channel.recv(100))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            stop.set()
            thread.join()


def say(port, context, host="127.0.0.1"):
    with (
        socket.create_connection((host, port), 5) as plain,
        context.wrap_socket(plain, server_hostname="cloister.example") as channel,
    ):
        channel.sendall(b"hello")
        return channel.recv(100), channel.version(), channel.getpeercert(binary_form=True)


def test_a_pinned_channel():
    identity = make_server_identity("hospital")
    with echo(identity.context_for_server) as port:
        der = fetch_certificate("127.0.0.1", port)
        assert der == identity.certificate_der
        assert spki_of(der) == identity.spki
        assert say(port, pinned_context(der)) == (b"hello", "TLSv1.3", der)


def test_the_private_key_is_loaded_from_memory_alone(monkeypatch):
    loaded = []
    load = ssl.SSLContext.load_cert_chain

    def watch(context, path, *args):
        loaded.append(os.readlink(path))
        load(context, path, *args)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", watch)
    make_server_identity()
    assert [link.split(" ")[0] for link in loaded] == ["/memfd:cloister-tls"]
    open_now = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert not any("cloister-tls" in path for path in open_now)


def test_two_identities_have_two_keys():
    assert make_server_identity().spki != make_server_identity().spki


def test_the_key_is_not_shown():
    assert "context_for_server" not in repr(make_server_identity())


def test_a_cloned_certificate_is_refused(tmp_path):
    """Same names, same serial number, same dates, another key."""
    genuine = certificate()
    clone_key = ec.generate_private_key(ec.SECP256R1())
    context = server_context(clone_key, [certificate(clone_key)], tmp_path)
    with echo(context) as port, pytest.raises(ssl.SSLCertVerificationError):
        say(port, pinned_context(genuine.public_bytes(Encoding.DER)))


def test_a_certificate_that_the_pinned_key_issued_is_refused(tmp_path):
    """The pin is one key, not one authority."""
    key, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    pinned = certificate(key)
    context = server_context(other, [certificate(other, signer=key), pinned], tmp_path)
    with echo(context) as port, pytest.raises(ssl.SSLCertVerificationError):
        say(port, pinned_context(pinned.public_bytes(Encoding.DER)))


@pytest.mark.parametrize(
    "der",
    [
        certificate(ca=True).public_bytes(Encoding.DER),
        certificate(constraints=False).public_bytes(Encoding.DER),
        certificate(signer=ec.generate_private_key(ec.SECP256R1())).public_bytes(Encoding.DER),
        b"",
        b"nothing",
        certificate().public_bytes(Encoding.DER) + b"\0",
        certificate().public_bytes(Encoding.PEM),
        certificate().public_bytes(Encoding.DER).replace(b"\xa0\3\2\1\2", b"\xa0\3\2\1\5", 1),
        certificate(extension=("2.5.29.17", b"\x30\4\xa3\2\x30\0")).public_bytes(Encoding.DER),
        certificate(extension=("1.3.6.1.5.5.7.1.24", b"\x30\3\2\1\x09")).public_bytes(Encoding.DER),
    ],
    ids=[
        *("may issue", "doesn't say", "not self-signed", "empty", "not DER", "bytes after", "PEM"),
        *("a version that isn't", "a name of X.400", "a TLS feature that isn't"),
    ],
)
def test_certificates_that_are_not_pinned(der):
    with pytest.raises(AttestationRefusedError, match="isn't a cloister's"):
        pinned_context(der)


def test_the_control_of_the_test_above():
    pinned_context(certificate().public_bytes(Encoding.DER))


def test_an_expired_certificate_is_refused(tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    expired = certificate(key, days=(-9, -1))
    with echo(server_context(key, [expired], tmp_path)) as port, pytest.raises(ssl.SSLCertVerificationError):
        say(port, pinned_context(expired.public_bytes(Encoding.DER)))


def test_tls_1_2_is_refused_on_both_ends(tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    own = certificate(key)
    with echo(server_context(key, [own], tmp_path, ssl.TLSVersion.TLSv1_2)) as port:
        with pytest.raises(AttestationRefusedError, match=r"doesn't speak TLS 1\.3"):
            fetch_certificate("127.0.0.1", port)
        with pytest.raises(ssl.SSLError):
            say(port, pinned_context(own.public_bytes(Encoding.DER)))
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with echo(make_server_identity().context_for_server) as port, pytest.raises((ssl.SSLError, OSError)):
        say(port, old)


def test_what_is_not_tls_at_all():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            plain, _ = listener.accept()
            with plain:
                plain.recv(10)
                plain.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises((AttestationRefusedError, UnreachableError)):
            fetch_certificate("127.0.0.1", listener.getsockname()[1])
        thread.join()


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(UnreachableError, match="No cloister answers"):
        fetch_certificate("127.0.0.1", port, 2)


def test_a_server_that_says_nothing():
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(UnreachableError):
        fetch_certificate("127.0.0.1", listener.getsockname()[1], 0.2)


def test_session_keys_are_never_logged(tmp_path, monkeypatch):
    """SSLKEYLOGFILE is honoured by `ssl.create_default_context` (the control) and not by ours."""
    path = tmp_path / "keys.log"
    monkeypatch.setenv("SSLKEYLOGFILE", str(path))
    identity = make_server_identity()
    with echo(identity.context_for_server) as port:
        say(port, pinned_context(fetch_certificate("127.0.0.1", port)))
        assert not path.exists() or path.read_text() == ""
        control = ssl.create_default_context(cadata=identity.certificate_der)
        control.check_hostname = False
        control.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        say(port, control)
        assert "CLIENT_TRAFFIC_SECRET_0" in path.read_text()


def test_nothing_but_the_pin_is_trusted():
    context = pinned_context(make_server_identity().certificate_der)
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.minimum_version == context.maximum_version == ssl.TLSVersion.TLSv1_3
    assert context.cert_store_stats() == {"x509": 1, "crl": 0, "x509_ca": 0}
    assert context.verify_flags & ssl.VERIFY_X509_STRICT


def test_what_is_sent_while_another_thread_closes_never_goes_in_plain_text(monkeypatch):
    """ssl forgets its TLS state before it closes the connection; the control is its own class."""
    identity = make_server_identity()
    sent = b"a row of a patient"
    close = socket.socket._real_close

    def closing(self):
        with suppress(OSError):
            self.send(sent)
        close(self)

    for kind, leaks in ((None, False), (ssl.SSLSocket, True)):
        context = pinned_context(identity.certificate_der)
        if kind is not None:
            context.sslsocket_class = kind
        near, far = socket.socketpair()
        wire = far.dup()
        serve = identity.context_for_server.wrap_socket
        server = threading.Thread(target=lambda far=far, serve=serve: serve(far, server_side=True).close())
        server.start()
        channel = context.wrap_socket(near)
        server.join()
        with monkeypatch.context() as patch:
            patch.setattr(socket.socket, "_real_close", closing)
            channel.close()
        with wire:
            wire.settimeout(5)
            received = b"".join(iter(lambda wire=wire: wire.recv(4096), b""))
        assert (sent in received) is leaks
