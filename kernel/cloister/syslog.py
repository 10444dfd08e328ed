"""Entries of the audit log as syslog messages (RFC 5424) over TCP (RFC 6587, octet counting) or TLS (RFC 5425).

Syslog has no acknowledgement. Each batch gets a connection of its own instead, whose orderly end says that the receiver
read all of it: it closes after our end, and its TCP refused nothing.
"""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Iterable, Mapping, Sequence

from cloister.auditlog import Record
from cloister.delivery import Undelivered

PRIORITY = 13 * 8 + 6
"""Facility 13, "log audit"; severity 6, "informational" (RFC 5424, 6.2.1)."""
ENTERPRISE = 32473
"""SD-IDs that aren't registered need a private enterprise number; this is the one for examples (RFC 5612)."""
TIMEOUT = 30.0
"""Seconds to connect, for each piece that is sent, and for the receiver to close."""
PIECE = 1 << 16
MAX_ANSWER = 1 << 16
"""Bytes that a receiver may say, which is nothing by the protocol."""

_TCP_CLOSE = 7
"""Linux, `enum` in include/net/tcp_states.h."""


def visible(text: str) -> str:
    r"""The text with JSON's escapes (`\n`, `\u202e`) for what doesn't print, and `\\` for a backslash.

    Octet counting bears line breaks, but the files and terminals behind a receiver may not. Different texts stay
    different.
    """
    return "".join(char if char.isprintable() and char != "\\" else json.dumps(char)[1:-1] for char in text)


def message(record: Record, log: str, host: str) -> bytes:
    """One SYSLOG-MSG (RFC 5424, section 6): structured data for filters, and everything as JSON in ASCII.

    `cloister@32473` holds log, index and kind; `facts@32473` the plain facts of the entry, with names for refs.
    """
    head = f"<{PRIORITY}>1 {record.time or '-'} {token(host, 255)} cloister - {token(record.kind, 32)}"
    own = _element("cloister", {"log": log, "index": str(record.index), "kind": record.kind})
    facts = _element("facts", _plain(record))
    body = json.dumps({"facts": record.facts, "names": record.names}, separators=(",", ":"), allow_nan=False)
    return f"{head} {own}{facts} {body}".encode()


def frame(content: bytes) -> bytes:
    """Octet counting: RFC 6587 section 3.4.1, RFC 5425 section 4.3."""
    return b"%d %s" % (len(content), content)


def token(text: str, most: int) -> str:
    """A header field or a PARAM-NAME: printable ASCII without what ends one; `-` (NILVALUE) where nothing is left."""
    return "".join(char if "!" <= char <= "~" and char not in '="]' else "?" for char in text[:most]) or "-"


def escaped(text: str) -> str:
    r"""A PARAM-VALUE: `"`, `\` and `]` get a backslash (section 6.3.3), after `visible`."""
    return visible(text).replace("\\", "\\\\").replace('"', '\\"').replace("]", "\\]")


def _element(name: str, values: Mapping[str, str]) -> str:
    parameters = "".join(f' {token(key, 32)}="{escaped(value)}"' for key, value in values.items())
    return f"[{name}@{ENTERPRISE}{parameters}]"


def _plain(record: Record) -> dict[str, str]:
    found = {}
    for key, value in record.facts.items():
        if isinstance(value, str):
            found[key] = record.names.get(value, value)
        elif isinstance(value, (bool, int, float)):
            found[key] = json.dumps(value)
    return found


class SyslogSink:
    """Sends batches to one receiver; with `context` over TLS."""

    def __init__(self, host: str, port: int, context: ssl.SSLContext | None, *, log: str, source: str) -> None:
        self._host, self._port, self._context = host, port, context
        self._log, self._source = log, source

    @property
    def name(self) -> str:
        return f"The syslog receiver {self._host}:{self._port}"

    def send(self, records: Sequence[Record]) -> None:
        try:
            with socket.create_connection((self._host, self._port), TIMEOUT) as plain:
                if self._context is None:
                    self._stream(plain, records)
                else:
                    with self._context.wrap_socket(plain, server_hostname=self._host) as channel:
                        self._stream(channel, records)
        except ssl.SSLCertVerificationError as error:
            raise Undelivered(f"Its certificate doesn't hold: {error.verify_message}.", passing=False) from error
        except UnicodeError as error:
            raise Undelivered("Its name can't be one of the network.", passing=False) from error
        except TimeoutError as error:
            raise Undelivered(
                f"It didn't connect, take the entries, or close after them, within {TIMEOUT:.0f} s.", passing=True
            ) from error
        except OSError as error:
            said = getattr(error, "reason", None) or error.strerror or type(error).__name__
            raise Undelivered(f"The connection broke: {said}.", passing=True) from error

    def close(self) -> None:
        """No connection outlives `send`."""

    def _stream(self, channel: socket.socket, records: Iterable[Record]) -> None:
        piece = bytearray()
        for record in records:
            piece += frame(message(record, self._log, self._source))
            if len(piece) >= PIECE:
                channel.sendall(piece)
                piece.clear()
        channel.sendall(piece)
        _end(channel)


def _end(channel: socket.socket) -> None:
    """Say that this was all, and wait until the receiver has read it. Raises OSError where it hasn't."""
    if isinstance(channel, ssl.SSLSocket):
        try:
            # Our close_notify; receivers that end without theirs are known, so TCP has the last word.
            channel.unwrap()
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            pass
        except ConnectionError:
            raise
        except OSError as error:
            if error.errno != 0:
                raise
    channel.shutdown(socket.SHUT_WR)
    deadline = time.monotonic() + TIMEOUT
    heard = 0
    while said := channel.recv(4096):
        heard += len(said)
        if heard > MAX_ANSWER or time.monotonic() > deadline:
            raise ConnectionAbortedError(0, "The receiver talks")
    # A receiver that closed before it had read all also shows an end here; its TCP then refuses the rest.
    while channel.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _TCP_CLOSE:
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.002)
    refused = channel.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if refused:
        raise ConnectionResetError(refused, "The receiver closed before it had read everything")
