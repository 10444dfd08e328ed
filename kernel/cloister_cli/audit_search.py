"""`cloister audit search`: find entries of the audit log, follow it, ship it to a SIEM."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, get_args

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cloister import auditlog
from cloister.auditlog import Page, Record
from cloister.auditwords import about, summary
from cloister.cursor import Cursor
from cloister.delivery import PATIENCE, deliver
from cloister.rendering import one_line
from cloister.session import Session
from cloister.session import open as open_session
from cloister.siem import Destination, open_sink, parse_destination
from cloister_budget.entries import COARSE_SECONDS, Entry
from cloister_cli.choose import ProfileOption, open_chosen
from cloister_cli.moments import FORMS, moment
from cloister_cli.output import note, print_json_line, say
from cloister_data.audit import AuditSearch
from cloister_data.errors import InvalidRequestError

KNOWN_KINDS = tuple(get_args(kind.model_fields["kind"].annotation)[0] for kind in get_args(get_args(Entry)[0]))

Deliver = Callable[[Sequence[Record]], None]
"""Returns when the entries have arrived where they go."""


def search(
    user: Annotated[str | None, typer.Option("--user", help="What this user did.", metavar="NAME")] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="What was done to this dataset.", metavar="OWNER/NAME")
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", help=f"Entries of this kind: {', '.join(KNOWN_KINDS)}. Repeatable.", metavar="KIND"),
    ] = None,
    since: Annotated[str | None, typer.Option("--since", help=f"From then on: {FORMS}.", metavar="WHEN")] = None,
    until: Annotated[str | None, typer.Option("--until", help="Before then.", metavar="WHEN")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what comes, until Ctrl-C; outlives lost connections.")
    ] = False,
    interval: Annotated[
        float, typer.Option("--interval", help="Seconds between looks with --follow.", min=0.1, max=3600)
    ] = 2.0,
    cursor: Annotated[
        Path | None,
        typer.Option(
            "--cursor",
            help="Go on where the last search with this file ended. It is written when entries were delivered.",
            metavar="FILE",
            dir_okay=False,
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="Ship the entries instead of printing them: syslog+tls://HOST:PORT, otlp+https://HOST, and in the "
            "clear syslog+tcp://HOST:PORT, otlp+http://HOST.",
            metavar="URL",
        ),
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option("--ca", help="With --to: trust these certificates (PEM) instead of the system's.", metavar="FILE"),
    ] = None,
    profile: ProfileOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document a line, an entry each.")] = False,
) -> None:
    """Find entries of the audit log (owners and admins), follow it, or ship it to a SIEM.

    Every filter that is given must fit. The log holds whole minutes. An owner learns the names of their own data and
    its users only; others stay refs.
    """
    wanted = _wanted(user, dataset, tuple(kind or ()), since, until)
    destination = _destination(to, ca, as_json)
    if follow and until is not None:
        raise typer.BadParameter("it ends what --follow goes on with.", param_hint="--until")
    with ExitStack() as stack:
        session = stack.enter_context(open_chosen(profile))
        origin = session.checkpoint.origin
        held = stack.enter_context(Cursor.held(cursor, origin, wanted)) if cursor is not None else None
        if held is not None:
            wanted = wanted.model_copy(update={"start": held.following})
        send = stack.enter_context(_delivery(destination, ca, session, as_json))
        with _until_interrupted() if follow else nullcontext():
            found = _run(_pages(session, wanted, interval if follow else None), send, held)
            if destination is not None:
                note(f"Delivered {found} entries.")
            elif not found and not as_json:
                say("Nothing new in the audit log fits." if held is not None else "Nothing in the audit log fits.")


def _run(pages: Iterator[Page], send: Deliver, held: Cursor | None) -> int:
    """Deliver every page; the cursor moves behind what was delivered. How many entries it was."""
    found = 0
    for page in pages:
        send(page.records)
        found += len(page.records)
        if held is not None:
            held.advance(page.following)
    return found


def _pages(session: Session, wanted: AuditSearch, interval: float | None) -> Iterator[Page]:
    if interval is None:
        return auditlog.walk(session, wanted)
    return auditlog.follow(session, lambda: open_session(session.profile), wanted, interval=interval, told=note)


@contextmanager
def _delivery(destination: Destination | None, ca: Path | None, session: Session, as_json: bool) -> Iterator[Deliver]:
    if destination is None:
        yield _print_lines if as_json else _Rows()
        return
    if not destination.encrypted and not destination.here:
        note(f"WARNING: the entries go to {destination.host} in the clear: who did what can be read on the way.")
    sink = open_sink(destination, ca, log=session.checkpoint.origin, source=session.profile.address.host)
    try:
        yield lambda records: deliver(sink, records, note, PATIENCE)
    finally:
        sink.close()


@contextmanager
def _until_interrupted() -> Iterator[None]:
    """Ctrl-C is how following ends: no failure."""
    try:
        yield
    except KeyboardInterrupt:
        note("Ended.")


def _print_lines(records: Sequence[Record]) -> None:
    for record in records:
        print_json_line(record.document())
    # Before the cursor moves: what stays in a buffer isn't delivered.
    sys.stdout.flush()


class _Rows:
    """Prints entries as rows of one table, whose widths don't depend on the rows that are still to come."""

    def __init__(self) -> None:
        self._begun = False

    def __call__(self, records: Sequence[Record]) -> None:
        if not records:
            return
        table = Table(box=None, header_style="bold", pad_edge=False, expand=True, show_header=not self._begun)
        table.add_column("entry", width=8, justify="right")
        table.add_column("time (UTC)", width=16)
        table.add_column("kind", width=18, overflow="fold")
        table.add_column("who, what", ratio=2, overflow="fold")
        table.add_column("facts", ratio=4, overflow="fold")
        for record in records:
            when = (record.time or f"{record.at} s")[:16].replace("T", " ")
            cells = (str(record.index), when, record.kind, about(record), summary(record))
            table.add_row(*(Text(one_line(cell)) for cell in cells))
        Console(highlight=False).print(table)
        sys.stdout.flush()
        self._begun = True


def _wanted(
    user: str | None, dataset: str | None, kinds: tuple[str, ...], since: str | None, until: str | None
) -> AuditSearch:
    for kind in kinds:
        if kind not in KNOWN_KINDS:
            note(f"This version knows no entries of the kind {kind!r}; it asks the cloister for them all the same.")
    first, last = _moment(since, "--since"), _moment(until, "--until")
    if first is not None:
        # Entries hold the minute that they fell into.
        first -= first % COARSE_SECONDS
    try:
        return AuditSearch(user=user, dataset=dataset, kinds=kinds, since=first, until=last)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        raise InvalidRequestError(
            f"Nothing can be searched by this --{str(fault['loc'][0]).removesuffix('s')}.", why=f"{fault['msg']}."
        ) from error


def _moment(text: str | None, option: str) -> int | None:
    if text is None:
        return None
    try:
        return moment(text, time.time())
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def _destination(to: str | None, ca: Path | None, as_json: bool) -> Destination | None:
    if to is None:
        if ca is not None:
            raise typer.BadParameter("it belongs to --to.", param_hint="--ca")
        return None
    if as_json:
        raise typer.BadParameter("with --to nothing is printed.", param_hint="--json")
    return parse_destination(to)
