"""An owner's own copy of a cloister's audit log, which only ever grows. What was signed for is on the disk first.

state.json       how many entries were signed for, the tree head over them, and the last signature
entries.jsonl    the entries' bytes, a line each
evidence.jsonl   the evidence of the guards' starts
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, ValidationError

from cloister.profile import read_wire, write_private
from cloister_attest.evidence import EvidenceRecord
from cloister_budget.books import BooksError
from cloister_budget.entries import MAX_PAYLOAD_BYTES
from cloister_budget.merkle import LogVerificationError
from cloister_budget.replay import Replay
from cloister_data.base import Wire
from cloister_data.checkpoint import MAX_NOTE, MAX_SIZE, Checkpoint, verify_checkpoint
from cloister_data.cosignature import MAX_LINE, cosign
from cloister_data.errors import ConfigurationError, StorageError


class MirrorState(Wire):
    """`note` is the guard's signed checkpoint of `size` entries, `cosignature` the witness's line under it."""

    origin: str = Field(max_length=255)
    size: int = Field(ge=0, le=MAX_SIZE)
    root: bytes = Field(min_length=32, max_length=32)
    note: str = Field(max_length=MAX_NOTE)
    cosignature: str = Field(max_length=MAX_LINE)


class Mirror:
    """One witness's copy of one log. Usable from several threads, and held by one process at a time."""

    def __init__(self, directory: Path, name: str, key: Ed25519PrivateKey) -> None:
        """Read what is there, and check all of it. `name` signs as `cosignature.witness_name`.

        Raises ConfigurationError where the copy is damaged.
        """
        self._directory, self._name, self._key = directory, name, key
        self._lock = threading.Lock()
        self._log = Replay()
        self.state = read_wire(directory / "state.json", MirrorState)
        self._load()

    def position(self) -> tuple[int, str]:
        """(how many entries were signed for, the signature line under them)."""
        with self._lock:
            return (self.state.size, self.state.cosignature) if self.state else (0, "")

    def extend(
        self, start: int, entries: Sequence[bytes], evidence: Sequence[bytes], note: str, log_key: bytes
    ) -> Checkpoint:
        """Take entries from the index `start` on, which lead to the signed checkpoint `note`, and sign for them.

        `evidence` are the records of the guards' starts among them, which are kept beside them.

        Raises LogVerificationError where they don't extend what was signed for before, or break a rule of the books, or
        CheckpointError; StorageError where they can't be kept. Nothing was signed then.
        """
        checkpoint = verify_checkpoint(note, log_key)
        with self._lock:
            if self.state is not None and checkpoint.origin != self.state.origin:
                raise _forked(f"It is called {checkpoint.origin!r}, and was {self.state.origin!r}.")
            if checkpoint.size != start + len(entries):
                raise _forked("Its checkpoint doesn't cover the entries that came with it.")
            known = self._log.tree.size
            if start > known:
                raise _forked(f"It shows entries from {start} on, and {known} are known.")
            # Another guard on the same log may have shown some of them meanwhile.
            fresh = entries[known - start :]
            if checkpoint.size < known or (not fresh and self.state is not None and checkpoint.size < self.state.size):
                return checkpoint
            begun = len(self._log.starts)
            self._check(fresh, checkpoint)
            shown = {digest: record for record in evidence if (digest := _digest(record)) is not None}
            wanted = [start.facts.evidence for start in self._log.starts[begun:]]
            if not shown.keys() >= set(wanted):
                self._forget()
                raise _forked("It lacks the evidence of a guard's start, without which nobody could restore from it.")
            if fresh or self.state is None or self.state.size != checkpoint.size:
                self._keep(fresh, [shown[digest] for digest in wanted], checkpoint, note)
        return checkpoint

    def _check(self, fresh: Sequence[bytes], checkpoint: Checkpoint) -> None:
        try:
            for payload in fresh:
                self._log.add(payload)
            if self._log.tree.root() == checkpoint.root:
                return
            why = f"Its first {checkpoint.size} entries lead to another root than the signed one."
        except BooksError as error:
            why = f"{error.what} {error.why}"
        self._forget()
        raise _forked(why)

    def _forget(self) -> None:
        """What was added and not kept is in memory alone."""
        self._log = Replay()
        self._load()

    def _keep(self, fresh: Sequence[bytes], evidence: Sequence[bytes], checkpoint: Checkpoint, note: str) -> None:
        """On the disk, in this order: the entries, then the state that counts them; only then anything is signed."""
        line = cosign(checkpoint, self._name, self._key, int(time.time()))
        state = MirrorState(
            origin=checkpoint.origin, size=checkpoint.size, root=checkpoint.root, note=note, cosignature=line
        )
        try:
            _append(self._directory / "evidence.jsonl", evidence)
            _append(self._directory / "entries.jsonl", fresh)
            write_private(self._directory / "state.json", state.to_json())
            _sync(self._directory)
        except (OSError, StorageError) as error:
            # Which of the two states is on the disk decides.
            self.state = read_wire(self._directory / "state.json", MirrorState)
            self._forget()
            raise StorageError(
                "The copy of the audit log can't be written, so nothing was signed.",
                why=f"{error}.",
                next_step=f"Make room in {self._directory}, then serve again.",
            ) from error
        self.state = state

    def _load(self) -> None:
        """The entries that the state counts. Any after them were never signed for, and are cut off."""
        path = self._directory / "entries.jsonl"
        wanted = self.state.size if self.state else 0
        end = 0
        try:
            if wanted:
                with path.open("rb") as file:
                    for _ in range(wanted):
                        line = file.readline(MAX_PAYLOAD_BYTES + 2)
                        if not line.endswith(b"\n"):
                            break
                        self._log.add(line[:-1])
                        end += len(line)
            if path.exists() and path.stat().st_size > end:
                with path.open("r+b") as file:
                    file.truncate(end)
            _cut_torn_line(self._directory / "evidence.jsonl")
        except OSError as error:
            raise ConfigurationError(f"{path} can't be read.", why=f"{error.strerror}.") from error
        except BooksError as error:
            raise _damaged(self._directory, f"{error.what} {error.why}") from error
        if self.state is not None and (self._log.tree.size, self._log.tree.root()) != (wanted, self.state.root):
            raise _damaged(self._directory, "Its entries aren't those that it signed for.")


