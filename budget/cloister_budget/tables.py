"""The guard's database as typed tables. The ledger's vectors are exact integers, stored as JSON text, never as floats.

Times are Unix seconds. Foreign keys are checked when a transaction commits, so rows may be written in any order.
"""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import BigInteger, Dialect, Float, ForeignKey, LargeBinary, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from cloister_data.identity import Role
from cloister_data.policy import Operation, Sandbox


class IntVector(TypeDecorator[tuple[int, ...]]):
    """A tuple of whole numbers of any size, as a JSON array."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: tuple[int, ...] | None, dialect: Dialect) -> str | None:
        if value is None:
            return None
        if any(type(entry) is not int for entry in value):
            raise TypeError("a vector of the ledger holds whole numbers only")
        return json.dumps(list(value), separators=(",", ":"))

    def process_result_value(self, value: Any | None, dialect: Dialect) -> tuple[int, ...] | None:
        if value is None:
            return None
        entries = json.loads(value)
        if not isinstance(entries, list) or any(type(entry) is not int for entry in entries):
            raise ValueError("a vector of the ledger holds something else than whole numbers")
        return tuple(entries)


class Strings(TypeDecorator[tuple[str, ...]]):
    """A tuple of strings, as a JSON array."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: tuple[str, ...] | None, dialect: Dialect) -> str | None:
        return None if value is None else json.dumps(list(value), separators=(",", ":"))

    def process_result_value(self, value: Any | None, dialect: Dialect) -> tuple[str, ...] | None:
        return None if value is None else tuple(str(entry) for entry in json.loads(value))


def _foreign(target: str) -> ForeignKey:
    return ForeignKey(target, deferrable=True, initially="DEFERRED")


class Base(DeclarativeBase):
    type_annotation_map = {int: BigInteger, float: Float(53), bytes: LargeBinary, tuple[int, ...]: IntVector}  # noqa: RUF012


class User(Base):
    __tablename__ = "users"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    role: Mapped[Role] = mapped_column(String(16))
    password_hash: Mapped[str] = mapped_column(Text)
    created: Mapped[int]


class Token(Base):
    """A signed-in session; `hash` is the digest of the token, which itself is nowhere stored."""

    __tablename__ = "tokens"

    hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    user: Mapped[str] = mapped_column(String(64), _foreign("users.name"), index=True)
    created: Mapped[int]
    expires: Mapped[int]


class Owner(Base):
    """The owner's Ed25519 public key (32 bytes), pinned at their first upload or terms.

    `terms` are the bytes of the signed terms in force, with their signature (64 bytes); None without a witness.
    """

    __tablename__ = "owners"

    user: Mapped[str] = mapped_column(String(64), primary_key=True)
    public_key: Mapped[bytes]
    terms: Mapped[bytes | None]
    signature: Mapped[bytes | None]


class AcceptedGap(Base):
    """An owner's signed acceptance of a restore: the document's bytes and the signature. `restored` is its entry."""

    __tablename__ = "accepted_gaps"

    owner: Mapped[str] = mapped_column(String(64), primary_key=True)
    restored: Mapped[int] = mapped_column(primary_key=True)
    document: Mapped[bytes]
    signature: Mapped[bytes]


class Population(Base):
    """Privacy units that share accounts. Its orders and their shares of delta never change (`orders.Orders`).

    Nor do `parts`, into which the units are divided for good, each with accounts of its own; empty where they aren't.
    """

    __tablename__ = "populations"

    name: Mapped[str] = mapped_column(String(130), primary_key=True)
    orders: Mapped[tuple[str, ...]] = mapped_column(Strings)
    deltas: Mapped[tuple[int, ...]]
    parts: Mapped[tuple[str, ...]] = mapped_column(Strings, default=())


class PopulationStatementRow(Base):
    """The owner's signed statement that a population's people are others: the document's bytes and the signature."""

    __tablename__ = "population_statements"

    population: Mapped[str] = mapped_column(String(130), _foreign("populations.name"), primary_key=True)
    document: Mapped[bytes]
    signature: Mapped[bytes]
    created: Mapped[int]


