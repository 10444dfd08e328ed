"""The runbook's commands are typed into a real cloister, block by block, as a reader would."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from cloister_cli.main import app
from tests.fakes.documents import ROOT, blocks, table

if TYPE_CHECKING:
    from tests.fakes.running import RunningCloister

RUNBOOK = ROOT / "deploy" / "runbook.md"
OWNER, SCIENTIST = "runbook-owner", "runbook-ada"
ASKS_FOR_A_PASSWORD = {("connect",), ("user", "add"), ("user", "hash-password")}


def typed(block_with: str) -> list[list[str]]:
    """The `cloister` lines of the one console block that holds `block_with`, in names of this test's own."""
    found = [block.text for block in blocks(RUNBOOK) if block.info == "console" and block_with in block.text]
    assert len(found) == 1
    text = found[0].replace("hospital-a", OWNER).replace("ada", SCIENTIST)
    return [shlex.split(line[2:])[1:] for line in text.splitlines() if line[2:].startswith("cloister ")]


def run(words: list[str], password: str, cloister: RunningCloister | None, files: Path) -> str:
    for command in ASKS_FOR_A_PASSWORD:
        if tuple(words[: len(command)]) == command:
            words = [*words, "--password-stdin"]
    places = {path.name: str(path) for path in files.iterdir()}
    if cloister is not None:
        places |= {"https://cloister.example.org:8443": cloister.url, "trust.toml": str(cloister.trust)}
    answer = CliRunner().invoke(app, [places.get(word, word) for word in words], input=password + "\n")
    assert answer.exit_code == 0, f"cloister {' '.join(words)}: {answer.output} {answer.exception}"
    return answer.output


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """What the runbook's commands read: the files that it shows, and rows that fit them."""
    for block in blocks(RUNBOOK):
        if block.info == "toml":
            (tmp_path / block.note).write_text(block.text.replace("ada", SCIENTIST), "utf-8")
    for name in ("trial.csv", "staff.csv"):
        (tmp_path / name).write_text("age,systolic,arm\n40,120.5,drug\n52,,placebo\n61,139.0,drug\n", "utf-8")
    return tmp_path


def test_users_and_data(
    shared_cloister: RunningCloister,
    files: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first_password = "a first password"
    monkeypatch.setenv("CLOISTER_HOME", str(tmp_path_factory.mktemp("admin")))
    for words in typed("cloister user add"):
        asked = shared_cloister.passwords["admin"] if words[0] == "connect" else first_password
        shown = run(words, asked, shared_cloister, files)
    assert OWNER in shown
    assert SCIENTIST in shown

    monkeypatch.setenv("CLOISTER_HOME", str(tmp_path_factory.mktemp("owner")))
    for words in typed("cloister dataset upload"):
        run(words, first_password, shared_cloister, files)
    policy = json.loads(run(["policy", "show", f"{OWNER}/trial", "--json"], "", shared_cloister, files))
    assert '"version": 2' in json.dumps(policy), "`policy set` put the next version in force"


def test_the_sample_is_checked_as_the_runbook_says(files: Path) -> None:
    (words,) = [words for words in typed("systemctl daemon-reload") if "--check" in words]
    sample = str(ROOT / "deploy" / "cloister.toml")
    words = [sample if word == "/etc/cloister/cloister.toml" else word for word in words]
    assert "good" in run(words, "", None, files)


def test_a_password_is_hashed(files: Path) -> None:
    (words,) = typed("user hash-password")
    assert run(words, "correct horse battery", None, files).startswith("$argon2id$")


def test_the_metrics_are_fetched_over_a_verified_session(
    shared_cloister: RunningCloister, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOISTER_HOME", str(tmp_path / "home"))
    words = [
        "connect",
        shared_cloister.url,
        "--trust",
        str(shared_cloister.trust),
        "--name",
        "watch",
        "--user",
        "admin",
    ]
    run(words, shared_cloister.passwords["admin"], None, tmp_path)
    (script,) = [block.text for block in blocks(RUNBOOK) if block.info == "sh"]
    script = script.replace("/var/lib/node_exporter", str(tmp_path)).replace("python3 ", f"{sys.executable} ")
    subprocess.run(["sh", "-euc", script], check=True, timeout=60)
    shown = {
        sample.name
        for family in text_string_to_metric_families((tmp_path / "cloister.prom").read_text("utf-8"))
        for sample in family.samples
    }
    assert shown <= {row[0] for row in table(RUNBOOK, "metric")}


def test_what_the_runbook_quotes_is_what_the_program_says() -> None:
    sources = [
        path.read_text("utf-8") for name in ("kernel", "datastore", "budget") for path in (ROOT / name).rglob("*.py")
    ]
    said = " ".join(" ".join(source.split()) for source in sources)
    quoted = [text for row in table(RUNBOOK, "what you see") for text in re.findall(r'"([^"]+)"', row[0])]
    assert len(quoted) >= 5
    for text in quoted:
        assert text in said, f"nothing says {text!r}"
