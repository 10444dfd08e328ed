"""`cloister audit search` against a real cloister: filters, forms, cursors, following, and shipping to receivers."""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cloister.profile
import cloister.session
from cloister.delivery import Patience
from cloister_cli import audit_search
from cloister_cli.moments import moment
from cloister_data.audit import ENTRIES_IN_A_PAGE
from cloister_data.datasets import SplitRef
from cloister_data.release import Release
from cloister_data.requests import BudgetAnswer, BudgetRequest, BudgetRequestView
from cloister_data.statistics import QueryRequest, Question
from tests.cloister_cli.conftest import Run
from tests.fakes.data import PEOPLE, people
from tests.fakes.receivers import Collector, SyslogReceiver, free_port
from tests.fakes.running import RunningCloister, make_policy, running_cloister

DATASET = "house/people"
HOSTILE = 'eve\n\x1b[2J\u202e"]\\ 0  2026-01-01 00:00  login'


@pytest.fixture(scope="module")
def house() -> Iterator[RunningCloister]:
    with running_cloister() as found:
        found.add_user("ann", "scientist")
        found.upload(DATASET, people(100), PEOPLE, make_policy(DATASET, {"ann": 5.0}))
        question = Question(source=SplitRef(dataset=DATASET), operation="count")
        request = QueryRequest(request_id=secrets.token_hex(16), question=question, epsilon=0.3)
        found.session("ann").transport.call("POST", "/queries", request, Release)
        yield found


def entries(run: Run, *options: str, user: str = "admin") -> list[dict[str, Any]]:
    done = run("audit", "search", "-p", user, "--json", *options)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def sign_in(house: RunningCloister, user: str) -> None:
    """An entry more."""
    session = cloister.session.open(cloister.profile.load(user), need_token=False)
    with session:
        cloister.session.login(session, user, house.passwords[user])


def ask_for_more(house: RunningCloister, times: int) -> None:
    """Two entries each."""
    ann, owner = house.session("ann").transport, house.session("house").transport
    wanted = BudgetRequest(dataset=DATASET, epsilon=1, reason="more")
    for _ in range(times):
        asked = ann.call("POST", "/requests", wanted, BudgetRequestView).request
        refused = BudgetAnswer(refused="no")
        owner.call("POST", f"/requests/{asked}/answer", refused, BudgetRequestView)


def test_people_see_a_table(run: Run, house: RunningCloister) -> None:
    done = run("audit", "search", "-p", "admin")
    assert done.returncode == 0, done.stderr
    head, *rows = [line.split() for line in done.stdout.splitlines()]
    assert head == ["entry", "time", "(UTC)", "kind", "who,", "what", "facts"]
    assert [int(row[0]) for row in rows] == list(range(len(rows)))
    text = done.stdout
    assert "guard-started" in text
    assert "version 1, 100 people of house/people" in text
    assert "count paid: epsilon 0.3 at delta 1e-06" in text
    assert "ann, house/people" in text


def test_programs_get_a_document_a_line(run: Run, house: RunningCloister) -> None:
    found = entries(run)
    assert [each["index"] for each in found] == list(range(len(found)))
    assert all(list(each) == ["index", "at", "time", "kind", "facts", "names"] for each in found)
    assert abs(found[0]["at"] - time.time()) < 600
    assert moment(found[0]["time"], 0) == found[0]["at"]
    created = next(each for each in found if each["kind"] == "user-created" and "ann" in each["names"].values())
    assert created["facts"] == {"user": next(iter(created["names"])), "role": "scientist"}


def test_filters(run: Run, house: RunningCloister) -> None:
    everything = entries(run)
    kinds = [each["kind"] for each in entries(run, "--user", "ann")]
    assert {"user-created", "login", "charge-reserved", "release"} <= set(kinds)
    assert "guard-started" not in kinds
    kinds = [each["kind"] for each in entries(run, "--dataset", DATASET)]
    assert {"upload", "policy", "limits", "charge-reserved", "release"} <= set(kinds)
    assert "login" not in kinds
    found = entries(run, "--kind", "login", "--kind", "upload")
    assert found == [each for each in everything if each["kind"] in ("login", "upload")]
    assert [each["kind"] for each in entries(run, "--user", "ann", "--dataset", DATASET, "--kind", "release")] == [
        "release"
    ]
    assert entries(run, "--since", "1h") == everything
    assert entries(run, "--until", "1h") == []
    assert entries(run, "--since", everything[0]["time"], "--until", "2999-01-01") == everything
    assert entries(run, "--since", "2999-01-01T00:00+01:00") == []
    assert entries(run, "--user", "nobody") == []
    done = run("audit", "search", "-p", "admin", "--kind", "logins")
    assert done.returncode == 0
    assert "Nothing in the audit log fits." in done.stdout
    assert "knows no entries of the kind 'logins'" in done.stderr