class Account(Base):
    """What a population (or one user or group within it) may lose and has lost, at each of the population's orders.

    `part` is the part of the population whose units the account is about, None where it isn't divided.
    `budgets`, `spent` and `reserved` are in `loss.UNIT`; the direct deltas beside them in `orders.DIRECT_UNIT`, 1% of
    the limit's delta at most. `highest_epsilon` and `highest_delta` are the highest limit
    ever set: the guarantee that holds for what was ever released.
    """

    __tablename__ = "accounts"

    id: Mapped[str] = mapped_column(String(400), primary_key=True)
    population: Mapped[str] = mapped_column(String(130), _foreign("populations.name"), index=True)
    part: Mapped[str | None] = mapped_column(String(128))
    user: Mapped[str | None] = mapped_column(String(64), index=True)
    group_name: Mapped[str | None] = mapped_column(String(64))
    epsilon: Mapped[float]
    delta: Mapped[float]
    epsilon_cap: Mapped[float | None]
    expires: Mapped[int | None]
    highest_epsilon: Mapped[float]
    highest_delta: Mapped[float]
    budgets: Mapped[tuple[int, ...]]
    spent: Mapped[tuple[int, ...]]
    reserved: Mapped[tuple[int, ...]]
    direct_budget: Mapped[int]
    direct_spent: Mapped[int] = mapped_column(default=0)
    direct_reserved: Mapped[int] = mapped_column(default=0)
    suspended: Mapped[bool] = mapped_column(default=False)


class AccountUser(Base):
    """That the policy in force of `dataset` binds `user` by `account`: the user's own, or that of a group."""

    __tablename__ = "account_users"

    dataset: Mapped[str] = mapped_column(String(130), primary_key=True)
    user: Mapped[str] = mapped_column(String(64), primary_key=True)
    account: Mapped[str] = mapped_column(String(400), _foreign("accounts.id"), primary_key=True)


class Dataset(Base):
    __tablename__ = "datasets"

    name: Mapped[str] = mapped_column(String(130), primary_key=True)
    owner: Mapped[str] = mapped_column(String(64), index=True)
    population: Mapped[str] = mapped_column(String(130), _foreign("populations.name"), index=True)
    version: Mapped[int]
    policy_version: Mapped[int]


