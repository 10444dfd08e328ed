"""Passwords come from a prompt or from standard input, never from the command line, which other users can see."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cloister_data.errors import InvalidRequestError

MAX_PASSWORD = 1024

PasswordStdin = Annotated[bool, typer.Option("--password-stdin", help="Read the password from standard input.")]


def read_password(from_stdin: bool, prompt: str, *, confirm: bool = False) -> str:
    """Raises InvalidRequestError for an empty or too long one, or where there is no terminal to ask at."""
    if from_stdin:
        password = sys.stdin.readline(MAX_PASSWORD + 2).rstrip("\r\n")
    elif not sys.stdin.isatty():
        raise InvalidRequestError(
            "There is no terminal to ask for the password at.",
            next_step="Pipe it in: ... --password-stdin < FILE.",
        )
    else:
        password = typer.prompt(prompt, hide_input=True, confirmation_prompt=confirm)
    if not 0 < len(password) <= MAX_PASSWORD:
        raise InvalidRequestError(
            "The password is empty." if not password else f"The password is longer than {MAX_PASSWORD} characters.",
            next_step="Give it as one line.",
        )
    return password
