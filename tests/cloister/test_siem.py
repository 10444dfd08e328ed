"""Entries of the audit log on their way to syslog and OpenTelemetry receivers, which may be hostile, dead or rude."""

from __future__ import annotations

import json
import re
import socket
import ssl
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister import otlp, syslog
from cloister.auditlog import Record
from cloister.delivery import Patience, Sink, deliver
from cloister.siem import open_sink, parse_destination
from cloister_data.errors import (
    ConfigurationError,
    UnavailableError,
)
from tests.fakes.receivers import Answer, Authority, Collector, SyslogReceiver, frames, free_port

REF, OTHER = "a" * 64, "b" * 64
HOSTILE = (
    'x" kind="login"] [cloister@32473 index="9',
    "two\nlines\r\n<110>1 - - - - - - forged",
    "\x1b]0;title\x07\x1b[2J",
    "\u202eevil\u2066",
    "nul\x00nul",
    'back\\slash\\]\\"\\n',
    "]",
    "\ufeff",
    "\U000e0001tag",
    "ünï©ödé 名前",
)
QUICK = Patience(tries=3, first=0.01)


def record(index: int = 7, name: str = "ann", kind: str = "login", **facts: Any) -> Record:
    return Record(index, 1_700_000_040, kind, {"user": REF} | facts, {REF: name})


class Parsed(NamedTuple):
    """A message as an RFC 5424 parser reads it."""

    priority: int
    version: int
    time: str
    host: str
    app: str
    process: str
    id: str
    elements: dict[str, list[tuple[str, str]]]
    message: str


def parse(content: bytes) -> Parsed:
    """RFC 5424, section 6, read by its grammar alone."""
    head = re.match(
        rb"<(\d{1,3})>([1-9]\d{0,2}) (\S+) ([!-~]{1,255}) ([!-~]{1,48}) ([!-~]{1,128}) ([!-~]{1,32}) ", content
    )
    assert head is not None, content
    assert head[3] == b"-" or re.fullmatch(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z", head[3])
    text = content[head.end() :].decode()
    elements: dict[str, list[tuple[str, str]]] = {}
    at = 0
    assert text.startswith("[")
    while at < len(text) and text[at] == "[":
        name = re.compile(r"[!#-<>-\\^-~]{1,32}").match(text, at + 1)
        assert name is not None
        assert name[0] not in elements
        parameters = elements[name[0]] = []
        at = name.end()
        while text[at] == " ":
            key = re.compile(r' ([!#-<>-\\^-~]{1,32})="').match(text, at)
            assert key is not None, text[at:]
            at = key.end()
            value = ""
            while text[at] != '"':
                assert text[at] != "]", "a bare ] in a value"
                if text[at] == "\\" and text[at + 1] in '"\\]':
                    at += 1
                value += text[at]
                at += 1
            parameters.append((key[1], value))
            at += 1
        assert text[at] == "]"
        at += 1
    assert text[at] == " "
    priority, version, *fields = head.groups()
    return Parsed(int(priority), int(version), *(each.decode() for each in fields), elements, text[at + 1 :])  # type: ignore[arg-type]


def seen(value: str) -> str:
    """What `syslog.visible` was given."""
    return str(json.loads('"' + value.replace('"', '\\"') + '"'))


def check(content: bytes, given: Record) -> None:
    assert not re.search(rb"[\x00-\x1f\x7f]", content)
    found = parse(content)
    assert (found.priority, found.version, found.app, found.process) == (110, 1, "cloister", "-")
    assert [key for key, _ in found.elements["cloister@32473"]] == ["log", "index", "kind"]
    own = dict(found.elements["cloister@32473"])
    assert (seen(own["log"]), own["index"], seen(own["kind"])) == ("cloister/x", str(given.index), given.kind)
    (user,) = [value for key, value in found.elements["facts@32473"] if key == "user"]
    assert all(char.isprintable() for char in user)
    assert seen(user) == given.names[REF]
    assert json.loads(found.message) == {"facts": given.facts, "names": given.names}


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40).filter(lambda key: key != "user"), st.text())
def test_any_name_survives_syslog(name: str, kind: str, key: str, value: str) -> None:
    given = Record(7, 0, kind, {"user": REF, key: value}, {REF: name})
    check(syslog.message(given, "cloister/x", "host"), given)
    stream = syslog.frame(syslog.message(given, "cloister/x", "host")) * 3
    assert frames(stream) == ([syslog.message(given, "cloister/x", "host")] * 3, b"")


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_hostile_names_forge_nothing(name: str) -> None:
    given = Record(7, 0, name, {"user": REF, name: name}, {REF: name})
    check(syslog.message(given, "cloister/x", name), given)
    body = json.loads(otlp.request([otlp.log_record(given, 1)], name, name))
    (logged,) = body["resourceLogs"][0]["scopeLogs"][0]["logRecords"]
    assert logged["body"]["stringValue"].isprintable()
    values = {each["key"]: each["value"] for each in logged["attributes"]}
    assert values["cloister.index"] == {"intValue": "7"}
    assert values["cloister.kind"] == {"stringValue": name}
    assert values["cloister.about"] == {"stringValue": name}


