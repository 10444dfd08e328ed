"""`cloister audit receipt`, `export` and `verify`: what they write, what they refuse, and their exit statuses."""

from __future__ import annotations

import json
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cloister.profile import home
from cloister_data.datasets import SplitRef
from cloister_data.release import Release
from cloister_data.statistics import QueryRequest, Question
from tests.cloister_cli.conftest import Done, Run
from tests.fakes.data import PEOPLE, people
from tests.fakes.running import RunningCloister, make_policy

OWNER, SCIENTIST = "audit-owner", "audit-ann"
DATASET = f"{OWNER}/people"


@dataclass(frozen=True)
class Audited:
    """A cloister with one release of `SCIENTIST`."""

    cloister: RunningCloister
    release: Release


@pytest.fixture(scope="module")
def audited(shared_cloister: RunningCloister) -> Audited:
    shared_cloister.add_user(SCIENTIST, "scientist")
    shared_cloister.upload(DATASET, people(50), PEOPLE, make_policy(DATASET, {SCIENTIST: 2.0}))
    question = Question(source=SplitRef(dataset=DATASET), operation="count")
    request = QueryRequest(request_id=secrets.token_hex(16), question=question, epsilon=0.25)
    return Audited(
        shared_cloister, shared_cloister.session(SCIENTIST).transport.call("POST", "/queries", request, Release)
    )


@pytest.fixture
def receipt(run: Run, audited: Audited, tmp_path: Path) -> Path:
    path = tmp_path / "receipt.json"
    assert run("audit", "receipt", audited.release.release, "--out", str(path), "-p", SCIENTIST).returncode == 0
    return path


