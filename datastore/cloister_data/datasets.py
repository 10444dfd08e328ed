"""What is said about datasets: the declaration that an owner uploads, and the view that a scientist gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from cloister_data.base import DatasetName, Label, UserName, Wire
from cloister_data.mechanism import Adjacency
from cloister_data.policy import Limit, Operation, SignedPolicy
from cloister_data.populations import SignedStatement
from cloister_data.schema import MAX_PARTS, Schema

MAX_UPLOAD_BYTES = 1 << 30
"""Largest body of one upload."""


class Declaration(Wire):
    """The head of an upload (`cloister_data.framing.pack_body`): everything about the data that is not the data.

    `population` names the privacy units whose accounts are charged, `owner/name`; datasets about the same people must
    name the same population. `owner_key` is the owner's Ed25519 public key (32 bytes), pinned at the first upload.
    `policy` is needed with the first version and None with later ones. `statement` is needed with the first dataset of
    every population but the owner's first, and None otherwise.
    """

    dataset: DatasetName
    population: DatasetName
    data_schema: Schema
    data_format: Literal["csv", "parquet"]
    owner_key: bytes = Field(min_length=32, max_length=32)
    policy: SignedPolicy | None = None
    statement: SignedStatement | None = None


class DatasetView(Wire):
    """A dataset as a scientist sees it. Nothing here is computed from private values; `units` is public by policy.

    `part_units` is the public number of units in each part of the schema's partition; empty where it has none.
    `limit` is the smallest that binds the caller alone or in a group; `suspended` says that the owner has stopped the
    dataset, or the caller on it. `witness` says that the owner has one, so that a rollback is prevented; then `locked`
    says that it is silent, and nothing is admitted.
    """

    name: DatasetName
    version: int
    owner: UserName
    population: DatasetName
    data_schema: Schema
    units: int = Field(ge=0)
    part_units: dict[Label, int] = Field(default={}, max_length=MAX_PARTS)
    adjacency: Adjacency
    policy_version: int
    operations: tuple[Operation, ...]
    epsilon_cap: float
    release_delta: float
    limit: Limit
    suspended: bool = False
    expires: int | None
    simulated: bool
    witness: bool = False
    locked: bool = False


class DatasetList(Wire):
    datasets: tuple[DatasetView, ...] = Field(max_length=10_000)


class SplitRef(Wire):
    """Which rows of a dataset a request is about.

    A unit is in the test part iff its keyed hash, made at upload and uniform in [0, 1), is below `test`. `division` is
    one of the parts that the schema's partition divides the units into, None for all of them; of that part, `part` and
    `test` then take the units of either side of the split.
    """

    dataset: DatasetName
    division: Label | None = None
    part: Literal["all", "train", "test"] = "all"
    test: float = Field(default=0.2, gt=0, lt=1)

    @property
    def title(self) -> str:
        """For people: the dataset, and which of its rows."""
        marks = [] if self.division is None else [self.division]
        if self.part != "all":
            marks.append(f"{self.part} part")
        return f"{self.dataset} ({', '.join(marks)})" if marks else self.dataset


def joint_title(sources: Sequence[SplitRef]) -> str:
    """Several sources for people, in at most 3000 characters."""
    whole = " + ".join(ref.title for ref in sources)
    return whole if len(whole) <= 3000 else whole[:2997] + "..."


class UploadView(Wire):
    """The guard's answer to an upload."""

    dataset: DatasetName
    version: int
    rows: int
    columns: tuple[Label, ...] = Field(max_length=4096)


class PolicyView(Wire):
    """The policy in force, as it was signed."""

    signed: SignedPolicy
    owner_key: bytes = Field(min_length=32, max_length=32)