def test_a_parser_that_is_fooled_would_be_noticed() -> None:
    """The control: without the escapes of section 6.3.3 the check fails."""
    given = record(name='x" index="9')
    good = syslog.message(given, "cloister/x", "host")
    with pytest.raises((AssertionError, ValueError)):
        check(good.replace(b'\\"', b'"'), given)


def test_the_form_of_a_message() -> None:
    given = record(name="ann", kind="charge-reserved", epsilon=0.5, steps=None, sources=[{"dataset": OTHER}])
    assert syslog.message(given, "cloister/north", "vm.example").decode() == (
        "<110>1 2023-11-14T22:14:00Z vm.example cloister - charge-reserved "
        '[cloister@32473 log="cloister/north" index="7" kind="charge-reserved"]'
        '[facts@32473 user="ann" epsilon="0.5"] '
        '{"facts":{"user":"' + REF + '","epsilon":0.5,"steps":null,"sources":[{"dataset":"' + OTHER + '"}]},'
        '"names":{"' + REF + '":"ann"}}'
    )
    never = Record(1, 10**18, "", {}, {})
    assert never.time is None
    assert syslog.message(never, "l", "").startswith(b"<110>1 - - cloister - - [cloister@32473 ")


def test_otlp_has_the_field_names_of_the_specification() -> None:
    given = record(parts=[1, 2.5, True, None], big=10**20, nested={"a": "b"})
    assert json.loads(otlp.request([otlp.log_record(given, 5)], "cloister/north", "vm.example")) == {
        "resourceLogs": [
            {
                "resource": {
                    "attributes": [
                        {"key": "service.name", "value": {"stringValue": "cloister"}},
                        {"key": "service.namespace", "value": {"stringValue": "cloister/north"}},
                        {"key": "server.address", "value": {"stringValue": "vm.example"}},
                    ]
                },
                "scopeLogs": [
                    {
                        "scope": {"name": "cloister.audit"},
                        "logRecords": [
                            {
                                "timeUnixNano": "1700000040000000000",
                                "observedTimeUnixNano": "5",
                                "severityNumber": 9,
                                "severityText": "INFO",
                                "body": {"stringValue": "login: ann: signed in"},
                                "attributes": [
                                    {"key": "event.name", "value": {"stringValue": "cloister.audit.login"}},
                                    {"key": "cloister.index", "value": {"intValue": "7"}},
                                    {"key": "cloister.kind", "value": {"stringValue": "login"}},
                                    {"key": "cloister.about", "value": {"stringValue": "ann"}},
                                    {
                                        "key": "cloister.names",
                                        "value": {
                                            "kvlistValue": {"values": [{"key": REF, "value": {"stringValue": "ann"}}]}
                                        },
                                    },
                                    {"key": "cloister.facts.user", "value": {"stringValue": REF}},
                                    {
                                        "key": "cloister.facts.parts",
                                        "value": {
                                            "arrayValue": {
                                                "values": [
                                                    {"intValue": "1"},
                                                    {"doubleValue": 2.5},
                                                    {"boolValue": True},
                                                    {},
                                                ]
                                            }
                                        },
                                    },
                                    {"key": "cloister.facts.big", "value": {"stringValue": "1" + "0" * 20}},
                                    {
                                        "key": "cloister.facts.nested",
                                        "value": {
                                            "kvlistValue": {"values": [{"key": "a", "value": {"stringValue": "b"}}]}
                                        },
                                    },
                                ],
                            }
                        ],
                    }
                ],
            }
        ]
    }  # fmt: skip


