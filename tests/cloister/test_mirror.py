"""A witness's own copy of a log: it only grows, what it signed for is on the disk, and nothing else is signed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.mirror import Mirror, write_bundle
from cloister_attest.evidence import Evidence, EvidenceRecord
from cloister_budget.entries import Entry, GuardStarted, LeafBody, Login
from cloister_budget.merkle import Growing, LogVerificationError, leaf_hash
from cloister_data.checkpoint import Checkpoint, CheckpointError, sign_checkpoint
from cloister_data.cosignature import verify_cosignature
from cloister_data.errors import ConfigurationError, StorageError

LOG, WITNESS = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
LOG_KEY = LOG.public_key().public_bytes_raw()
NAME, ORIGIN = "clinic/witness", "cloister/ward"


EVIDENCE = EvidenceRecord(
    evidence=Evidence(
        platform="simulated", report=b"r", certificates=(b"c",), checkpoint="", log_key=LOG_KEY, gpu=None
    ),
    nonce=bytes(32),
    certificate=b"c",
)  # fmt: skip


class Log:
    """What a guard shows."""

    def __init__(self, *users: int) -> None:
        start = GuardStarted(
            evidence=EVIDENCE.evidence.digest(),
            platform="simulated",
            log_key=LOG_KEY.hex(),
            previous_key=None,
            certificate="1" * 64,
        )
        facts: list[Entry] = [start, *(Login(user=f"{user:064x}") for user in users)]
        self.entries = [LeafBody(index=i, at=0, facts=each).canonical() for i, each in enumerate(facts)]

    def note(self, size: int | None = None, origin: str = ORIGIN) -> str:
        tree = Growing()
        for payload in self.entries[:size]:
            tree.add(leaf_hash(payload))
        return sign_checkpoint(Checkpoint(origin, tree.size, tree.root()), LOG)


def show(mirror: Mirror, log: Log, start: int, end: int | None = None, **changes: str) -> Checkpoint:
    entries = log.entries[start:end]
    evidence = [] if start else [EVIDENCE.to_json()]
    return mirror.extend(start, entries, evidence, log.note(end, **changes), LOG_KEY)


def mirror_in(path: Path) -> Mirror:
    return Mirror(path, NAME, WITNESS)


def test_it_signs_for_what_it_holds_and_goes_on_after_a_restart(tmp_path: Path) -> None:
    log = Log(1, 2, 3)
    mirror = mirror_in(tmp_path)
    assert mirror.position() == (0, "")
    show(mirror, log, 0, 2)
    show(mirror, log, 2)
    size, line = mirror_in(tmp_path).position()
    assert size == 4
    assert (tmp_path / "entries.jsonl").read_bytes().splitlines() == log.entries
    tree = Growing()
    for payload in log.entries:
        tree.add(leaf_hash(payload))
    verify_cosignature(Checkpoint(ORIGIN, 4, tree.root()), line, NAME, WITNESS.public_key().public_bytes_raw())
    # What is shown again by another guard is no news, and no harm.
    assert show(mirror, log, 1, 3).size == 3
    assert mirror.position() == (size, line)
    longer = Log(1, 2, 3, 4)
    show(mirror, longer, 2)
    assert mirror.position()[0] == 5


def _unlinked(log: Log) -> Log:
    log.entries.append(LeafBody(index=9, at=0, facts=Login(user="0" * 64)).canonical())
    return log


OTHER = WITNESS.public_key().public_bytes_raw()
ATTACKS: dict[str, Callable[[Mirror, Log], object]] = {
    "fork": lambda mirror, log: show(mirror, Log(1, 9, 3, 4, 5), 4),
    "insert": lambda mirror, log: show(mirror, Log(1, 2, 7, 3, 4), 4),
    "drop": lambda mirror, log: show(mirror, Log(1, 2, 4, 5), 4),
    "reorder": lambda mirror, log: show(mirror, Log(2, 1, 3, 4), 4),
    "edit": lambda mirror, log: mirror.extend(4, [log.entries[3]], [], log.note(), LOG_KEY),
    "short": lambda mirror, log: mirror.extend(4, [], [], log.note(5), LOG_KEY),
    "origin": lambda mirror, log: show(mirror, log, 4, origin="cloister/other"),
    "key": lambda mirror, log: mirror.extend(4, log.entries[4:], [], log.note(), OTHER),
    "unsigned": lambda mirror, log: mirror.extend(4, log.entries[4:], [], log.note()[:-9] + "AAAAAAA=\n", LOG_KEY),
    "beyond": lambda mirror, log: show(mirror, Log(1, 2, 3, 4, 5, 6), 6),
    "a rule of the books": lambda mirror, log: show(mirror, _unlinked(log), 4),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_it_signs_for_no_other_log(tmp_path: Path, attack: str) -> None:
    mirror = mirror_in(tmp_path)
    show(mirror, Log(1, 2, 3, 4), 0, 4)
    before = mirror.position()
    with pytest.raises((LogVerificationError, CheckpointError)):
        ATTACKS[attack](mirror, Log(1, 2, 3, 4))
    assert mirror.position() == before
    assert mirror_in(tmp_path).position() == before
    # The control: the true log goes on, also after the attack.
    show(mirror, Log(1, 2, 3, 4), 4)
    assert mirror.position()[0] == 5


def test_entries_that_were_never_signed_for_are_cut_off_and_missing_ones_end_it(tmp_path: Path) -> None:
    log = Log(1, 2, 3)
    show(mirror_in(tmp_path), log, 0)
    path = tmp_path / "entries.jsonl"
    whole = path.read_bytes()
    # A crash between the entries and the state.
    path.write_bytes(whole + log.entries[-1] + b'\n{"half')
    assert mirror_in(tmp_path).position()[0] == 4
    assert path.read_bytes() == whole
    for damaged in (whole[:-1], whole.replace(b"0002", b"0003", 1), b""):
        path.write_bytes(damaged)
        with pytest.raises(ConfigurationError, match="damaged"):
            mirror_in(tmp_path)


@pytest.mark.parametrize("name", ["entries.jsonl", "state.json"])
def test_what_cannot_be_kept_is_not_signed_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    log = Log(1, 2)
    mirror = mirror_in(tmp_path)
    show(mirror, log, 0, 2)
    before = mirror.position()

    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("cloister.mirror._append" if name == "entries.jsonl" else "cloister.mirror._sync", full)
        if name == "state.json":
            patched.setattr("cloister.mirror.write_private", full)
        with pytest.raises(StorageError, match="nothing was signed"):
            show(mirror, log, 2)
    assert mirror.position() == before
    show(mirror, log, 2)
    assert mirror.position()[0] == 3
    assert mirror_in(tmp_path).position()[0] == 3


def test_a_bundle_is_what_was_signed_for(tmp_path: Path) -> None:
    log = Log(1, 2, 3)
    with pytest.raises(ConfigurationError, match="no copy"):
        write_bundle(tmp_path, tmp_path / "early")
    show(mirror_in(tmp_path), log, 0)
    with (tmp_path / "entries.jsonl").open("ab") as file:
        file.write(b"more\n")
    assert write_bundle(tmp_path, tmp_path / "copy").size == 4
    assert (tmp_path / "copy" / "entries.jsonl").read_bytes().splitlines() == log.entries
    with pytest.raises(ConfigurationError, match="already"):
        write_bundle(tmp_path, tmp_path / "copy")


def test_it_keeps_the_evidence_of_each_start_or_signs_for_nothing(tmp_path: Path) -> None:
    """Whoever has the database edits the evidence that is kept there: a later restore would lack it."""
    log, right = Log(1, 2), EVIDENCE.to_json()
    other = EVIDENCE.model_copy(update={"evidence": EVIDENCE.evidence.model_copy(update={"report": b"x"})})
    mirror = mirror_in(tmp_path)
    for wrong in ([], [b""], [b"{}"], [other.to_json()], [right.replace(b",", b",\n", 1)]):
        with pytest.raises(LogVerificationError, match="evidence"):
            mirror.extend(0, log.entries, wrong, log.note(), LOG_KEY)
    assert mirror.position() == (0, "")
    # A crash in the midst of a line leaves nothing that spoils the next.
    path = tmp_path / "evidence.jsonl"
    path.write_bytes(right + b"\n" + right[:9])
    show(mirror_in(tmp_path), log, 0)
    assert path.read_bytes().splitlines() == [right, right]


def test_a_folder_that_cannot_be_synced_leaves_a_copy_that_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log(1, 2)
    mirror = mirror_in(tmp_path)
    show(mirror, log, 0, 2)

    def broken(directory: Path) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr("cloister.mirror._sync", broken)
        with pytest.raises(StorageError, match="nothing was signed"):
            show(mirror, log, 2)
    assert mirror_in(tmp_path).position() == mirror.position()
    show(mirror, log, mirror.position()[0])
    assert mirror_in(tmp_path).position()[0] == 3
