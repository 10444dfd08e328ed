"""`cloister attest fetch-collateral`: get what a processor's maker publishes and an appraisal takes, and keep it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated

import httpx
import typer

from cloister import profile
from cloister.judging import collateral_store
from cloister_attest.collateral.dates import dates_of, utc
from cloister_attest.collateral.fetch import Hosts, fetch, open_client
from cloister_attest.collateral.items import MAX_CONTENT, Item
from cloister_attest.collateral.needs import Need, Piece, needs_of_snp, needs_of_tdx
from cloister_attest.collateral.offline import identify
from cloister_attest.collateral.store import CollateralStore, Put
from cloister_attest.outcome import EvidenceError
from cloister_attest.snp.products import PRODUCTS, Product
from cloister_cli.attest_evidence import Shown, read_shown
from cloister_cli.output import REFUSED, AsJson, note, print_json, print_table, say
from cloister_data.errors import CloisterError, ConfigurationError

MAX_FILES = 256
_CERTIFICATES = ("amd-ark", "amd-ask", "amd-asvk", "amd-vcek")
_OUTCOMES: dict[Put, str] = {
    "stored": "stored",
    "replaced": "replaced an older one",
    "repaired": "replaced a damaged one",
    "same": "already here",
    "kept": "a later one is here",
}


@dataclass(frozen=True)
class _Row:
    """A piece and its state now: "valid", "expired", "not valid yet" or "unreadable". Dates are RFC 3339, or empty."""

    kind: str
    name: str
    source: str
    valid_from: str
    valid_until: str
    state: str
    outcome: str = ""
    fetched: str = ""

    @property
    def title(self) -> str:
        return f"{self.kind} {_short(self.name)}"

    @property
    def until(self) -> str:
        day = self.valid_until[:10] or "-"
        return day if self.state == "valid" else f"{day} ({self.state.upper()})"


@dataclass
class _Run:
    """What one call of the command came to. A row is what is here in the end, whatever was tried."""

    store: CollateralStore
    now: int
    rows: dict[Piece, _Row] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)

    def keep(self, item: Item, source: str) -> None:
        outcome = self.store.put(item, source, self.now)
        held = (self.store.get(Piece(item.kind, item.name)) if outcome == "kept" else None) or item
        self.here(held, source, _OUTCOMES[outcome])

    def here(self, item: Item, source: str, outcome: str) -> None:
        begins, ends = _dates(item)
        state = _state(begins, ends, self.now)
        row = _Row(item.kind, item.name, source, _stamp(begins), _stamp(ends), state, outcome)
        self.rows[Piece(item.kind, item.name)] = row
        note(f"{row.title}: {source}, {outcome}, valid until {row.until}")

    def failed(self, what: str, why: str, url: str = "") -> None:
        note(f"{what}: {why}")
        self.failures.append({"what": what, "why": why, "url": url})

    def finish(self) -> None:
        """What is here and can't serve is as good as missing."""
        for row in self.rows.values():
            if row.state != "valid":
                self.failed(row.title, f"It is {row.state}, so that every appraisal would refuse it.", row.source)


