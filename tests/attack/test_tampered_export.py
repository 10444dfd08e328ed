"""Somebody alters an exported log, or a receipt: it is refused offline, and the first wrong entry is named."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister import logexport, receipts
from cloister.logexport import Verified
from cloister.profile import Remembered
from cloister.receipts import ReceiptFile
from cloister_attest.policy import AttestationPolicy, load_policy
from cloister_budget.merkle import Growing, LogVerificationError, leaf_hash
from cloister_budget.receipts import ReceiptError
from cloister_data.checkpoint import Checkpoint, sign_checkpoint
from cloister_data.datasets import SplitRef
from cloister_data.errors import BudgetRefusedError, CloisterError
from cloister_data.release import Release
from cloister_data.statistics import QueryRequest, Question
from tests.fakes.data import PEOPLE, people
from tests.fakes.running import RunningCloister, make_policy, running_cloister

DATASET = "house/people"


def ask(cloister: RunningCloister, epsilon: float) -> Release:
    question = Question(source=SplitRef(dataset=DATASET), operation="count")
    request = QueryRequest(request_id=secrets.token_hex(16), question=question, epsilon=epsilon)
    return cloister.session("ann").transport.call("POST", "/queries", request, Release)


class Exported:
    """An export of a real cloister that was restarted once, two receipts of it, and its trust file."""

    def __init__(self, directory: Path, files: tuple[ReceiptFile, ReceiptFile], policy: AttestationPolicy) -> None:
        self.directory, self.receipts, self.policy = directory, files, policy

    def entries(self) -> list[bytes]:
        return (self.directory / "entries.jsonl").read_bytes().splitlines()

    def of_kind(self, kind: str) -> int:
        """The last entry of a kind."""
        return max(n for n, entry in enumerate(self.entries()) if json.loads(entry)["facts"]["kind"] == kind)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    directory = tmp_path_factory.mktemp("log") / "export"
    with running_cloister() as cloister:
        cloister.add_user("ann", "scientist")
        cloister.upload(DATASET, people(100), PEOPLE, make_policy(DATASET, {"ann": 1.0}))
        first = ask(cloister, 0.3)
        early = receipts.fetch(cloister.session("ann").transport, first.receipt)
        assert cloister.stop() == 0
        cloister.restart()
        late = receipts.fetch(cloister.session("ann").transport, ask(cloister, 0.2).receipt)
        with pytest.raises(BudgetRefusedError):
            ask(cloister, 0.9)
        logexport.write(cloister.session("admin"), directory)
        yield Exported(directory, (early, late), load_policy(cloister.trust))


@pytest.fixture
def copy(exported: Exported, tmp_path: Path) -> Exported:
    shutil.copytree(exported.directory, tmp_path / "export")
    return Exported(tmp_path / "export", exported.receipts, exported.policy)


def verified(found: Exported, seen: Remembered | None = None) -> Verified:
    return logexport.verify(found.directory, found.policy, seen)


def test_what_a_cloister_exports_holds_and_tells_every_balance(exported: Exported) -> None:
    found = verified(exported)
    assert found.starts == 2
    assert found.simulated
    assert found.checkpoint.size == len(exported.entries())
    (own,) = [each for each in found.balances if each.account == f"{DATASET}:ann"]
    assert (own.epsilon, own.scope) == (1.0, "user")
    assert 0.45 < own.used_share < 0.55
    assert not found.open_charges


def rewrite(found: Exported, change: Callable[[list[bytes]], object]) -> None:
    """Alter the entries; the list of their hashes is left as it was."""
    entries = found.entries()
    change(entries)
    (found.directory / "entries.jsonl").write_bytes(b"".join(entry + b"\n" for entry in entries))


def swap(entries: list[bytes], one: int, other: int) -> None:
    entries[one], entries[other] = entries[other], entries[one]


def test_the_first_wrong_entry_is_named(copy: Exported) -> None:
    login, charge, release = copy.of_kind("login"), copy.of_kind("charge-reserved"), copy.of_kind("release")
    whole = copy.entries()

    def in_entry(index: int, old: bytes, new: bytes) -> Callable[[list[bytes]], object]:
        assert whole[index].count(old) >= 1
        return lambda entries: entries.__setitem__(index, entries[index].replace(old, new, 1))

    user = json.loads(whole[login])["facts"]["user"].encode()
    attacks: list[tuple[Callable[[list[bytes]], object], int]] = [
        # An entry that moves nothing is told by its hash; one that moves a balance by the books.
        (in_entry(login, user, b"f" * 64), login),
        (in_entry(login, b'"at":', b'"at":6'), login),
        (in_entry(charge, b'"epsilon":0.2', b'"epsilon":0.1'), charge),
        (in_entry(charge, b'"loss":[', b'"loss":[1'), charge),
        (in_entry(release, b'"release"', b'"rebates"'), release),
        (lambda entries: entries.pop(login), login),
        (lambda entries: swap(entries, login - 1, login), login - 1),
        (lambda entries: entries.insert(charge, entries[charge]), charge + 1),
        (lambda entries: entries.pop(), len(whole) - 1),
        (lambda entries: entries.append(entries[-1].replace(b'"index":', b'"index":9')), len(whole)),
        (lambda entries: entries.clear(), 0),
        (lambda entries: entries.__setitem__(3, b"\xff\x00 not JSON"), 3),
    ]
    for number, (attack, first) in enumerate(attacks):
        rewrite(copy, attack)
        with pytest.raises(LogVerificationError) as caught:
            verified(copy)
        assert f"ntry {first} of" in str(caught.value), (number, str(caught.value))
        rewrite(copy, lambda entries: entries.__setitem__(slice(None), whole))
    # The control: put back, it holds.
    assert verified(copy).checkpoint.size == len(whole)


def test_a_log_that_was_made_up_whole_is_not_the_guards(copy: Exported) -> None:
    """A fork with a true tree and true balances: without the guard's key nobody can sign for it."""
    login = copy.of_kind("login")
    user = json.loads(copy.entries()[login])["facts"]["user"].encode()
    rewrite(copy, lambda entries: entries.__setitem__(login, entries[login].replace(user, b"f" * 64)))
    tree = Growing()
    for entry in copy.entries():
        tree.add(leaf_hash(entry))
    (copy.directory / "hashes").write_bytes(b"".join(leaf_hash(entry) for entry in copy.entries()))
    origin = logexport.claimed(copy.directory).origin
    forged = sign_checkpoint(Checkpoint(origin, tree.size, tree.root()), Ed25519PrivateKey.generate())
    (copy.directory / "checkpoint").write_text(forged)
    with pytest.raises(LogVerificationError, match="isn't signed by any guard"):
        verified(copy)