def test_owners_learn_their_own_names_and_scientists_nothing(run: Run, house: RunningCloister) -> None:
    found = entries(run, user="house")
    assert len(found) == len(entries(run))
    assert {name for each in found for name in each["names"].values()} == {"house", "ann", DATASET, f"{DATASET}:ann"}
    done = run("audit", "search", "-p", "ann")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Next:" in done.stderr or "role" in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--since", "yesterday"], "2h, 7d before now"),
        (["--until", "2026-13-01"], "2h, 7d before now"),
        (["--follow", "--until", "1h"], "--until"),
        (["--ca", "x.pem"], "--ca"),
        (["--to", "otlp+https://siem.example", "--json"], "--json"),
        (["--cursor", "/"], "--cursor"),
        (["--interval", "0"], "--interval"),
    ],
)
def test_a_wrong_command_line(run: Run, options: list[str], said: str) -> None:
    done = run("audit", "search", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_what_cannot_be_searched_or_shipped(run: Run, house: RunningCloister, tmp_path: Path) -> None:
    for options, said in (
        (["--user", "x" * 65], "--user"),
        (["--kind", "x"] * 33, "--kind"),
        (["--to", "https://siem.example"], "receiver's address"),
        (["--to", "otlp+https://127.0.0.1:1", "--ca", str(tmp_path / "none.pem")], "none.pem"),
    ):
        done = run("audit", "search", "-p", "admin", *options)
        assert (done.returncode, done.stdout) == (1, "")
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_moments() -> None:
    now = 1_000_000.9
    assert moment("90s", now) == 999_910
    assert moment("2h", now) == 992_800
    assert moment("2w", now) == 1_000_000 - 14 * 86400
    assert moment("1970-01-02", now) == 86400
    assert moment("1970-01-02T00:30", now) == 88200
    assert moment("1970-01-02T01:00:00+01:00", now) == 86400
    assert moment("1970-01-01T00:00:00Z", now) == 0
    for wrong in ("", "2", "h", "2 h", "-2h", "2y", "1e3h", "٢h", "today", "1970-02-30"):
        with pytest.raises(ValueError, match="isn't a time"):
            moment(wrong, now)


def test_a_cursor_goes_on_where_it_ended(run: Run, house: RunningCloister, tmp_path: Path) -> None:
    file = tmp_path / "cursor.json"
    everything = entries(run)
    assert entries(run, "--cursor", str(file)) == everything
    assert file.stat().st_mode & 0o077 == 0
    assert entries(run, "--cursor", str(file)) == []
    assert "Nothing new" in run("audit", "search", "-p", "admin", "--cursor", str(file)).stdout
    sign_in(house, "ann")
    assert [each["kind"] for each in entries(run, "--cursor", str(file))] == ["login"]
    done = run("audit", "search", "-p", "admin", "--cursor", str(file), "--kind", "login")
    assert done.returncode == 1
    assert "another search's" in done.stderr
    # A log with fewer entries than were delivered isn't this log.
    file.write_text(file.read_text().replace('"following":', '"following":9'))
    done = run("audit", "search", "-p", "admin", "--cursor", str(file))
    assert done.returncode == 1
    assert "set back" in done.stderr


def test_the_cursor_stands_before_what_was_not_delivered(
    run: Run, house: RunningCloister, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_search, "PATIENCE", Patience(tries=2, first=0.01))
    ship = ["audit", "search", "-p", "admin", "--cursor", str(tmp_path / "cursor.json"), "--to"]
    done = run(*ship, f"syslog+tcp://127.0.0.1:{free_port()}")
    assert (done.returncode, done.stdout) == (1, "")
    assert "Trying again" in done.stderr
    assert "run the same command again" in done.stderr
    with SyslogReceiver(("drop", "drop")) as receiver:
        assert run(*ship, f"syslog+tcp://127.0.0.1:{receiver.port}").returncode == 1
    with Collector(((400, {}, b""),)) as collector:
        done = run(*ship, f"otlp+http://127.0.0.1:{collector.port}")
        assert done.returncode == 1
        assert "from 0 on" in done.stderr
        everything = len(entries(run))
        done = run(*ship, f"otlp+http://127.0.0.1:{collector.port}")
        assert done.returncode == 0, done.stderr
        assert f"Delivered {everything} entries." in done.stderr
        assert "WARNING" not in done.stderr
        assert len(collector.records()) == 2 * everything
        done = run(*ship, f"otlp+http://127.0.0.1:{collector.port}")
        assert "Delivered 0 entries." in done.stderr
        assert len(collector.records()) == 2 * everything


def test_entries_in_the_clear_to_another_computer_are_warned_of(
    run: Run, house: RunningCloister, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Taking:
        name = "it"

        def send(self, records: object) -> None:
            pass

        def close(self) -> None:
            pass

    monkeypatch.setattr(audit_search, "open_sink", lambda *_, **__: Taking())
    for url, warned in (
        ("syslog+tcp://siem.example:514", True),
        ("otlp+http://192.0.2.1", True),
        ("otlp+https://siem.example", False),
        ("syslog+tls://siem.example:6514", False),
        ("syslog+tcp://localhost:514", False),
        ("otlp+http://[::1]:4318", False),
    ):
        done = run("audit", "search", "-p", "admin", "--to", url)
        assert done.returncode == 0
        assert ("in the clear" in done.stderr) == warned, url


def test_hostile_names_steer_no_terminal_and_break_no_line(run: Run, house: RunningCloister) -> None:
    """Whoever has the database can write any name into it."""
    house.add_user("eve", "scientist")
    with contextlib.closing(sqlite3.connect(house.state / "cloister.db", timeout=30)) as database:
        database.execute("UPDATE names SET name = ? WHERE kind = 'user' AND name = 'eve'", (HOSTILE,))
        database.commit()
    done = run("audit", "search", "-p", "admin", "--json", "--kind", "user-created")
    assert all(char.isprintable() or char == "\n" for char in done.stdout)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert HOSTILE in found[-1]["names"].values()
    table = run("audit", "search", "-p", "admin", "--kind", "user-created").stdout
    assert all(char.isprintable() or char == "\n" for char in table)
    assert [line.split()[0] for line in table.splitlines()][1:] == [str(each["index"]) for each in found]
    with SyslogReceiver() as receiver:
        run(
            "audit",
            "search",
            "-p",
            "admin",
            "--kind",
            "user-created",
            "--to",
            f"syslog+tcp://127.0.0.1:{receiver.port}",
        )
    assert len(receiver.messages) == len(found)
    assert b'user="eve\\\\n\\\\u001b[2J\\\\u202e\\"\\]\\\\\\\\ 0 ' in receiver.messages[-1]


def test_all_pages_are_walked(run: Run, house: RunningCloister) -> None:
    ask_for_more(house, 245)
    found = entries(run)
    assert len(found) > ENTRIES_IN_A_PAGE
    assert [each["index"] for each in found] == list(range(len(found)))
    table = run("audit", "search", "-p", "admin").stdout.splitlines()
    assert len(table) == len(found) + 1
    assert len(entries(run, "--kind", "budget-answer")) == 245


class Following:
    """`cloister audit search --follow` as a process of its own."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-m", "cloister_cli.main", "audit", "search", "-p", "admin", "--follow"]
        self.process = subprocess.Popen(
            [*command, "--interval", "0.1", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def interrupt(self) -> tuple[str, str]:
        self.process.send_signal(signal.SIGINT)
        found = self.process.communicate(timeout=20)
        assert self.process.returncode == 0, found
        return found

    def __enter__(self) -> Following:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def shipped(receiver: SyslogReceiver) -> list[int]:
    return [json.loads(each.split(b'index="', 1)[1].split(b'"', 1)[0]) for each in receiver.messages]


def test_following_outlives_the_receiver_and_the_cloister(run: Run, house: RunningCloister, tmp_path: Path) -> None:
    file = tmp_path / "cursor.json"
    port = free_port()
    with (
        SyslogReceiver(port=port) as first,
        Following("--cursor", str(file), "--to", f"syslog+tcp://127.0.0.1:{port}") as shipping,
        Following("--json", "--kind", "login") as printing,
    ):
        until(lambda: len(first.messages) > 10)
        sign_in(house, "ann")
        before = len(entries(run))
        until(lambda: len(first.messages) == before)
        first.__exit__()
        sign_in(house, "ann")
        # Long enough that a delivery fails.
        time.sleep(0.5)
        with SyslogReceiver(port=port) as second:
            until(lambda: len(second.messages) == 1)
            # The cloister goes and comes back under a new key, at the same address.
            address = house.url.rsplit("/", 1)[1]
            assert house.stop() == 0
            config = house.base / "cloister.toml"
            config.write_text(config.read_text().replace('listen = "127.0.0.1:0"', f'listen = "{address}"'))
            house.restart()
            sign_in(house, "ann")
            total = len(entries(run))
            until(lambda: before + len(second.messages) == total)
            until(lambda: json.loads(file.read_text())["following"] == total)
            _, notes = shipping.interrupt()
            printed, said = printing.interrupt()
        assert shipped(first) + shipped(second) == list(range(total))
    assert "Trying again in 1 s" in notes
    assert "Connected again" in said
    logins = [json.loads(line)["index"] for line in printed.splitlines()]
    assert logins == [each["index"] for each in entries(run, "--kind", "login")]
    for text in (notes, said):
        assert text.rstrip().endswith("Ended.")
        assert "Traceback" not in text
    # The next run, of cron for one, goes on from there.
    sign_in(house, "ann")
    assert [each["index"] for each in entries(run, "--cursor", str(file))] == [total]