def fetch_collateral(
    evidence: Annotated[
        list[str] | None,
        typer.Argument(
            help="Evidence, an evidence record, a receipt, an SNP report or a TDX quote; a cloister's name or address.",
            metavar="EVIDENCE",
            show_default=False,
        ),
    ] = None,
    files: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            help="Take the pieces from this file or directory, and don't go to the network. May be repeated.",
            metavar="FILE_OR_DIR",
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", help="Where to keep them; by default where `cloister connect` looks.", metavar="DIR"),
    ] = None,
    amd: Annotated[
        str | None, typer.Option("--amd", help="A mirror of AMD's key distribution service.", metavar="URL")
    ] = None,
    intel: Annotated[
        str | None, typer.Option("--intel", help="A caching service (PCCS) in place of Intel's.", metavar="URL")
    ] = None,
    intel_root: Annotated[
        str | None,
        typer.Option(
            "--intel-root",
            help="The whole address of the list of Intel's root, where it isn't the PCCS's.",
            metavar="URL",
        ),
    ] = None,
    product: Annotated[
        str | None,
        typer.Option("--product", help=f"For SNP reports of version 2: {', '.join(PRODUCTS)}.", metavar="PRODUCT"),
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="Show what is kept, and until when it holds.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fetch the certificates, revocation lists and TCB information that an appraisal of EVIDENCE takes, and keep them.

    They come from AMD's and Intel's public services, which learn the chip's or the platform's number and nothing else.
    Without a network: run the command with --from and an empty directory, which prints the addresses; fetch them with
    `curl --remote-name --dump-header headers.txt URL` on another machine; then name the files with --from.

    Exit status 1 where a piece is missing or has expired; the others are kept.
    """
    store = collateral_store(to)
    now = int(time.time())
    if listing:
        _list(store, now, as_json)
        return
    if not evidence and not files:
        raise typer.BadParameter("name evidence, files with --from, or ask for --list", param_hint="EVIDENCE")
    chosen = _product(product)
    hosts = Hosts.mirrored(amd, intel, intel_root)
    run = _Run(store, now)
    if files:
        _supply(run, files)
    needs = _needs(run, [(where, read_shown(where)) for where in evidence or ()], chosen)
    if files:
        _demand(run, needs)
    elif needs:
        with open_client() as client:
            _fetch(run, needs, client, hosts)
    run.finish()
    _report(run, as_json)
    if run.failures:
        raise typer.Exit(REFUSED)


def _needs(run: _Run, shown: Iterable[tuple[str, Shown]], product: Product | None) -> tuple[Need, ...]:
    """What all the evidence takes, each document once."""
    found: dict[Need, None] = {}
    for where, each in shown:
        if each.platform == "simulated":
            note(f"{where}: simulated hardware, which needs no collateral and protects nothing")
            continue
        try:
            if each.platform == "sev-snp":
                found |= dict.fromkeys(needs_of_snp(each.report, each.certificates, product))
            else:
                found |= dict.fromkeys(needs_of_tdx(each.report))
        except EvidenceError as error:
            run.failed(where, f"{error}.")
    return tuple(found)


def _supply(run: _Run, paths: Sequence[Path]) -> None:
    """Keep what the files hold. A file that was named must hold something; one in a directory may be another thing."""
    contents = list(_files(paths))
    everything = [content for _, content, _ in contents]
    for path, content, was_named in contents:
        try:
            items = identify(content, everything)
        except EvidenceError as error:
            if was_named:
                run.failed(str(path), f"{error}.")
            else:
                note(f"{path}: passed over, for {error}")
            continue
        for item in items:
            # A file's name may hold bytes that are no text; what is kept is text.
            run.keep(item, os.fsencode(path.name).decode(errors="replace"))


def _files(paths: Sequence[Path]) -> Iterable[tuple[Path, bytes, bool]]:
    for path in paths:
        try:
            inside = sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else [path]
            if len(inside) > MAX_FILES:
                raise ConfigurationError(f"{path} holds more than {MAX_FILES} files.", next_step="Name the files.")
            for each in inside:
                yield each, profile.read_bounded(each, limit=MAX_CONTENT), each == path
        except FileNotFoundError as error:
            raise ConfigurationError(f"There is no file {path}.") from error
        except OSError as error:
            raise ConfigurationError(f"{path} can't be read.", why=f"{error.strerror}.") from error


def _demand(run: _Run, needs: Iterable[Need]) -> None:
    """Without a network: each need must be among the files, or here already."""
    for need in needs:
        if not all(piece in run.rows for piece in need.pieces) and not _here(run, need):
            run.failed(need.what, "It isn't among the files: fetch it on another machine.", need.url)


def _fetch(run: _Run, needs: Iterable[Need], client: httpx.Client, hosts: Hosts) -> None:
    for need in needs:
        # A certificate never changes; lists and documents do.
        if need.kind in _CERTIFICATES and _here(run, need):
            continue
        url = hosts.url(need)
        try:
            items = fetch(need, client, hosts)
        except CloisterError as error:
            run.failed(need.what, " ".join(part for part in (error.why, error.next_step) if part), url)
            continue
        for item in items:
            run.keep(item, url)


def _here(run: _Run, need: Need) -> bool:
    """Whether all that no row tells of is kept here and valid now; if so, rows tell it."""
    held = []
    for piece in need.pieces:
        if piece in run.rows:
            continue
        try:
            item = run.store.get(piece)
        except ConfigurationError as error:
            note(str(error))
            return False
        if item is None or _state(*_dates(item), run.now) != "valid":
            return False
        held.append(item)
    for item in held:
        run.here(item, "this computer", _OUTCOMES["same"])
    return True


def _report(run: _Run, as_json: bool) -> None:
    rows = list(run.rows.values())
    if as_json:
        pieces = [{name: value for name, value in asdict(row).items() if name != "fetched"} for row in rows]
        print_json({"directory": str(run.store.directory), "pieces": pieces, "failed": run.failures})
        return
    if rows:
        print_table(
            ["piece", "of", "valid until", "outcome"],
            [[row.kind, _short(row.name), row.until, row.outcome] for row in rows],
            "",
        )
        say(f"Kept in {run.store.directory}.")
    elif not run.failures:
        say("Nothing is needed, and nothing was kept.")
    for each in run.failures:
        say(f"Missing: {each['what']}. {each['why']}" + (f" {each['url']}" if each["url"] else ""))


def _list(store: CollateralStore, now: int, as_json: bool) -> None:
    rows = [
        _Row(
            each.kind,
            each.name,
            each.source,
            _stamp(each.valid_from),
            _stamp(each.valid_until),
            _state(each.valid_from, each.valid_until, now),
            fetched=_stamp(utc(each.fetched)),
        )
        for each in store.list()
    ]
    if as_json:
        pieces = [{name: value for name, value in asdict(row).items() if name != "outcome"} for row in rows]
        print_json({"directory": str(store.directory), "pieces": pieces})
        return
    print_table(
        ["piece", "of", "valid until", "fetched", "from"],
        [[row.kind, _short(row.name), row.until, row.fetched[:10], row.source] for row in rows],
        f"There is no collateral in {store.directory}.",
    )


def _dates(item: Item) -> tuple[datetime | None, datetime | None]:
    try:
        dates = dates_of(item)
    except EvidenceError:
        return None, None
    return dates.valid_from, dates.valid_until


def _state(begins: datetime | None, ends: datetime | None, now: int) -> str:
    if begins is None or ends is None:
        return "unreadable"
    if now < begins.timestamp():
        return "not valid yet"
    return "valid" if now <= ends.timestamp() else "expired"


def _stamp(moment: datetime | None) -> str:
    return "" if moment is None else moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _short(name: str) -> str:
    """A VCEK's name begins with its chip's number, whose start tells it apart."""
    return name if len(name) <= 24 else f"{name[:16]}..{name[-16:]}"


def _product(name: str | None) -> Product | None:
    if name is None:
        return None
    for product in PRODUCTS:
        if name == product:
            return product
    raise typer.BadParameter(f"{name!r} is none of {', '.join(PRODUCTS)}", param_hint="--product")