def test_names_and_evidence_beside_the_log_are_proven_too(copy: Exported) -> None:
    names, evidence = copy.directory / "names.jsonl", copy.directory / "evidence.jsonl"
    kept = names.read_text(), evidence.read_text()
    names.write_text(kept[0].replace('"name":"ann"', '"name":"bob"'))
    with pytest.raises(LogVerificationError, match="A name beside the log"):
        verified(copy)
    names.write_text("")
    # A name that was erased is no fault: the balances stay, under refs.
    assert all(len(each.account) == 64 for each in verified(copy).balances)
    names.write_text(kept[0])
    evidence.write_text("".join(kept[1].splitlines(keepends=True)[1:]))
    with pytest.raises(LogVerificationError, match="has no evidence"):
        verified(copy)
    evidence.write_text(kept[1])
    strict = copy.policy.demanding(measurements=("0" * 96,))
    with pytest.raises(LogVerificationError, match="isn't proven") as caught:
        logexport.verify(copy.directory, strict)
    assert "measurement" in str(caught.value)


def test_an_export_of_another_log_than_the_one_seen_is_refused(exported: Exported) -> None:
    found = verified(exported).checkpoint

    def seen(root: bytes, size: int = found.size) -> Remembered:
        return Remembered(url="https://a", origin=found.origin, log_key=bytes(32), size=size, root=root)

    assert verified(exported, seen(found.root)).checkpoint == found
    with pytest.raises(LogVerificationError, match="isn't the log that this computer has seen"):
        verified(exported, seen(bytes(32)))
    with pytest.raises(LogVerificationError, match="isn't the log that this computer has seen"):
        verified(exported, seen(found.root, found.size - 1))
    # An older export is what it says.
    assert verified(exported, seen(bytes(32), found.size + 5)).checkpoint == found


def test_half_an_export_is_refused(copy: Exported) -> None:
    os.remove(copy.directory / "checkpoint")
    with pytest.raises(CloisterError, match="isn't a whole export"):
        verified(copy)


def test_a_receipt_holds_offline_and_no_altered_one_does(exported: Exported) -> None:
    early, late = exported.receipts
    assert early.verify(exported.policy).size > early.receipt.leaf
    assert late.verify(exported.policy).origin == "cloister/test-cloister"
    assert early.evidence.evidence.log_key != late.evidence.evidence.log_key
    receipt = late.receipt

    def with_receipt(**changes: object) -> ReceiptFile:
        return late.model_copy(update={"receipt": receipt.model_copy(update=changes)})

    source = receipt.sources[0]
    note = receipt.checkpoint
    altered = {
        "user": "bob",
        "request": "0" * 64,
        "epsilon": 0.1,
        "delta": 1e-7,
        "sources": (source.model_copy(update={"policy_version": 2}),),
        "mechanism": early.receipt.mechanism,
        "issued": receipt.issued + 1,
        "release": early.receipt.release,
        "charge": early.receipt.charge,
        "leaf": receipt.leaf - 1,
        "entry": receipt.entry.replace(b'"steps":null', b'"steps":1234'),
        "inclusion": receipt.inclusion[:-1],
        "checkpoint": note[:-5] + ("AAA=\n" if not note.endswith("AAA=\n") else "BBB=\n"),
        "log_key": early.receipt.log_key,
        "evidence": early.receipt.evidence,
        "simulated": False,
    }
    for field, value in altered.items():
        assert getattr(receipt, field) != value, field
        with pytest.raises(ReceiptError):
            with_receipt(**{field: value}).verify(exported.policy)
    forged = sign_checkpoint(
        Checkpoint("cloister/test-cloister", receipt.leaf + 1, bytes(32)), Ed25519PrivateKey.generate()
    )
    with pytest.raises(ReceiptError):
        with_receipt(checkpoint=forged).verify(exported.policy)
    # Another start's evidence binds another log key.
    with pytest.raises(ReceiptError, match="another guard's"):
        late.model_copy(update={"evidence": early.evidence}).verify(exported.policy)
    with pytest.raises(ReceiptError, match="isn't proven"):
        late.verify(exported.policy.demanding(measurements=("0" * 96,)))
    assert late.verify(exported.policy).size > receipt.leaf


def test_a_receipt_survives_its_file(exported: Exported, tmp_path: Path) -> None:
    path = tmp_path / "receipt.json"
    receipts.save(exported.receipts[1], path)
    assert path.stat().st_mode & 0o077 == 0
    assert receipts.load(path) == exported.receipts[1]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ReceiptError, match="isn't a receipt"):
        receipts.load(path)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    with pytest.raises(ReceiptError, match="no file"):
        receipts.load(path)
