"""A cloister that starts from a backup of its database: the entries that the backup lacks are put back from a copy.

The log is then the one that clients and witnesses have seen, and every balance is what the log says: a restore never
lowers a spend. What the log can't give back (data, policies, populations) must be in the backup.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from cloister_attest.evidence import EvidenceRecord
from cloister_budget.books import BooksError
from cloister_budget.entries import MAX_PAYLOAD_BYTES, ChargeSettled, Restored
from cloister_budget.journal import Journal
from cloister_budget.replay import Replay
from cloister_budget.tables import Account, ChargeRow, EvidenceRow, Token
from cloister_data.checkpoint import MAX_NOTE, Checkpoint, CheckpointError, log_signature, verify_checkpoint
from cloister_data.errors import ConfigurationError

NOT_IN_A_LOG = ("owner-terms", "population", "upload", "policy", "limits")
"""Kinds of entries that stand for documents or data, of which the log holds digests alone."""

MAX_EVIDENCE_LINE = 8 << 20


@dataclass(frozen=True)
class Copy:
    """A verified copy of this cloister's log: its entries from `first` on, and the signature under all of them."""

    first: int
    entries: tuple[bytes, ...]
    signature: bytes
    evidence: tuple[EvidenceRecord, ...]


def read_copy(directory: Path, here: Checkpoint) -> Copy:
    """The copy in `directory`, a bundle or an export, once it extends the log that the database holds.

    Raises ConfigurationError, which says what is wrong.
    """
    first = here.size
    log = Replay({first})
    missing: list[bytes] = []
    for payload in _lines(directory / "entries.jsonl", MAX_PAYLOAD_BYTES):
        index = log.tree.size
        try:
            log.add(payload)
        except BooksError as error:
            raise _wrong(directory, f"{error.what} {error.why}") from error
        if index >= first:
            missing.append(payload)
            kind = json.loads(payload)["facts"]["kind"]
            if kind in NOT_IN_A_LOG:
                raise _wrong(
                    directory,
                    f"Entry {index}, which the backup lacks, is of the kind {kind!r}: the log holds its digest alone.",
                    "Restore a backup from after that entry.",
                )
    if log.roots.get(first) != here.root:
        raise _wrong(directory, f"It doesn't begin with the {first} entries that the database holds.")
    if not missing:
        raise _wrong(directory, "It holds nothing that the database lacks.", "Start without --restore.")
    return Copy(first, tuple(missing), _signature(directory, here.origin, log), tuple(_evidence(directory, log, first)))


def _signature(directory: Path, origin: str, log: Replay) -> bytes:
    """The signature, by a guard that started in this log, under exactly these entries."""
    try:
        note = (directory / "checkpoint").read_bytes()[:MAX_NOTE].decode()
    except (OSError, UnicodeDecodeError) as error:
        raise _wrong(directory, "Its checkpoint can't be read.") from error
    for key in reversed(log.books.log_keys):
        try:
            found = verify_checkpoint(note, bytes.fromhex(key))
        except CheckpointError:
            continue
        if (found.origin, found.size, found.root) != (origin, log.tree.size, log.tree.root()):
            raise _wrong(directory, "Its checkpoint is for other entries, or another cloister.")
        return log_signature(note, bytes.fromhex(key))
    raise _wrong(directory, "Its checkpoint isn't signed by any guard of this log.")


def _evidence(directory: Path, log: Replay, first: int) -> list[EvidenceRecord]:
    """The evidence of the starts that are put back: without it nobody could verify the log later."""
    found = {}
    try:
        for line in _lines(directory / "evidence.jsonl", MAX_EVIDENCE_LINE):
            record = EvidenceRecord.from_json(line)
            found[record.evidence.digest()] = record
    except ValidationError as error:
        raise _wrong(directory, "Its evidence can't be read.") from error
    starts = [start for start in log.starts if start.index >= first]
    for start in starts:
        if start.facts.evidence not in found:
            raise _wrong(directory, f"It lacks the evidence of the start at entry {start.index}.")
    return [found[start.facts.evidence] for start in starts]


def put_back(session: Session, journal: Journal, copy: Copy) -> None:
    """Write the missing entries and their evidence. The next guard's start must follow in the same transaction."""
    journal.log.put_back(session, copy.entries, copy.signature)
    for record in copy.evidence:
        session.merge(EvidenceRow(digest=record.evidence.digest(), record_json=record.model_dump_json()))


def settle(session: Session, journal: Journal, copy: Copy) -> None:
    """Say in the log that it was restored, close every open charge as wholly spent, and set the accounts by the books.

    How far an open training had come is in the database that is gone.
    """
    journal.append(session, Restored(first=copy.first))
    books = journal.books(session)
    for charge, opened in list(books.open_charges.items()):
        if opened is not None:
            journal.append(session, ChargeSettled(charge=charge, state="committed", steps=opened.steps))
    for row in session.scalars(select(ChargeRow).where(ChargeRow.state == "reserved")):
        row.state, row.steps_marked = "committed", row.steps_total or 0
        row.settled = row.created
    for account in session.scalars(select(Account)):
        held = books.held.get(journal.ref(session, "account", account.id))
        if held is not None:
            account.spent, account.direct_spent = held.loss, held.direct
            account.reserved, account.direct_reserved = (0,) * len(held.loss), 0
    # Whoever signed out since the backup stays signed out.
    session.execute(delete(Token))


def _lines(path: Path, longest: int) -> list[bytes]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigurationError(
            f"{path} can't be read.", why=f"{error.strerror}.", next_step="Name the directory of a copy of the log."
        ) from error
    found = lines[:-1] if lines and not lines[-1] else lines
    if any(len(line) > longest for line in found):
        raise ConfigurationError(f"{path} holds a line that is too long.")
    return found


def _wrong(directory: Path, why: str, next_step: str = "Nothing was changed. Take another copy.") -> ConfigurationError:
    return ConfigurationError(f"The cloister can't be restored from {directory}.", why=why, next_step=next_step)
