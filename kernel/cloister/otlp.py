"""Entries of the audit log as OpenTelemetry log records, over OTLP/HTTP in JSON (opentelemetry.io, OTLP 1.x).

Field names are those of opentelemetry-proto's JSON mapping: lowerCamelCase, 64-bit integers as text.
"""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from cloister.auditlog import Record
from cloister.auditwords import about, summary
from cloister.delivery import Undelivered
from cloister.syslog import visible

INFO = 9
"""SEVERITY_NUMBER_INFO."""
PASSING = (429, 502, 503, 504)
"""Statuses after which the same request may be sent again (OTLP/HTTP, "Retryable Response Codes")."""
RECORDS_AT_ONCE, BYTES_AT_ONCE = 100, 1 << 20
"""Of one request; a collector takes 20 MiB by default."""
MAX_ANSWER = 1 << 16
TIMEOUT = httpx.Timeout(30.0)

_INT64, _UINT64 = 1 << 63, 1 << 64


def any_value(value: Any) -> dict[str, Any]:
    """An AnyValue; an integer beyond 64 bits becomes text, a null the empty value."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"stringValue": value}
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)} if -_INT64 <= value < _INT64 else {"stringValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, dict):
        return {"kvlistValue": {"values": attributes(value)}}
    return {"arrayValue": {"values": [any_value(each) for each in value]}}


def attributes(values: dict[str, Any]) -> list[dict[str, Any]]:
    """KeyValues."""
    return [{"key": key, "value": any_value(value)} for key, value in values.items()]


def log_record(record: Record, seen: int) -> dict[str, Any]:
    """One LogRecord; `seen` is when it was read, in Unix nanoseconds. Its body is a line for people."""
    facts = {f"cloister.facts.{key}": value for key, value in record.facts.items()}
    own = {
        "event.name": f"cloister.audit.{record.kind}",
        "cloister.index": record.index,
        "cloister.kind": record.kind,
        "cloister.about": about(record),
        "cloister.names": record.names,
    }
    return {
        "timeUnixNano": str(min(max(0, record.at) * 1_000_000_000, _UINT64 - 1)),
        "observedTimeUnixNano": str(seen),
        "severityNumber": INFO,
        "severityText": "INFO",
        "body": {"stringValue": visible(f"{record.kind}: {about(record)}: {summary(record)}")},
        # Own names begin otherwise than facts do: no fact of an entry passes for one of them.
        "attributes": attributes(own | facts),
    }


def request(records: Sequence[dict[str, Any]], log: str, source: str) -> bytes:
    """An ExportLogsServiceRequest, in ASCII."""
    resource = {"service.name": "cloister", "service.namespace": log, "server.address": source}
    document = {
        "resourceLogs": [
            {
                "resource": {"attributes": attributes(resource)},
                "scopeLogs": [{"scope": {"name": "cloister.audit"}, "logRecords": list(records)}],
            }
        ]
    }
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode()


class OtlpSink:
    """Posts batches to one collector. Follows no redirect, and no proxy that the environment names."""

    def __init__(self, url: str, context: ssl.SSLContext, *, log: str, source: str) -> None:
        self._url, self._log, self._source = url, log, source
        self._client = httpx.Client(verify=context, trust_env=False, follow_redirects=False, timeout=TIMEOUT)

    @property
    def name(self) -> str:
        return f"The collector {self._url}"

    def send(self, records: Sequence[Record]) -> None:
        done = 0
        for some in self._requests(records):
            try:
                self._post(request(some, self._log, self._source))
            except Undelivered as error:
                error.done = done
                raise
            done += len(some)

    def close(self) -> None:
        self._client.close()

    def _requests(self, records: Sequence[Record]) -> Iterator[list[dict[str, Any]]]:
        some: list[dict[str, Any]] = []
        size = 0
        for record in records:
            one = log_record(record, time.time_ns())
            length = len(json.dumps(one))
            if some and (len(some) == RECORDS_AT_ONCE or size + length > BYTES_AT_ONCE):
                yield some
                some, size = [], 0
            some.append(one)
            size += length
        if some:
            yield some

    def _post(self, body: bytes) -> None:
        headers = {"content-type": "application/json", "accept": "application/json", "accept-encoding": "identity"}
        try:
            with self._client.stream("POST", self._url, content=body, headers=headers) as response:
                if not response.is_success:
                    raise _refusal(response)
                answer = _read(response)
        except httpx.TimeoutException as error:
            raise Undelivered("It didn't answer in time.", passing=True) from error
        except httpx.TransportError as error:
            wrong = _certificate_error(error)
            if wrong is not None:
                raise Undelivered(f"Its certificate doesn't hold: {wrong.verify_message}.", passing=False) from error
            raise Undelivered(f"The connection broke: {str(error) or type(error).__name__}.", passing=True) from error
        _check_partial(answer)


def _read(response: httpx.Response) -> bytes:
    """The beginning of an answer: more than `MAX_ANSWER` bytes say nothing that matters."""
    found = b""
    for part in response.iter_bytes():
        found += part
        if len(found) > MAX_ANSWER:
            break
    return found


def _refusal(response: httpx.Response) -> Undelivered:
    status = response.status_code
    if status in PASSING:
        after = retry_after(response.headers.get("retry-after", ""), datetime.now(UTC))
        return Undelivered(f"It answered with HTTP status {status}.", passing=True, after=after)
    if response.has_redirect_location:
        return Undelivered(
            f"It answered with HTTP status {status} and another address; redirects aren't followed.", passing=False
        )
    return Undelivered(f"It answered with HTTP status {status}.", passing=False)


def retry_after(value: str, now: datetime) -> float | None:
    """Seconds until the time that a Retry-After field names (RFC 9110, 10.2.3); None where it names none."""
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        then = parsedate_to_datetime(value)
    except (TypeError, ValueError, IndexError):
        return None
    return max(0.0, ((then if then.tzinfo else then.replace(tzinfo=UTC)) - now).total_seconds())


def _check_partial(answer: bytes) -> None:
    """A collector that took only some says so with status 200, and must not be sent the same again."""
    try:
        partial = json.loads(answer)["partialSuccess"]
        rejected, said = int(partial.get("rejectedLogRecords") or 0), str(partial.get("errorMessage") or "")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    if rejected:
        raise Undelivered(f"It refused {rejected} of them: {said[:300] or 'it gave no reason'}.", passing=False)


def _certificate_error(error: BaseException | None) -> ssl.SSLCertVerificationError | None:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error
        error = error.__cause__ or error.__context__
    return None
