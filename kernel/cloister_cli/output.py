"""What the command line prints: tables, JSON, and errors that say what to do next."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cloister_data.base import Wire
from cloister_data.errors import CloisterError

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document, for programs.")]

REFUSED = 1
"""Exit status where something was refused or failed; 2 is for a wrong command line."""


def say(text: str) -> None:
    """A line for people, on standard output; nobody's text can steer the terminal."""
    Console(highlight=False, soft_wrap=True).print(Text(printable(text)))


def note(text: str) -> None:
    """A line about what is going on, on standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(printable(text), style="dim"))


def print_json(document: Wire | dict[str, Any] | list[Any]) -> None:
    """One JSON document on standard output."""
    value = document.model_dump(mode="json") if isinstance(document, Wire) else document
    sys.stdout.write(_harmless(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)) + "\n")


def print_json_line(document: dict[str, Any]) -> None:
    """One JSON document in one line of standard output (https://jsonlines.org)."""
    sys.stdout.write(_harmless(json.dumps(document, ensure_ascii=False, allow_nan=False)) + "\n")


def _harmless(text: str) -> str:
    """JSON may hold characters that steer a terminal as they are; escaped, they mean the same to a program."""
    return "".join(char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1] for char in text)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], empty: str) -> None:
    """A table, or the sentence `empty` where there are no rows."""
    if not rows:
        say(empty)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console(highlight=False).print(table)


def print_error(error: CloisterError) -> None:
    """What, why, what next; on standard error."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text(printable(error.what), style="bold red"))
    if error.why:
        console.print(Text(printable(error.why)))
    if error.budget is not None:
        facts = error.budget
        console.print(
            Text(
                f"Account {printable(facts.account)}: asked {facts.asked:.4g}, left {facts.left:.4g}, "
                f"would fit {facts.fits:.4g} (epsilon at delta {facts.delta:g}). {printable(facts.hint)}"
            )
        )
    if error.next_step:
        console.print(Text(f"Next: {printable(error.next_step)}", style="cyan"))


@contextmanager
def busy(what: str) -> Iterator[None]:
    """A spinner on a terminal while something takes its time; nothing where nobody looks."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(Text(printable(what))):
        yield


def printable(text: str) -> str:
    """Without control characters, but for line breaks."""
    return "".join(char if char.isprintable() or char == "\n" else " " for char in text)
