"""The audit log as a directory of files, written from a cloister and verified without it.

checkpoint        the signed checkpoint over all entries
entries.jsonl     each entry's bytes, a line each
hashes            each entry's leaf hash, 32 bytes each: it tells which entry is the first that was changed
names.jsonl       what the refs in the entries stand for, as far as whoever exported it may know
evidence.jsonl    the evidence of each start of the guard
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from cloister.judging import judge
from cloister.profile import Remembered
from cloister.session import Session
from cloister_attest.evidence import EvidenceRecord
from cloister_attest.policy import AttestationPolicy
from cloister_budget.entries import COARSE_SECONDS, MAX_PAYLOAD_BYTES, GuardStarted, LeafBody
from cloister_budget.filter import share_up, used_share
from cloister_budget.merkle import HASH_BYTES, Growing, LogVerificationError, leaf_hash
from cloister_budget.refs import ref_of
from cloister_budget.replay import Replay, Start
from cloister_data.audit import MAX_PAGE_BYTES, LogState, NameOpening, NamePage
from cloister_data.base import Wire
from cloister_data.checkpoint import MAX_NOTE, Checkpoint, CheckpointError, verify_checkpoint
from cloister_data.errors import ConfigurationError, StorageError

MAX_LINE = 8 << 20
TOLD_EVERY = 1000
W = TypeVar("W", bound=Wire)

Told = Callable[[int], None]
"""Hears how many entries were done since the last call."""


@dataclass(frozen=True)
class Balance:
    """One account as it follows from the entries: `account` is its name, or its ref where nobody said the name."""

    account: str
    scope: str
    part: int
    epsilon: float | None
    delta: float | None
    used_share: float


@dataclass(frozen=True)
class Verified:
    """What an export comes to, once everything in it holds. `starts` are the guard's; `simulated` if any start was."""

    checkpoint: Checkpoint
    starts: int
    simulated: bool
    balances: tuple[Balance, ...]
    open_charges: int


def write(session: Session, directory: Path, told: Told = lambda done: None) -> Checkpoint:
    """Export the log of a verified session into a new directory. Owners and admins. Raises StorageError.

    Nothing is judged yet: `verify` does that, from the files alone.
    """
    call = session.transport.call
    state = call("GET", "/audit/checkpoint", None, LogState)
    checkpoint = verify_checkpoint(state.checkpoint, state.log_key)
    try:
        directory.mkdir(mode=0o700)
        starts: list[str] = []
        with (directory / "entries.jsonl").open("wb") as entries, (directory / "hashes").open("wb") as hashes:
            for number, payload in enumerate(_entries(session, checkpoint.size), 1):
                entries.write(payload + b"\n")
                hashes.write(leaf_hash(payload))
                if b'"kind":"guard-started"' in payload:
                    starts.append(_start(payload))
                if number % TOLD_EVERY == 0:
                    told(TOLD_EVERY)
        with (directory / "names.jsonl").open("wb") as names:
            for opening in _names(session):
                names.write(opening.to_json() + b"\n")
        with (directory / "evidence.jsonl").open("wb") as evidence:
            for digest in starts:
                record = call("GET", f"/audit/evidence/{digest}", None, EvidenceRecord)
                evidence.write(record.to_json() + b"\n")
        # Last: a directory without it is one that wasn't finished.
        (directory / "checkpoint").write_text(state.checkpoint, "utf-8")
    except FileExistsError as error:
        raise ConfigurationError(
            f"{directory} is there already.", next_step="Name a directory that doesn't exist yet."
        ) from error
    except OSError as error:
        raise StorageError(
            f"The export can't be written to {directory}.",
            why=f"{error.strerror}.",
            next_step="Check the free space and the permissions, remove what was written, and try again.",
        ) from error
    return checkpoint


def _entries(session: Session, size: int) -> Iterator[bytes]:
    done = 0
    while done < size:
        page = session.transport.raw("GET", f"/audit/leaves?start={done}", limit=MAX_PAGE_BYTES)
        lines = page.split(b"\n")[:-1]
        if not lines:
            raise LogVerificationError(
                "The cloister shows fewer entries than its checkpoint covers.",
                why=f"It has {size} entries, and shows {done}.",
                next_step="Ask the operator and the data's owner.",
            )
        yield from lines[: size - done]
        done += len(lines)