class DatasetVersion(Base):
    """One upload. `file` names the encrypted file, `wrapped_key` is its key as the key provider wrapped it.

    `part_units` is the number of units in each of the schema's parts, in their order.
    """

    __tablename__ = "dataset_versions"

    dataset: Mapped[str] = mapped_column(String(130), _foreign("datasets.name"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    schema_json: Mapped[str] = mapped_column(Text)
    units: Mapped[int]
    part_units: Mapped[tuple[int, ...]]
    file: Mapped[str] = mapped_column(Text)
    wrapped_key: Mapped[bytes]
    created: Mapped[int]


class PolicyRow(Base):
    """A policy as its owner signed it: the document's bytes and the signature (64 bytes)."""

    __tablename__ = "policies"

    dataset: Mapped[str] = mapped_column(String(130), _foreign("datasets.name"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    document: Mapped[bytes]
    signature: Mapped[bytes]
    created: Mapped[int]


class ChargeRow(Base):
    """One paid request. `state` is reserved, committed or released (given back).

    `operation` and `sandbox` are what the policy was asked about; `sources_json` names the policy versions
    that admitted it.
    """

    __tablename__ = "charges"
    __table_args__ = (UniqueConstraint("user", "request_id"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    user: Mapped[str] = mapped_column(String(64))
    request_id: Mapped[str] = mapped_column(String(32))
    request_digest: Mapped[str] = mapped_column(String(64))
    kind: Mapped[str] = mapped_column(String(32))
    operation: Mapped[Operation] = mapped_column(String(16), default="")
    sandbox: Mapped[Sandbox | None] = mapped_column(String(16))
    mechanism_json: Mapped[str] = mapped_column(Text)
    epsilon: Mapped[float]
    delta: Mapped[float]
    direct_delta: Mapped[int] = mapped_column(default=0)
    adjacency: Mapped[str] = mapped_column(String(32))
    sources_json: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(String(16), index=True)
    steps_total: Mapped[int | None]
    steps_marked: Mapped[int] = mapped_column(default=0)
    created: Mapped[int]
    settled: Mapped[int | None]


class ChargeAccount(Base):
    """What the whole charge costs one account, at the orders of its population."""

    __tablename__ = "charge_accounts"

    charge: Mapped[str] = mapped_column(String(32), _foreign("charges.id"), primary_key=True)
    account: Mapped[str] = mapped_column(String(400), _foreign("accounts.id"), primary_key=True)
    vector: Mapped[tuple[int, ...]]


class JobRow(Base):
    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    charge: Mapped[str] = mapped_column(String(32), _foreign("charges.id"), index=True)
    user: Mapped[str] = mapped_column(String(64), index=True)
    plan_json: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(String(16), index=True)
    steps_done: Mapped[int] = mapped_column(default=0)
    release: Mapped[str | None] = mapped_column(String(32))
    code: Mapped[str] = mapped_column(String(64), default="")
    created: Mapped[int]


class ReleaseRow(Base):
    """What was released: the message, and for a model the encrypted file of its weights.

    `body` is sealed like a data key, for the `owners` of the data: who has a witness can lock it.
    """

    __tablename__ = "releases"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    charge: Mapped[str] = mapped_column(String(32), _foreign("charges.id"), index=True)
    user: Mapped[str] = mapped_column(String(64), index=True)
    kind: Mapped[str] = mapped_column(String(16))
    owners: Mapped[tuple[str, ...]] = mapped_column(Strings)
    body: Mapped[bytes]
    file: Mapped[str | None] = mapped_column(Text)
    wrapped_key: Mapped[bytes | None]
    created: Mapped[int]


class BudgetRequestRow(Base):
    """A scientist's request to an owner for more. `salt` (16 bytes) makes the commitments that the audit log holds."""

    __tablename__ = "budget_requests"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    user: Mapped[str] = mapped_column(String(64), index=True)
    owner: Mapped[str] = mapped_column(String(64), index=True)
    dataset: Mapped[str] = mapped_column(String(130), _foreign("datasets.name"))
    epsilon: Mapped[float]
    reason: Mapped[str] = mapped_column(Text)
    salt: Mapped[bytes]
    state: Mapped[str] = mapped_column(String(16))
    answer: Mapped[str] = mapped_column(Text, default="")
    policy_version: Mapped[int | None]
    created: Mapped[int]
    answered: Mapped[int | None]


class Name(Base):
    """What a ref of the audit log stands for (`refs.ref_of`); erased, the log holds no name any more."""

    __tablename__ = "names"
    __table_args__ = (UniqueConstraint("kind", "name"),)

    ref: Mapped[str] = mapped_column(String(64), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    salt: Mapped[bytes]
    name: Mapped[str] = mapped_column(String(400))


class EvidenceRow(Base):
    """The evidence record of one start, by the digest of its evidence."""

    __tablename__ = "evidence"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    record_json: Mapped[str] = mapped_column(Text)


class Leaf(Base):
    """One entry of the audit log. `payload` is what the leaf's hash covers.

    `hashes` are those of the complete subtrees that the leaf finishes, 32 bytes each: of 1 leaf (its own), 2, 4 and so
    on.
    """

    __tablename__ = "leaves"

    index: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(64))
    at: Mapped[int]
    payload: Mapped[bytes]
    hashes: Mapped[bytes]


class LogHead(Base):
    """The one row that says how many entries there are, with the signature (64 bytes) of the guard that wrote the last.

    It is over the checkpoint of that tree.
    """

    __tablename__ = "log_heads"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    size: Mapped[int]
    signature: Mapped[bytes]
