"""What leaves the guard, and the receipt that it leaves behind."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cloister_data.accounts import ChargeView
from cloister_data.base import DatasetName, Digest, Identifier, Label, Text, UnixSeconds, UserName, Wire
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
    """Proof of one release, to be kept by whoever got it.

    `leaf` is the index of the release's leaf in the audit log and `checkpoint` a signed checkpoint that covers it.
    """

    leaf: int
    checkpoint: Text
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