def _start(payload: bytes) -> str:
    facts = LeafBody.from_json(payload).facts
    return facts.evidence if isinstance(facts, GuardStarted) else ""


def _names(session: Session) -> Iterator[NameOpening]:
    after = ""
    while page := session.transport.call("GET", f"/audit/names?after={after}", None, NamePage).names:
        yield from page
        after = page[-1].ref


def claimed(directory: Path) -> Checkpoint:
    """What an export's checkpoint says, before anything is verified. Raises ConfigurationError."""
    lines = _read_checkpoint(directory).split("\n")
    if len(lines) < 3 or not lines[1].isdecimal():
        raise ConfigurationError(f"{directory} isn't an export of an audit log.", why="Its checkpoint is damaged.")
    return Checkpoint(lines[0][:255], int(lines[1][:19]), b"")


def verify(
    directory: Path, policy: AttestationPolicy, seen: Remembered | None = None, told: Told = lambda done: None
) -> Verified:
    """Recompute an export from its entries alone: the tree, every balance and every limit, every start's evidence.

    `seen` is the newest checkpoint of this log that this computer remembers. Raises LogVerificationError, which names
    the first entry that is wrong, or ConfigurationError where the directory is no whole export.
    """
    note = _read_checkpoint(directory)
    evidence = {record.evidence.digest(): record for record in _lines(directory / "evidence.jsonl", EvidenceRecord)}
    names = {opening.ref: opening for opening in _lines(directory / "names.jsonl", NameOpening)}
    shown = {digest: _checkpoint_of(record) for digest, record in evidence.items()}
    sizes = {found.size for found in shown.values()} | ({seen.size} if seen else set())
    log = Replay(sizes)
    for payload in _payloads(directory / "entries.jsonl"):
        log.add(payload)
        if log.tree.size % TOLD_EVERY == 0:
            told(TOLD_EVERY)
    _check_size(claimed(directory).size, log)
    checkpoint = _check_signature(note, log)
    _check_tree(directory, checkpoint, log)
    for opening in names.values():
        if ref_of(opening.kind, opening.name, opening.salt) != opening.ref:
            raise _wrong("A name beside the log isn't the one that its entries stand for.", f"Ref {opening.ref}.")
    simulated = False
    for start in log.starts:
        simulated |= _check_start(start, evidence.get(start.facts.evidence), shown, log, policy)
    if seen is not None and seen.size <= checkpoint.size and log.roots[seen.size] != seen.root:
        raise _wrong(
            "This isn't the log that this computer has seen.",
            f"Of its first {seen.size} entries another root was seen: {seen.root.hex()}, not "
            f"{log.roots[seen.size].hex()}.",
        )
    return Verified(checkpoint, len(log.starts), simulated, _balances(log, names), len(log.books.open_charges))


def _check_signature(note: str, log: Replay) -> Checkpoint:
    """The checkpoint, signed by the key of one of the guards that started in this log."""
    for key in reversed(log.books.log_keys):
        try:
            return verify_checkpoint(note, bytes.fromhex(key))
        except CheckpointError:
            continue
    raise _wrong("The checkpoint isn't signed by any guard of this log.", "None of the keys in its entries fits.")


def _check_size(stated: int, log: Replay) -> None:
    """Before the signature: where entries are missing, so may be the guard's start whose key made it."""
    if log.tree.size < stated:
        raise _wrong(
            f"Entry {log.tree.size} of the audit log is missing, and all after it.",
            f"The checkpoint covers {stated} entries.",
        )
    if log.tree.size > stated:
        raise _wrong(
            f"Entry {stated} of the audit log doesn't belong to it, nor do those after it.",
            f"The checkpoint covers {stated} entries only.",
        )


def _check_tree(directory: Path, checkpoint: Checkpoint, log: Replay) -> None:
    if (log.tree.size, log.tree.root()) == (checkpoint.size, checkpoint.root):
        return
    first = _first_changed(directory, checkpoint)
    raise _wrong(
        "An entry of the audit log was changed." if first is None else f"Entry {first} of the audit log was changed.",
        "The entries don't lead to the root that the guard signed.",
    )


