"""Exit statuses, help, and errors as people and programs see them."""

import subprocess
import sys

import pytest

from tests.cloister_cli.conftest import Run

COMMANDS = (
    "demo",
    "connect",
    "lab",
    "serve",
    "dataset upload",
    "dataset list",
    "dataset show",
    "user add",
    "user list",
    "user hash-password",
    "policy show",
    "policy set",
    "budget show",
    "attest measure",
    "audit search",
    "audit receipt",
    "audit export",
    "audit verify",
)


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("CLOISTER_HOME", str(tmp_path))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    from typer.testing import CliRunner

    from cloister_cli.main import app

    done = CliRunner().invoke(app, [*command.split(), "--help"])
    assert done.exit_code == 0
    assert len(done.output) > 200
    # Square brackets are markup to the help's renderer: unescaped, a table's name vanishes.
    assert "[]" not in done.output
    if command == "dataset upload":
        assert "[[columns]]" in done.output
        assert "[users]" in done.output


def test_the_command_line_itself(run: Run) -> None:
    done = run("--help")
    assert done.returncode == 0
    for command in COMMANDS:
        assert command.split()[0] in done.stdout
    assert run("--version").stdout.startswith("cloister ")


def test_wrong_usage_is_status_2(run: Run) -> None:
    for arguments in (["dataset", "upload"], ["nonsense"], ["user", "add", "x", "--role", "king"]):
        done = run(*arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def test_a_refusal_is_status_1_and_says_what_to_do_next(run: Run) -> None:
    done = run("budget", "show")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "No cloister is known" in done.stderr
    assert "Next: Connect first: cloister connect URL --trust FILE" in done.stderr
    assert "Traceback" not in done.stderr


def test_connect_needs_a_trust_file_an_address_and_a_cloister(run: Run) -> None:
    done = run("connect", "https://127.0.0.1:1")
    assert done.returncode == 1
    assert "needs a trust file" in done.stderr
    done = run("connect", "http://127.0.0.1:1", "--trust", "x.toml")
    assert done.returncode == 1
    assert "https://" in done.stderr
    done = run("connect", "https://127.0.0.1:1", "--trust", "/none/x.toml")
    assert done.returncode == 1
    assert "/none/x.toml" in done.stderr


def test_how_often_a_machine_proves_itself_is_bounded(run: Run) -> None:
    for wrong in ("9", "86401", "often"):
        done = run("connect", "https://127.0.0.1:1", "--trust", "x.toml", "--reattest-every", wrong)
        assert done.returncode == 2
        assert "--reattest-every" in done.stderr


def test_hash_password_reads_standard_input(run: Run) -> None:
    from argon2 import PasswordHasher

    done = run("user", "hash-password", "--password-stdin", stdin="correct horse\n")
    assert done.returncode == 0
    assert PasswordHasher().verify(done.stdout.strip(), "correct horse")
    done = run("user", "hash-password", "--password-stdin", stdin="short\n")
    assert done.returncode == 1
    assert "At least 8 characters" in done.stderr
    assert "short\n" not in done.stderr
    assert run("user", "hash-password", stdin="").returncode == 1


def test_the_installed_command_is_the_same() -> None:
    done = subprocess.run([sys.executable, "-m", "cloister_cli.main", "budget", "show"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Next: Connect first" in done.stderr
    assert "Traceback" not in done.stderr
