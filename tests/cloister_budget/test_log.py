"""The audit log in the database: leaves come and go with their transaction, and nothing else changes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import event, text
from sqlalchemy.orm import Session

from cloister_budget import merkle
from cloister_budget.database import Database, open_database
from cloister_budget.log import AuditLog, LogMovedOn, reader, size
from cloister_budget.tables import Leaf
from cloister_data.checkpoint import Checkpoint, verify_checkpoint
from cloister_data.errors import StorageError
from cloister_data.policy import Limit
from tests.fakes.ledgers import HandClock

LIMIT = Limit(epsilon=0.5, delta=1e-5)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def new_log() -> AuditLog:
    return AuditLog(KEY, "hospital.example/log", HandClock(1_800_000_059))


def signed(log: AuditLog, s: Session) -> Checkpoint:
    """The checkpoint over what is stored."""
    return verify_checkpoint(log.sign(size(s), merkle.root(size(s), reader(s))), log.public_key)


def test_checkpoints_cover_every_leaf_and_extend_each_other(database: Database) -> None:
    log, earlier = new_log(), []
    for count in range(20):
        with database.write() as s:
            assert log.append(s, "charge", {"charge": f"{count:032x}", "steps": count}) == count
        with database.read() as s:
            found = signed(log, s)
            assert (found.origin, found.size) == ("hospital.example/log", count + 1)
            for old in earlier:
                proof = merkle.consistency_proof(old.size, found.size, reader(s))
                merkle.verify_consistency(old.size, found.size, old.root, found.root, proof)
            for leaf in s.query(Leaf):
                assert leaf.hashes[:32] == merkle.leaf_hash(leaf.payload)
                proof = merkle.inclusion_proof(leaf.index, found.size, reader(s))
                merkle.verify_inclusion(leaf.hashes[:32], leaf.index, found.size, proof, found.root)
        earlier.append(found)


def test_an_empty_log_has_a_checkpoint(database: Database) -> None:
    log = new_log()
    with database.read() as s:
        found = signed(log, s)
    assert (found.size, found.root) == (0, merkle.EMPTY_ROOT)


def test_a_leaf_holds_its_place_kind_coarse_time_and_facts(database: Database) -> None:
    with database.write() as s:
        new_log().append(s, "limit", LIMIT)
        new_log().append(s, "note", {"b": 1, "a": "\u00e9"})
    with database.read() as s:
        first, second = (leaf.payload for leaf in s.query(Leaf).order_by(Leaf.index))
    assert json.loads(first) == {
        "v": 1, "index": 0, "at": 1_800_000_000, "facts": {"kind": "limit", **LIMIT.model_dump()}
    }  # fmt: skip
    assert second == rb'{"at":1800000000,"facts":{"a":"\u00e9","b":1,"kind":"note"},"index":1,"v":1}'


def test_several_leaves_in_one_transaction_and_none_of_a_failed_one(database: Database) -> None:
    log = new_log()

    def fail() -> None:
        with database.write() as s:
            log.append(s, "lost", {})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with database.write() as s:
        assert [log.append(s, "kept", {"n": n}) for n in range(5)] == [0, 1, 2, 3, 4]
    with database.write() as s:
        assert log.append(s, "kept", {"n": 5}) == 5
        assert size(s) == 6
        assert s.query(Leaf).filter(Leaf.kind == "lost").count() == 0


def test_a_leaf_is_bounded(database: Database) -> None:
    with pytest.raises(ValueError, match="too large"), database.write() as s:
        new_log().append(s, "big", {"x": "y" * 100_000})


def test_an_old_copy_under_a_running_guard_is_noticed(tmp_path: Path) -> None:
    path, backup = tmp_path / "ledger.db", tmp_path / "backup.db"
    log = new_log()

    def append(count: int) -> None:
        database = open_database(f"sqlite:///{path}")
        try:
            for number in range(count):
                with database.write() as s:
                    log.append(s, "charge", {"n": number})
        finally:
            database.close()

    append(3)
    shutil.copy(path, backup)
    append(2)
    shutil.copy(backup, path)
    with pytest.raises(StorageError, match="isn't the one"):
        append(1)
    # The positive control: a guard that never saw the later leaves has nothing to compare with.
    database = open_database(f"sqlite:///{path}")
    with database.write() as s:
        assert new_log().append(s, "charge", {}) == 3
    database.close()


def test_a_changed_subtree_is_noticed(database: Database) -> None:
    log = new_log()
    for number in range(4):
        with database.write() as s:
            log.append(s, "charge", {"n": number})
    with database.write() as s:
        row = s.get_one(Leaf, 3)
        assert len(row.hashes) == 3 * 32
        row.hashes = bytes(96)
    with pytest.raises(StorageError, match="isn't the one"), database.write() as s:
        log.append(s, "charge", {})


@pytest.mark.parametrize("change", ["size = size - 1", "size = size + 1", "signature = :old"])
def test_a_head_that_is_not_its_last_leafs_is_noticed(database: Database, change: str) -> None:
    log = new_log()
    for number in range(3):
        with database.write() as s:
            log.append(s, "charge", {"n": number})
    with database.write() as s:
        s.execute(text(f"UPDATE log_heads SET {change}"), {"old": bytes(64)} if ":old" in change else {})
    with pytest.raises(StorageError, match="isn't the one"), database.write() as s:
        log.append(s, "charge", {})


def test_an_entry_after_the_last_one_is_noticed(database: Database) -> None:
    log = new_log()
    with database.write() as s:
        log.append(s, "charge", {})
    with database.write() as s:
        s.add(Leaf(index=1, kind="forged", at=0, payload=b"{}", hashes=merkle.leaf_hash(b"{}")))
    with pytest.raises(StorageError, match="isn't the one"), database.write() as s:
        log.append(s, "charge", {})


def test_two_logs_in_turn_go_on_from_each_other_and_a_rollback_changes_nothing(database: Database) -> None:
    logs = [new_log(), new_log()]

    def fail() -> None:
        with database.write() as s:
            logs[0].append(s, "lost", {})
            raise RuntimeError

    for count in range(6):
        with pytest.raises(RuntimeError):
            fail()
        with database.write() as s:
            assert logs[count % 2].append(s, "kept", {"n": count}) == count
    with database.write() as s:
        tree = logs[0].end(s).copy()
    with database.write() as s:
        with pytest.raises(LogMovedOn):
            logs[0].add(s, "kept", {}, merkle.Growing(5, tree.edge))
        with pytest.raises(StorageError):
            logs[0].add(s, "kept", {}, merkle.Growing(6, [bytes(32), *tree.edge[1:]]))
        assert logs[0].add(s, "kept", {}, tree).index == 6


def test_an_append_is_one_statement_or_two_where_the_database_takes_no_more(database: Database) -> None:
    log, ran = new_log(), list[str]()
    with database.write() as s:
        log.append(s, "first", {})
    event.listen(database.engine, "before_cursor_execute", lambda *told: ran.append(told[2]))
    with database.write() as s:
        before = len(ran)
        log.append(s, "second", {})
        assert len(ran) - before == (2 if database.is_sqlite else 1)


def test_a_lacking_hash_is_an_error_not_another_root(database: Database) -> None:
    log = new_log()
    with database.write() as s:
        for number in range(3):
            log.append(s, "charge", {"n": number})
    with database.write() as s:
        s.delete(s.get(Leaf, 1))
    with database.read() as s, pytest.raises(merkle.LogVerificationError):
        merkle.root(size(s), reader(s))


def test_an_origin_is_one_word() -> None:
    for origin in ("", "two words", "a+b", "line\nbreak", "x" * 300):
        with pytest.raises(ValueError, match="origin"):
            AuditLog(KEY, origin)