def _first_changed(directory: Path, checkpoint: Checkpoint) -> int | None:
    """The first entry that isn't the one that was signed for: told by the list of hashes, where that list is true."""
    try:
        listed = (directory / "hashes").read_bytes()
    except OSError:
        return None
    hashes = [listed[at : at + HASH_BYTES] for at in range(0, len(listed), HASH_BYTES)]
    tree = Growing()
    for found in hashes:
        tree.add(found)
    if (tree.size, tree.root()) != (checkpoint.size, checkpoint.root):
        return None
    pairs = zip(hashes, _payloads(directory / "entries.jsonl"), strict=False)
    return next((index for index, (found, payload) in enumerate(pairs) if leaf_hash(payload) != found), None)


def _check_start(
    start: Start,
    record: EvidenceRecord | None,
    shown: dict[str, Checkpoint],
    log: Replay,
    policy: AttestationPolicy,
) -> bool:
    """Whether the hardware of a start was simulated, once its evidence holds under the trust file, as of then."""
    where = f"The start at entry {start.index} of the audit log"
    if record is None:
        raise _wrong(f"{where} has no evidence in this export.", "Whether a proven machine wrote it can't be told.")
    found = (record.evidence.log_key.hex(), record.evidence.platform)
    if found != (start.facts.log_key, start.facts.platform):
        raise _wrong(f"{where} says something else than its evidence.", "The log key or the platform differs.")
    # A leaf's time is rounded down, and the evidence is from just before it.
    at = start.at + COARSE_SECONDS
    verdict = judge(record.evidence, policy, certificate=record.certificate, nonce=record.nonce, at=at)
    if not verdict.ok:
        failed = "; ".join(f"{check.name}: {check.reason}" for check in verdict.failed)
        raise _wrong(f"{where} was by a machine that isn't proven.", f"Failed checks: {failed}.")
    before = shown[start.facts.evidence]
    if before.size > start.index or log.roots.get(before.size) != before.root:
        raise _wrong(
            f"{where} didn't go on from the log that is here.",
            f"Its evidence shows another root of the first {before.size} entries.",
        )
    return verdict.simulated


def _balances(log: Replay, names: dict[str, NameOpening]) -> tuple[Balance, ...]:
    found = []
    for ref, account in log.books.accounts.items():
        share = used_share(account.ceilings, log.books.held[ref].loss)
        found.append(
            Balance(
                account=names[ref].name if ref in names else ref,
                scope=account.scope,
                part=account.part,
                epsilon=account.limit.epsilon if account.limit else None,
                delta=account.limit.delta if account.limit else None,
                used_share=share_up(share),
            )
        )
    return tuple(sorted(found, key=lambda each: each.account))


def _checkpoint_of(record: EvidenceRecord) -> Checkpoint:
    try:
        return verify_checkpoint(record.evidence.checkpoint, record.evidence.log_key)
    except CheckpointError as error:
        raise _wrong("The checkpoint in a start's evidence doesn't hold.", f"{error}.") from error


def _read_checkpoint(directory: Path) -> str:
    try:
        with (directory / "checkpoint").open("r", encoding="utf-8", newline="") as file:
            return file.read(MAX_NOTE)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{directory} isn't a whole export of an audit log.",
            why="Its checkpoint can't be read.",
            next_step="cloister audit export DIRECTORY writes one.",
        ) from error


def _payloads(path: Path) -> Iterator[bytes]:
    yield from _raw_lines(path, MAX_PAYLOAD_BYTES)


def _lines(path: Path, kind: type[W]) -> Iterator[W]:
    for number, line in enumerate(_raw_lines(path, MAX_LINE), 1):
        try:
            yield kind.from_json(line)
        except ValidationError as error:
            raise _wrong(f"Line {number} of {path} can't be read.", "It was changed since it was written.") from error


def _raw_lines(path: Path, longest: int) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            rest = b""
            while chunk := file.read(longest):
                *lines, rest = (rest + chunk).split(b"\n")
                yield from lines
                if len(rest) > longest:
                    break
            if rest:
                yield rest
    except OSError as error:
        raise ConfigurationError(
            f"{path} can't be read.", why=f"{error.strerror}.", next_step="Export the log once more."
        ) from error


def _wrong(what: str, why: str) -> LogVerificationError:
    return LogVerificationError(
        what, why=why, next_step="Don't rely on this log from there on; ask the operator and the data's owner."
    )
