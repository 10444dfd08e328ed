"""What of a guard touches the database: its journal, its ledger and its log. And the hands of who has the database."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import create_engine, delete, insert, make_url, select, update

from cloister_budget import merkle
from cloister_budget.database import open_database
from cloister_budget.entries import ChargeSettled, Login, Released
from cloister_budget.journal import Journal
from cloister_budget.ledger import Ledger
from cloister_budget.log import AuditLog, reader
from cloister_budget.tables import Base, Leaf, LogHead, ReleaseRow
from cloister_data.checkpoint import Checkpoint, verify_checkpoint
from tests.fakes.audited import Published, begin, believe, publish, reserved_leaf
from tests.fakes.ledgers import POPULATION, HandClock, laplace, policy, request_id, reservation

ORIGIN = "cloister/small"
ACCOUNTS = (POPULATION, f"{POPULATION}:alice")
LIMITS = policy(50.0, alice=50.0)
PUBLISHED = Published(POPULATION, LIMITS.dataset, LIMITS.digest())


class SmallGuard:
    """A guard without workers and sockets: the same journal, ledger and log, in the same transactions."""

    def __init__(self, url: str) -> None:
        self.database = open_database(url)
        self.ledger = Ledger(HandClock())
        self.journal = Journal(AuditLog(Ed25519PrivateKey.generate(), ORIGIN, HandClock()), believe)

    def found(self) -> None:
        """The first start on an empty database, and a dataset in it."""
        with self.database.write() as s:
            self.ledger.set_limits(s, POPULATION, LIMITS)
            publish(s, self.journal, POPULATION, LIMITS)

    def start(self) -> SmallGuard:
        """As `Guard.recover` does: read the log, go on from it, settle what a dead guard left."""
        with self.database.read() as s:
            self.journal.open(s)
        with self.database.write() as s:
            begin(s, self.journal)
        with self.database.write() as s:
            for charge in self.ledger.settle_dead(s):
                steps, state = self.ledger.settled(s, charge)
                self.journal.append(s, ChargeSettled(charge=charge, state=state, steps=steps))
        return self

    def login(self, user: str = "alice") -> None:
        with self.database.write() as s:
            self.journal.append(s, Login(user=self.journal.ref(s, "user", user)))

    def pay(self, request: str | None = None) -> str:
        """Reserve the cost of one statistic; its charge."""
        wanted = reservation(ACCOUNTS, laplace("0.01"), request=request or request_id(), epsilon=0.01)
        with self.database.write() as s:
            reserved = self.ledger.reserve(s, wanted)
            if reserved.fresh:
                self.journal.append(s, reserved_leaf(s, self.journal, PUBLISHED, wanted, reserved))
        return reserved.charge_id

    def release(self, charge: str) -> str:
        """Record the answer to a charge, as `ReleaseDesk.record` does; the checkpoint in its receipt."""
        name = secrets.token_hex(16)
        with self.database.write() as s:
            self.ledger.commit(s, charge)
            said = hashlib.sha256(name.encode()).hexdigest()
            leaf = self.journal.append(s, Released(release=name, charge=charge, receipt=said, steps=None))
            proof = self.journal.log.prove(s, leaf.index)
            s.add(ReleaseRow(id=name, charge=charge, user="alice", kind="statistic", owners=(), body=b"{}", created=1))
        return proof.checkpoint

    def answer(self) -> str:
        return self.release(self.pay())

    def checkpoint(self) -> Checkpoint:
        """What a client is shown, as `EvidenceDesk.answer` makes it."""
        with self.database.read() as s:
            return verify_checkpoint(self.journal.checkpoint(s), self.journal.log.public_key)

    def consistency(self, first: int, second: int) -> list[bytes]:
        with self.database.read() as s:
            return merkle.consistency_proof(first, second, reader(s))

    def stop(self) -> None:
        self.database.close()


@dataclass(frozen=True)
class Row:
    """A stored leaf."""

    index: int
    kind: str
    at: int
    payload: bytes
    hashes: bytes

    def at_index(self, index: int) -> Row:
        """The same entry, made to say that it is the index-th."""
        body = {**json.loads(self.payload), "index": index}
        return replace(self, index=index, payload=json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


class Hands:
    """Somebody who has the database, and no key. Works beside a running guard, on a connection of their own."""

    def __init__(self, url: str) -> None:
        parsed = make_url(url)
        self.engine = create_engine(
            parsed.set(drivername="sqlite" if parsed.get_backend_name() == "sqlite" else "postgresql+psycopg")
        )

    def close(self) -> None:
        self.engine.dispose()

    def copy(self) -> dict[str, list[dict[str, Any]]]:
        """Every row of every table."""
        with self.engine.begin() as connection:
            return {
                table.name: [dict(row) for row in connection.execute(select(table)).mappings()]
                for table in Base.metadata.sorted_tables
            }

    def put(self, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Make the tables hold these rows, and no others."""
        with self.engine.begin() as connection:
            for table in reversed(Base.metadata.sorted_tables):
                connection.execute(delete(table))
            for table in Base.metadata.sorted_tables:
                if rows[table.name]:
                    connection.execute(insert(table), rows[table.name])

    def leaves(self) -> list[Row]:
        with self.engine.begin() as connection:
            return [Row(**row) for row in connection.execute(select(Leaf.__table__).order_by(Leaf.index)).mappings()]

    def set_leaves(self, rows: Sequence[Row]) -> None:
        with self.engine.begin() as connection:
            connection.execute(delete(Leaf))
            connection.execute(insert(Leaf), [vars(row) for row in rows])

    def set_head(self, size: int | None = None, signature: bytes | None = None) -> None:
        given = {"size": size, "signature": signature}
        with self.engine.begin() as connection:
            connection.execute(update(LogHead).values({k: v for k, v in given.items() if v is not None}))


def with_tree(rows: Sequence[Row]) -> list[Row]:
    """The rows with the hashes of a true tree over them."""
    tree = merkle.Growing()
    made = []
    for row in rows:
        made.append(replace(row, hashes=b"".join(tree.add(merkle.leaf_hash(row.payload)))))
    return made


Change = Callable[[list[Row]], list[Row]]