def sink(url: str, ca: Path | None = None) -> Sink:
    return open_sink(parse_destination(url), ca, log="cloister/x", source="host")


def ship(url: str, records: list[Record], ca: Path | None = None, patience: Patience = QUICK) -> tuple[list[str], Any]:
    """Deliver; what was told meanwhile, and the seconds that it wanted to wait."""
    told: list[str] = []
    waited: list[float] = []
    with closing(sink(url, ca)) as to:
        deliver(to, records, told.append, patience, waited.append)
    return told, waited


def indexes(messages: list[bytes]) -> list[int]:
    return [int(dict(parse(each).elements["cloister@32473"])["index"]) for each in messages]


MANY = [record(index, name=HOSTILE[index % len(HOSTILE)], filler="x" * 300) for index in range(400)]


def test_syslog_over_tcp_takes_a_batch_in_order() -> None:
    with SyslogReceiver() as receiver:
        assert ship(f"syslog+tcp://127.0.0.1:{receiver.port}", MANY) == ([], [])
        ship(f"syslog+tcp://127.0.0.1:{receiver.port}", [record(1000)])
    assert indexes(receiver.messages) == [*range(400), 1000]
    for content, sent in zip(receiver.messages, MANY, strict=False):
        check(content, sent)
    assert receiver.connections == 2


@pytest.mark.parametrize("how", ["drop", "leave"])
@pytest.mark.parametrize("size", [1, 400])
def test_a_receiver_that_goes_halfway_gets_everything_again(how: str, size: int) -> None:
    with SyslogReceiver((how, how)) as receiver:
        told, waited = ship(f"syslog+tcp://127.0.0.1:{receiver.port}", MANY[:size])
    assert indexes(receiver.messages) == list(range(size))
    assert receiver.connections == 3
    assert waited == [0.01, 0.02]
    assert "The connection broke" in told[0] or "closed before" in told[0]


def test_a_receiver_that_never_closes_has_not_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syslog, "TIMEOUT", 0.2)
    with SyslogReceiver(("hold",)) as receiver:
        told, _ = ship(f"syslog+tcp://127.0.0.1:{receiver.port}", [record()])
    assert "or close after them" in told[0]
    assert indexes(receiver.messages) == [7, 7]


def test_a_receiver_that_is_away_comes_back() -> None:
    port = free_port()
    told: list[str] = []
    with ExitStack() as stack, closing(sink(f"syslog+tcp://127.0.0.1:{port}")) as to:
        receivers: list[SyslogReceiver] = []

        def wait(_: float) -> None:
            if len(told) == 2:
                receivers.append(stack.enter_context(SyslogReceiver(port=port)))

        deliver(to, [record()], told.append, QUICK, wait)
    assert len(told) == 2
    assert indexes(receivers[0].messages) == [7]


