"""What leaves the guard, and the receipt that it leaves behind."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cloister_data.accounts import ChargeView
from cloister_data.base import DatasetName, Digest, Identifier, Label, Text, UnixSeconds, UserName, Wire
from cloister_data.checkpoint import MAX_SIZE
from cloister_data.mechanism import Adjacency, Mechanism
from cloister_data.statistics import MAX_GROUPS, Estimate


class SourceVersion(Wire):
    """A dataset that an answer is from. `division` is the part of its people that was asked about, None for all."""

    dataset: DatasetName
    version: int
    policy_version: int
    population: DatasetName
    division: Label | None = None


class ReceiptContent(Wire):
    """What a receipt says of one release. Its digest is in the release's leaf of the audit log.

    `evidence` is the digest of the evidence under which the guard ran; `request` that of what was asked.
    """

    release: Identifier
    charge: Identifier
    user: UserName
    request: Digest
    sources: tuple[SourceVersion, ...] = Field(max_length=16)
    adjacency: Adjacency
    mechanism: Mechanism
    epsilon: float
    delta: float
    evidence: Digest
    simulated: bool
    issued: UnixSeconds


class Receipt(ReceiptContent):
    """Proof of one release, to be kept by whoever got it: `cloister_budget.receipts` verifies it.

    `leaf` is the index of the release's entry in the audit log, `entry` the bytes that its hash covers, and `inclusion`
    the proof (RFC 6962, 32 bytes each) that it is in the log of `checkpoint`, which `log_key` (32 bytes) signed.
    """

    leaf: int = Field(ge=0, le=MAX_SIZE)
    entry: bytes = Field(max_length=1 << 16)
    inclusion: tuple[Annotated[bytes, Field(min_length=32, max_length=32)], ...] = Field(max_length=64)
    checkpoint: Text
    log_key: bytes = Field(min_length=32, max_length=32)
    rollback: Literal["not prevented", "prevented by witness"]


class Release(Wire):
    """One paid answer. Its shape follows from the request alone; the numbers are noised."""

    release: Identifier
    kind: Literal["statistic", "evaluation", "model"]
    title: Text
    estimates: tuple[Estimate, ...] = Field(default=(), max_length=MAX_GROUPS)
    charge: ChargeView
    receipt: Receipt


class ReleaseList(Wire):
    releases: tuple[Release, ...] = Field(max_length=10_000)
