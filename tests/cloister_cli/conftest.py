"""Runs the `cloister` command in this process, which spares each call an interpreter's start."""

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest


@dataclass
class Done:
    """What a command left: its exit status and what it printed."""

    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


class Terminal(io.StringIO):
    """Somebody types."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """run("dataset", "list", stdin="...") -> Done. With `terminal`, a person at a terminal types `stdin`."""
    from cloister_cli.main import main

    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str, stdin: str = "", terminal: bool = False) -> Done:
        monkeypatch.setattr(sys, "argv", ["cloister", *arguments])
        monkeypatch.setattr(sys, "stdin", Terminal(stdin) if terminal else io.StringIO(stdin))
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        output = capsys.readouterr()
        return Done(status, output.out, output.err)

    return call
