"""What leaves the guard, and the receipt that it leaves behind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from cloister_data.accounts import ChargeView
from cloister_data.base import DatasetName, Digest, Identifier, Label, Text, UnixSeconds, UserName, Wire
from cloister_data.checkpoint import MAX_SIZE
from cloister_data.cosignature import MAX_LINE
from cloister_data.mechanism import Adjacency, Mechanism
from cloister_data.statistics import MAX_GROUPS, Estimate


class SourceVersion(Wire):
    """A dataset that an answer is from. `division` is the part of its people that was asked about, None for all."""

    dataset: DatasetName
    version: int
    policy_version: int
    population: DatasetName
    division: Label | None = None


Rollback = Literal["not prevented", "prevented by witness"]
"""Whether anybody can set the log back to before a release, and ask the same data again: see `rollback_of`."""


class WitnessKey(Wire):
    """The Ed25519 key (32 bytes) of an owner's witness, as the guard knew it from the owner's signed terms."""

    owner: UserName
    key: bytes = Field(min_length=32, max_length=32)


class Witnessed(Wire):
    """That a witness signed for a log that holds a release, before the release left.

    `cosignature` is its line (`cloister_data.cosignature`) under the checkpoint of `size` entries with `root`;
    `inclusion` is the proof (RFC 6962, 32 bytes each) that the release's entry is one of them.
    """

    owner: UserName
    size: int = Field(ge=1, le=MAX_SIZE)
    root: bytes = Field(min_length=32, max_length=32)
    cosignature: str = Field(max_length=MAX_LINE)
    inclusion: tuple[Annotated[bytes, Field(min_length=32, max_length=32)], ...] = Field(max_length=64)


class ReceiptContent(Wire):
    """What a receipt says of one release. Its digest is in the release's leaf of the audit log.

    `evidence` is the digest of the evidence under which the guard ran; `request` that of what was asked. `witnesses`
    are those of the owners of its data, as far as they have one: it left only once all of them had signed for it.
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
    witnesses: tuple[WitnessKey, ...] = Field(max_length=16)


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
    witnessed: tuple[Witnessed, ...] = Field(max_length=16)
    rollback: Rollback


def rollback_of(sources: Iterable[SourceVersion], witnessed: Iterable[Witnessed]) -> Rollback:
    """It takes a witness of every owner of the data, and the signatures of all of them, to prevent a rollback."""
    owners = {source.dataset.split("/")[0] for source in sources}
    return "prevented by witness" if owners <= {each.owner for each in witnessed} else "not prevented"


class Release(Wire):
    """One paid answer. Its shape follows from the request alone; the numbers are noised."""

    release: Identifier
    kind: Literal["statistic", "evaluation", "model"]
    title: Text
    estimates: tuple[Estimate, ...] = Field(default=(), max_length=MAX_GROUPS)
    charge: ChargeView
    receipt: Receipt


class ReleaseList(Wire):
    """`withheld` were paid too, and wait: for a witness's signature, or for an owner to unlock the data again."""

    releases: tuple[Release, ...] = Field(max_length=10_000)
    withheld: int = Field(default=0, ge=0)
