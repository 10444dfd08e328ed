"""What is printed steers no terminal, and loses nothing for programs."""

import json

import pytest

from cloister_cli.output import print_error, print_json, print_table
from cloister_data.errors import CloisterError

HOSTILE = "a\x1b]0;owned\x07b\u009b2J\u202ec\x7fd"


def test_json_is_the_same_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({HOSTILE: [HOSTILE, "h\u00f4pital"]})
    text = capsys.readouterr().out
    assert json.loads(text) == {HOSTILE: [HOSTILE, "h\u00f4pital"]}
    assert all(char.isprintable() for char in text.replace("\n", ""))
    assert "h\u00f4pital" in text


def test_tables_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["name"], [[HOSTILE]], "none")
    print_error(CloisterError(HOSTILE, why=HOSTILE, next_step=HOSTILE))
    shown = capsys.readouterr()
    assert "owned" in shown.out
    assert "owned" in shown.err
    assert all(char.isprintable() for char in (shown.out + shown.err).replace("\n", ""))
