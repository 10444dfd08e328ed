"""Collateral on disk: one file for each piece, with where it came from, when, and until when it holds.

It holds nothing secret, and nothing in it is believed: what is chosen from it is judged like any other piece.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from cloister_attest.collateral.dates import age_of, dates_of
from cloister_attest.collateral.items import Item, Kind
from cloister_attest.collateral.needs import Piece, pieces_of_snp, pieces_of_tdx
from cloister_attest.outcome import EvidenceError
from cloister_data.base import UnixSeconds, Wire
from cloister_data.errors import ConfigurationError, StorageError
from cloister_data.files import replace_whole
from cloister_data.policy import Platform

FETCH = "cloister attest fetch-collateral"
MAX_FILE = 12 << 20
"""Above what an item of the largest content and chain takes in base64."""
MAX_FILES = 4096
_LOCK = "lock"
_SUFFIX = ".json"

Put = Literal["stored", "replaced", "repaired", "same", "kept"]


class Stored(Wire):
    """A piece as it lies on disk. `source` is the URL or the file's name that it came from."""

    format: Literal[1] = 1
    item: Item
    source: str = Field(max_length=2048)
    fetched: UnixSeconds = Field(ge=0)


@dataclass(frozen=True)
class Entry:
    """What the store knows about a piece. The dates are None where its content can't be read."""

    kind: Kind
    name: str
    source: str
    fetched: int
    valid_from: datetime | None
    valid_until: datetime | None


class CollateralStore:
    """The pieces below one directory. Several processes may use it at once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def get(self, piece: Piece) -> Item | None:
        """One piece; None where there is none. Raises ConfigurationError where its file is damaged."""
        stored = _read(self._path(piece))
        return None if stored is None else stored.item

    def read_all(self) -> tuple[Item, ...]:
        """Every piece. Raises ConfigurationError for a file that is damaged."""
        return tuple(stored.item for stored in self._all())

    def relevant(self, platform: Platform, report: bytes, certificates: Iterable[bytes]) -> tuple[Item, ...]:
        """The pieces that could serve an appraisal of this evidence; no other file is read.

        Args:
            report: the SNP report or TDX quote, which may be hostile.
            certificates: what came with it, DER.

        Raises ConfigurationError for a file of these that is damaged.
        """
        if platform == "tdx":
            return self._of(pieces_of_tdx(report))
        if platform != "sev-snp":
            return ()
        given = tuple(certificates)
        wanted = pieces_of_snp(report, given)
        found = self._of(wanted)
        # A report of version 2 doesn't say its product; its signer's certificate, which may be here, does.
        leaf = tuple(item.content for item in found if item.kind == "amd-vcek")
        further = tuple(piece for piece in pieces_of_snp(report, (*given, *leaf)) if piece not in wanted)
        return found + self._of(further)

    def put(self, item: Item, source: str, fetched: int) -> Put:
        """Keep `item`, which came from `source` at `fetched` (Unix seconds); the answer says what became of it.

        "kept" is another piece that is there and was issued later. Only one that can't be read ("repaired"), or that
        claims to come from after `fetched`, gives way to an earlier one. Raises StorageError.
        """
        fresh = Stored(item=item, source=source[:2048], fetched=fetched)
        path = self._path(Piece(item.kind, item.name))
        with self._locked():
            outcome = self._outcome(path, item, fetched)
            if outcome != "kept":
                try:
                    replace_whole(path, lambda file: file.write(fresh.to_json()))
                except OSError as error:
                    raise _cannot_write(path, error) from error
        return outcome

    def list(self) -> tuple[Entry, ...]:
        """Every piece with its dates, sorted. Raises ConfigurationError for a file that is damaged."""
        entries = []
        for stored in self._all():
            try:
                dates = dates_of(stored.item)
            except EvidenceError:
                dates = None
            entries.append(
                Entry(
                    kind=stored.item.kind,
                    name=stored.item.name,
                    source=stored.source,
                    fetched=stored.fetched,
                    valid_from=dates.valid_from if dates else None,
                    valid_until=dates.valid_until if dates else None,
                )
            )
        return tuple(entries)

    def _outcome(self, path: Path, item: Item, fetched: int) -> Put:
        try:
            held = _read(path)
        except ConfigurationError:
            return "repaired"
        if held is None:
            return "stored"
        try:
            known, fresh = age_of(held.item), age_of(item)
            lapsed = not dates_of(held.item).include(fetched)
        except EvidenceError:
            return "repaired" if _readable(item) or not _readable(held.item) else "kept"
        if known.issued.timestamp() > fetched >= fresh.issued.timestamp():
            return "replaced"
        if fresh.issued < known.issued or (fresh.evaluation < known.evaluation and not lapsed):
            return "kept"
        return "same" if held.item == item else "replaced"

    def _of(self, pieces: Iterable[Piece]) -> tuple[Item, ...]:
        found = (_read(self._path(piece)) for piece in pieces)
        return tuple(stored.item for stored in found if stored is not None)

    def _all(self) -> Iterator[Stored]:
        try:
            paths = sorted(path for path in self.directory.iterdir() if path.suffix == _SUFFIX and path.name[0] != ".")
        except FileNotFoundError:
            return
        except OSError as error:
            raise ConfigurationError(f"{self.directory} can't be read.", why=f"{error.strerror}.") from error
        for path in paths[:MAX_FILES]:
            stored = _read(path)
            if stored is not None:
                yield stored

    def _path(self, piece: Piece) -> Path:
        return self.directory / f"{piece.kind}.{piece.name}{_SUFFIX}"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Only one process at a time compares and replaces."""
        path = self.directory / _LOCK
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _cannot_write(path, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _readable(item: Item) -> bool:
    try:
        dates_of(item)
    except EvidenceError:
        return False
    return True


def _read(path: Path) -> Stored | None:
    """None where there is no such file. Raises ConfigurationError where it is damaged, or isn't what its name says."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigurationError(f"{path} can't be read.", why=f"{error.strerror}.") from error
    try:
        if len(content) > MAX_FILE:
            raise _damaged(path, f"It is larger than {MAX_FILE} bytes")
        stored = Stored.from_json(content)
    except ValidationError as error:
        raise _damaged(path, error.errors(include_url=False, include_input=False)[0]["msg"]) from error
    if path.name != f"{stored.item.kind}.{stored.item.name}{_SUFFIX}":
        raise _damaged(path, f"It holds {stored.item.kind} {stored.item.name}, which isn't what its name says")
    return stored


def _damaged(path: Path, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"The collateral in {path} is damaged.",
        why=f"{why}.",
        next_step=f"Fetch it again, or remove the file: {FETCH} EVIDENCE.",
    )


def _cannot_write(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path} can't be written.",
        why=f"{error.strerror}.",
        next_step="Check the free space and the permissions of that folder.",
    )