@pytest.fixture(scope="module")
def export(audited: Audited, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cloister_cli.main import app

    audited.cloister.session("admin")
    directory = tmp_path_factory.mktemp("audit") / "export"
    done = CliRunner().invoke(app, ["audit", "export", str(directory), "-p", "admin"])
    assert done.exit_code == 0, done.output
    assert f"Verify them: cloister audit verify {directory}" in done.output
    return directory


def refused(done: Done, *said: str) -> None:
    assert (done.returncode, done.stdout) == (1, ""), done
    assert "Traceback" not in done.stderr
    for words in said:
        assert words in done.stderr


def test_a_receipt_is_saved_and_holds(run: Run, audited: Audited, receipt: Path) -> None:
    assert receipt.stat().st_mode & 0o077 == 0
    done = run("audit", "verify", str(receipt))
    assert done.returncode == 0, done.stderr
    assert "The receipt holds: cloister/test-cloister" in done.stdout
    assert f"{SCIENTIST} asked about {DATASET} version 1" in done.stdout
    assert "epsilon 0.25" in done.stdout
    assert "SIMULATED" in done.stdout
    document = json.loads(run("audit", "verify", str(receipt), "--json").stdout)
    assert document["holds"] is True
    assert (document["user"], document["release"]) == (SCIENTIST, audited.release.release)
    assert document["entries"] > document["leaf"]
    trust = ["--trust", str(audited.cloister.trust)]
    assert run("audit", "verify", str(receipt), *trust).returncode == 0


def test_a_receipt_as_json_is_what_the_file_holds(run: Run, audited: Audited, tmp_path: Path) -> None:
    path = tmp_path / "receipt.json"
    # The first digits are enough where they name one.
    done = run("audit", "receipt", audited.release.release[:12], "--out", str(path), "-p", SCIENTIST, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(path.read_text())


def test_a_receipt_of_somebody_else_or_of_nothing(run: Run, audited: Audited, tmp_path: Path) -> None:
    path = tmp_path / "receipt.json"
    audited.cloister.session("admin")
    for wanted, user in ((audited.release.release, "admin"), ("ffffffff0000", SCIENTIST)):
        refused(run("audit", "receipt", wanted, "--out", str(path), "-p", user), "0 of your releases begin with")
    refused(
        run("audit", "receipt", audited.release.release, "--out", "/proc/none/x", "-p", SCIENTIST), "can't be written"
    )
    assert not path.exists()


def test_files_that_are_no_receipts_or_were_altered(run: Run, receipt: Path, tmp_path: Path) -> None:
    refused(run("audit", "verify", str(tmp_path / "none.json")), "no file", "Next:")
    other = tmp_path / "other.json"
    for content in ("", "[]", "\x00", receipt.read_text()[:-9]):
        other.write_text(content)
        refused(run("audit", "verify", str(other)), "isn't a receipt")
    text = receipt.read_text()
    assert text.count('"epsilon":0.25') == 1
    other.write_text(text.replace('"epsilon":0.25', '"epsilon":0.20'))
    refused(run("audit", "verify", str(other), "--json"), "Next:")


def test_a_trust_file_that_is_wrong_or_missing(
    run: Run, audited: Audited, receipt: Path, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = audited.cloister.trust.read_text()
    strict = tmp_path / "strict.toml"
    lines = [line for line in text.splitlines() if not line.startswith("measurements")]
    assert len(lines) == len(text.splitlines()) - 1
    strict.write_text("\n".join(lines) + f'\nmeasurements = ["{"0" * 96}"]\n')
    for path in (receipt, export):
        refused(run("audit", "verify", str(path), "--trust", str(strict)), "isn't proven", "measurement")
        refused(run("audit", "verify", str(path), "--trust", str(tmp_path / "none.toml")), "none.toml")
    # On a computer that never saw this log nobody knows which machine may have written it.
    assert home() != tmp_path
    monkeypatch.setenv("CLOISTER_HOME", str(tmp_path / "elsewhere"))
    for path in (receipt, export):
        refused(run("audit", "verify", str(path)), "isn't known on this computer", "--trust FILE")
        assert run("audit", "verify", str(path), "--trust", str(audited.cloister.trust)).returncode == 0


def test_an_export_holds(run: Run, export: Path) -> None:
    assert {each.name for each in export.iterdir()} == {
        "checkpoint", "entries.jsonl", "evidence.jsonl", "hashes", "names.jsonl"
    }  # fmt: skip
    assert export.stat().st_mode & 0o077 == 0
    done = run("audit", "verify", str(export))
    assert done.returncode == 0, done.stderr
    assert "The log holds: cloister/test-cloister" in done.stdout
    assert f"{DATASET}:{SCIENTIST}" in done.stdout
    document = json.loads(run("audit", "verify", str(export), "--json").stdout)
    assert document["holds"] is True
    assert document["entries"] == len((export / "entries.jsonl").read_bytes().splitlines())
    (account,) = [each for each in document["accounts"] if each["account"] == f"{DATASET}:{SCIENTIST}"]
    assert (account["scope"], account["epsilon"]) == ("user", 2.0)
    assert 0 < account["used_share"] < 0.5


def test_an_export_as_json_and_one_that_cannot_be(run: Run, export: Path, tmp_path: Path) -> None:
    done = run("audit", "export", str(tmp_path / "second"), "-p", OWNER, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["directory"] == str(tmp_path / "second")
    assert document["entries"] >= len((export / "entries.jsonl").read_bytes().splitlines())
    assert len(document["root"]) == 64
    refused(run("audit", "export", str(tmp_path / "second"), "-p", OWNER), "is there already", "Next:")
    refused(run("audit", "export", str(tmp_path / "none" / "third"), "-p", OWNER), "can't be written")
    refused(run("audit", "export", str(tmp_path / "fourth"), "-p", SCIENTIST))


def test_an_export_that_was_altered_names_the_entry(run: Run, export: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(export, copy)
    lines = (copy / "entries.jsonl").read_bytes().splitlines()
    login = next(number for number, line in enumerate(lines) if b'"kind":"login"' in line)
    lines[login] = lines[login].replace(b'"at":', b'"at":1')
    (copy / "entries.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    refused(run("audit", "verify", str(copy), "--json"), f"ntry {login} of the audit log")
    (tmp_path / "empty").mkdir()
    refused(run("audit", "verify", str(tmp_path / "empty")), "isn't a whole export", "Next:")


def test_a_wrong_command_line(run: Run) -> None:
    for arguments in (["receipt"], ["export"], ["verify"], ["verify", "a", "b"], ["nothing"]):
        done = run("audit", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
