"""Where the audit log can be shipped to: `syslog+tcp`, `syslog+tls`, `otlp+https` and `otlp+http` addresses."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

import httpx

from cloister.delivery import Sink
from cloister.otlp import OtlpSink
from cloister.syslog import SyslogSink
from cloister_data.errors import ConfigurationError

SCHEMES = ("syslog+tcp", "syslog+tls", "otlp+https", "otlp+http")
OTLP_PORT, OTLP_PATH = 4318, "/v1/logs"
FORMS = "syslog+tcp://HOST:PORT, syslog+tls://HOST:PORT, otlp+https://HOST[:PORT][/PATH] or otlp+http://HOST[:PORT]"


@dataclass(frozen=True)
class Destination:
    """A receiver's address; `path` is empty for syslog."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def encrypted(self) -> bool:
        return self.scheme in ("syslog+tls", "otlp+https")

    @property
    def here(self) -> bool:
        """Whether it is this computer."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def url(self) -> str:
        """Of a collector, as HTTP has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme.removeprefix('otlp+')}://{host}:{self.port}{self.path}"


def parse_destination(url: str) -> Destination:
    """Raises ConfigurationError for what isn't exactly one of `FORMS`."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in SCHEMES:
        raise _wrong(url, "It begins otherwise.")
    try:
        # A scheme without a port of its own: httpx leaves out a port that its scheme implies.
        parsed = httpx.URL(f"siem://{rest}")
    except (httpx.InvalidURL, ValueError) as error:
        raise _wrong(url, "It can't be read.") from error
    if parsed.userinfo:
        raise _wrong(url, "A password on a command line can be read by others on this computer.")
    if not parsed.host or "?" in rest or "#" in rest or not rest.isprintable() or " " in rest:
        raise _wrong(url, "It holds no host, or more than a host, a port and a path.")
    is_syslog = scheme.startswith("syslog+")
    if is_syslog and parsed.path not in ("", "/"):
        raise _wrong(url, "A syslog receiver has no path.")
    port = OTLP_PORT if parsed.port is None and not is_syslog else parsed.port
    if port is None:
        raise _wrong(url, "Its port is missing.")
    if not 0 < port < 65536:
        raise _wrong(url, f"There is no port {port}.")
    path = "" if is_syslog else OTLP_PATH if parsed.path in ("", "/") else parsed.raw_path.decode("ascii")
    return Destination(scheme, parsed.raw_host.decode("ascii"), port, path)


def open_sink(destination: Destination, ca: Path | None, *, log: str, source: str) -> Sink:
    """The sink for a destination; nothing is sent yet. The caller closes it.

    Args:
        ca: a file of certificates (PEM) that the receiver's must lead to, in place of the system's.
        log, source: the log's origin and the cloister's host, as the receiver is to know them.

    Raises ConfigurationError for a `ca` that can't be read, or that nothing would use.
    """
    if ca is not None and not destination.encrypted:
        raise ConfigurationError(
            "--ca is for encrypted receivers.", next_step="Use syslog+tls:// or otlp+https://, or leave it out."
        )
    context = _context(ca)
    if destination.scheme.startswith("syslog+"):
        over = context if destination.encrypted else None
        return SyslogSink(destination.host, destination.port, over, log=log, source=source)
    return OtlpSink(destination.url, context, log=log, source=source)


def _context(ca: Path | None) -> ssl.SSLContext:
    """Verifies chain and host name. Bare: `ssl.create_default_context` would honour SSLKEYLOGFILE."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca is None:
        context.load_default_certs()
        return context
    try:
        context.load_verify_locations(cafile=ca)
    except OSError as error:
        raise ConfigurationError(
            f"The certificates in {ca} can't be read.",
            why=f"{error.strerror or type(error).__name__}.",
            next_step="Name a file of certificates in PEM form: --ca FILE.",
        ) from error
    return context


def _wrong(url: str, why: str) -> ConfigurationError:
    return ConfigurationError(f"{url[:200]!r} isn't a receiver's address.", why=why, next_step=f"Write it as {FORMS}.")