def write_bundle(source: Path, directory: Path) -> Checkpoint:
    """Copy a mirror, also of a witness that runs, as a new directory that a cloister can be restored from.

    Raises ConfigurationError, StorageError.
    """
    state = read_wire(source / "state.json", MirrorState)
    if state is None:
        raise ConfigurationError(
            f"There is no copy of an audit log in {source}.", next_step="It is made by: cloister owner serve."
        )
    try:
        directory.mkdir(mode=0o700)
        with (source / "entries.jsonl").open("rb") as entries, (directory / "entries.jsonl").open("wb") as copy:
            for _ in range(state.size):
                copy.write(entries.readline(MAX_PAYLOAD_BYTES + 2))
        shutil.copyfile(source / "evidence.jsonl", directory / "evidence.jsonl")
        (directory / "checkpoint").write_text(state.note, "utf-8")
    except FileExistsError as error:
        raise ConfigurationError(
            f"{directory} is there already.", next_step="Name a directory that doesn't exist yet."
        ) from error
    except OSError as error:
        raise StorageError(f"The copy can't be written to {directory}.", why=f"{error.strerror}.") from error
    return Checkpoint(state.origin, state.size, state.root)


def _append(path: Path, lines: Sequence[bytes]) -> None:
    if lines:
        with path.open("ab") as file:
            file.write(b"".join(line + b"\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())


def _cut_torn_line(path: Path) -> None:
    """What a crash left of a line would spoil the next one."""
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def _digest(record: bytes) -> str | None:
    """That of the evidence in a record of a guard's start; None where it isn't one, on one line."""
    try:
        return None if b"\n" in record else EvidenceRecord.from_json(record).evidence.digest()
    except ValidationError:
        return None


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _forked(why: str) -> LogVerificationError:
    return LogVerificationError(
        "The cloister's audit log isn't the one that this witness has signed for.",
        why=why,
        next_step="Nothing was signed and nothing unlocked. Ask the operator; your copy of the log is the proof.",
    )


def _damaged(directory: Path, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"The copy of the audit log in {directory} is damaged.",
        why=why,
        next_step="Put it back from your own backup of that directory. Without it the witness signs for nothing.",
    )