@pytest.mark.parametrize("corked", [False, True])
def test_an_end_that_comes_before_ours_is_no_confirmation(corked: bool) -> None:
    """A receiver that has read all so far and closes shows the same end as one that has read everything."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as sender,
    ):
        receiver, _ = listener.accept()
        sender.sendall(b"first")
        assert receiver.recv(100) == b"first"
        receiver.close()
        assert sender.recv(1, socket.MSG_PEEK) == b""
        # Corked, it leaves with our end, as it would on a long way: the refusal comes after the receiver's end.
        sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, corked)
        sender.sendall(b"second")
        with pytest.raises(OSError, match="closed before" if corked else "not connected"):
            syslog._end(sender)


def test_a_dead_receiver_ends_with_what_to_do() -> None:
    with pytest.raises(UnavailableError, match=r"from 0 on, after 3 tries") as caught:
        ship(f"syslog+tcp://127.0.0.1:{free_port()}", MANY)
    assert "refused" in caught.value.why
    assert "run the same command again" in caught.value.next_step
    with pytest.raises(UnavailableError, match="The collector"):
        ship(f"otlp+http://127.0.0.1:{free_port()}", MANY)


@pytest.mark.parametrize("how", ["take", "rude"])
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_syslog_over_tls(tmp_path: Path, how: str, version: str) -> None:
    authority = Authority(tmp_path, "right")
    authority.context.maximum_version = ssl.TLSVersion[version]
    with SyslogReceiver((how,), authority.context) as receiver:
        told, _ = ship(f"syslog+tls://127.0.0.1:{receiver.port}", MANY, authority.ca)
    assert told == []
    assert indexes(receiver.messages) == list(range(400))


@pytest.mark.parametrize("how", ["drop", "leave"])
def test_a_tls_receiver_that_goes_halfway_gets_everything_again(tmp_path: Path, how: str) -> None:
    authority = Authority(tmp_path, "right")
    with SyslogReceiver((how,), authority.context) as receiver:
        told, _ = ship(f"syslog+tls://127.0.0.1:{receiver.port}", MANY, authority.ca)
    assert len(told) == 1
    assert indexes(receiver.messages) == list(range(400))


def test_a_certificate_that_does_not_hold_gets_nothing(tmp_path: Path) -> None:
    right, wrong = Authority(tmp_path, "right"), Authority(tmp_path, "wrong")
    elsewhere = Authority(tmp_path, "elsewhere", host="siem.example")
    for authority, ca in ((right, wrong.ca), (right, None), (elsewhere, elsewhere.ca)):
        with SyslogReceiver(context=authority.context) as receiver:
            with pytest.raises(ConfigurationError, match="doesn't take") as caught:
                ship(f"syslog+tls://127.0.0.1:{receiver.port}", [record()], ca)
            assert "certificate" in caught.value.why
        assert receiver.messages == []
        with Collector(context=authority.context) as collector:
            with pytest.raises(ConfigurationError, match="doesn't take") as caught:
                ship(f"otlp+https://127.0.0.1:{collector.port}", [record()], ca)
            assert "certificate" in caught.value.why
        assert collector.requests == []
    # The control: the right authority is enough for both.
    with SyslogReceiver(context=right.context) as receiver, Collector(context=right.context) as collector:
        ship(f"syslog+tls://127.0.0.1:{receiver.port}", [record()], right.ca)
        ship(f"otlp+https://127.0.0.1:{collector.port}", [record()], right.ca)
    assert (len(receiver.messages), len(collector.requests)) == (1, 1)


def test_a_tls_receiver_that_speaks_plainly_is_tried_and_left(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "right")
    with SyslogReceiver(("drop",) * 3) as receiver, pytest.raises(UnavailableError):
        ship(f"syslog+tls://127.0.0.1:{receiver.port}", [record()], authority.ca)
    assert receiver.messages == []


def numbers(collector: Collector) -> list[int]:
    found = []
    for each in collector.records():
        values = {attribute["key"]: attribute["value"] for attribute in each["attributes"]}
        found.append(int(values["cloister.index"]["intValue"]))
    return found


def test_a_collector_gets_requests_of_bounded_size() -> None:
    with Collector() as collector:
        assert ship(f"otlp+http://127.0.0.1:{collector.port}", MANY) == ([], [])
        ship(f"otlp+http://localhost:{collector.port}/other/path", [record(1000, big="x" * 60_000)] * 40)
    assert numbers(collector) == [*range(400)] + [1000] * 40
    assert [path for path, _, _ in collector.requests[:5]] == ["/v1/logs"] * 4 + ["/other/path"]
    assert len(collector.requests) > 6
    _, headers, _ = collector.requests[0]
    assert headers["content-type"] == "application/json"
    assert all(len(json.dumps(body)) < 2 << 20 for _, _, body in collector.requests)


def test_a_busy_collector_is_asked_again_when_it_says() -> None:
    plan: tuple[Answer, ...] = (
        (200, {}, b"{}"),
        (429, {"retry-after": "7"}, b""),
        (503, {"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"}, b""),
        (200, {}, b'{"partialSuccess":{}}'),
        (502, {"retry-after": "99999999"}, b""),
        (504, {}, b"not JSON"),
    )
    with Collector(plan) as collector:
        told, waited = ship(f"otlp+http://127.0.0.1:{collector.port}", MANY, patience=Patience(4, 0.01, 60))
    # What was taken isn't sent again.
    sent = numbers(collector)
    assert sorted(set(sent)) == list(range(400))
    assert sent.count(0) == 1
    assert sent.count(100) == 3
    assert waited == [7.0, 0.02, 60, 0.02]
    assert "status 429" in told[0]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ((307, {"location": "http://127.0.0.1:1/v1/logs"}, b""), "redirects aren't followed"),
        ((400, {}, b"\x1b[2Jno"), "status 400"),
        ((401, {"www-authenticate": "Basic"}, b""), "status 401"),
        ((500, {}, b""), "status 500"),
        (
            (200, {}, b'{"partialSuccess":{"rejectedLogRecords":"2","errorMessage":"too old"}}'),
            "refused 2 of them: too old",
        ),
    ],
)
def test_what_a_collector_refuses_is_not_tried_again(answer: Answer, why: str) -> None:
    with Collector((answer,)) as collector:
        with pytest.raises(ConfigurationError, match="from 7 on") as caught:
            ship(f"otlp+http://127.0.0.1:{collector.port}", [record()])
        assert why in caught.value.why
    assert len(collector.requests) == 1


def test_no_proxy_of_the_environment_sees_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with Collector() as collector:
        ship(f"otlp+http://127.0.0.1:{collector.port}", [record()])
    assert len(collector.requests) == 1


def test_retry_after() -> None:
    now = datetime(2026, 3, 1, 12, tzinfo=UTC)
    assert otlp.retry_after("120", now) == 120
    assert otlp.retry_after("Sun, 01 Mar 2026 12:01:00 GMT", now) == 60
    assert otlp.retry_after("Sun, 01 Mar 2026 11:00:00 GMT", now) == 0
    for wrong in ("", "-1", "soon", "١٢", "1e9"):
        assert otlp.retry_after(wrong, now) is None


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("syslog+tcp://127.0.0.1:514", ("syslog+tcp", "127.0.0.1", 514, "")),
        ("syslog+tls://siem.example:6514/", ("syslog+tls", "siem.example", 6514, "")),
        ("syslog+tls://siem.example:443", ("syslog+tls", "siem.example", 443, "")),
        ("otlp+https://siem.example", ("otlp+https", "siem.example", 4318, "/v1/logs")),
        ("otlp+https://siem.example:443/v1/logs", ("otlp+https", "siem.example", 443, "/v1/logs")),
        ("otlp+http://[::1]/a%20b", ("otlp+http", "::1", 4318, "/a%20b")),
        ("syslog+tls://bücher.example:6514", ("syslog+tls", "xn--bcher-kva.example", 6514, "")),
    ],
)
def test_addresses(url: str, found: tuple[str, str, int, str]) -> None:
    parsed = parse_destination(url)
    assert (parsed.scheme, parsed.host, parsed.port, parsed.path) == found
    assert parsed.encrypted == (parsed.scheme in ("syslog+tls", "otlp+https"))
    assert parsed.here == (parsed.host in ("127.0.0.1", "::1"))


@pytest.mark.parametrize(
    "url",
    [
        "siem.example:514",
        "syslog://siem.example:514",
        "syslog+udp://siem.example:514",
        "https://siem.example",
        "syslog+tcp://siem.example",
        "syslog+tls://siem.example:6514/path",
        "syslog+tcp://:514",
        "syslog+tcp://siem.example:0",
        "otlp+https://siem.example:99999",
        "otlp+https://ann:secret@siem.example",
        "otlp+https://siem.example/v1/logs?key=secret",
        "otlp+https://siem.example/#x",
        "otlp+https://siem example",
        "otlp+https://siem.example\n",
        "otlp+https://[::1",
        "",
    ],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ConfigurationError, match="isn't a receiver's address") as caught:
        parse_destination(url)
    assert "otlp+https://" in caught.value.next_step


def test_a_file_of_authorities_must_be_one_and_be_of_use(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    for file in ("ca.pem", "none.pem"):
        with pytest.raises(ConfigurationError, match="can't be read"):
            sink("otlp+https://127.0.0.1:1", tmp_path / file)
    with pytest.raises(ConfigurationError, match="encrypted"):
        sink("otlp+http://127.0.0.1:1", tmp_path / "ca.pem")
