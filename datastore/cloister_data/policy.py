"""The owner's policy: who may ask what of a dataset, and how much it may cost. Signed by the owner's key."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from cloister_data.base import DatasetName, UnixSeconds, UserName, Wire

Platform = Literal["simulated", "sev-snp", "tdx"]
Operation = Literal["count", "sum", "mean", "train", "evaluate"]
Sandbox = Literal["none", "user", "confined"]
"""How a kernel is kept apart: not at all, by its own uid, or by every layer of the sandbox."""

Transfers = Literal["allowed", "forbidden"]
"""Whether those whom the policy names may move files between their laptops and their kernels."""

SANDBOX_ORDER: tuple[Sandbox, ...] = ("none", "user", "confined")

POLICY_LABEL = b"cloister/policy/v1\n"
"""What the owner signs is this label followed by the document's bytes."""


class Limit(Wire):
    """A lifetime (epsilon, delta) guarantee that the filter never lets the charges exceed.

    `epsilon_cap` is the largest epsilon of one request on this account, and nothing is admitted from `expires` on;
    None leaves that to the policy's own, which hold for every account.
    """

    epsilon: float = Field(gt=0, le=1000)
    delta: float = Field(gt=0, le=0.01)
    epsilon_cap: float | None = Field(default=None, gt=0, le=1000)
    expires: UnixSeconds | None = None

    def refuses(self, epsilon: float, now: int) -> str:
        """Why one request of this epsilon isn't admitted at `now` (Unix seconds), whatever is left; or nothing."""
        if self.expires is not None and now >= self.expires:
            return "expired"
        return "epsilon_cap" if self.over_cap(epsilon) else ""

    def over_cap(self, epsilon: float) -> bool:
        return self.epsilon_cap is not None and epsilon > self.epsilon_cap


class Group(Wire):
    """Users that share one account, on top of the accounts that each of them may have alone."""

    limit: Limit
    members: tuple[UserName, ...] = Field(min_length=1, max_length=1000)


class Policy(Wire):
    """What the owner signs. Every field is there by intention: there are no defaults that admit anything.

    `population_limit` bounds what all users together can learn about one privacy unit; `users` gives each user a
    limit within it, and each group one that its members share; a request is charged to every account of its user.
    `suspended` stops the whole dataset, `suspended_users` stops these users on it: nothing new is admitted, and what
    runs is ended. `release_delta` is the delta at which a release's own epsilon is stated, `epsilon_cap` the
    largest epsilon of one request. `expires` of None says "until replaced".

    A document of format 1 has no `transfers`: its owner was never asked, so it says "forbidden". Its bytes, and its
    digest, are what they were. One of format 2 must have it.
    """

    format: Literal[1, 2] = 2
    dataset: DatasetName
    version: int = Field(ge=1, le=1_000_000)
    population_limit: Limit
    users: Annotated[dict[UserName, Limit], Field(max_length=1000)]
    groups: Annotated[dict[UserName, Group], Field(max_length=1000)]
    suspended: bool
    suspended_users: tuple[UserName, ...] = Field(max_length=1000)
    release_delta: float = Field(gt=0, le=0.01)
    epsilon_cap: float = Field(gt=0, le=1000)
    operations: tuple[Operation, ...] = Field(max_length=16)
    platforms: tuple[Platform, ...] = Field(max_length=8)
    minimum_sandbox: Sandbox
    transfers: Transfers = "forbidden"
    expires: UnixSeconds | None

    @model_validator(mode="after")
    def _says_what_its_format_knows(self) -> Self:
        said = "transfers" in self.model_fields_set
        if self.format == 2 and not said:
            raise PydanticCustomError("missing", "Field required: transfers")
        if self.format == 1 and self.transfers != "forbidden":
            raise PydanticCustomError("unknown_in_format", "Format 1 doesn't know transfers")
        return self

    @model_serializer(mode="wrap")
    def _as_signed(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        document: dict[str, Any] = serialize(self)
        if self.format == 1:
            del document["transfers"]
        return document

    @property
    def readers(self) -> frozenset[str]:
        """Everybody whom the policy names, alone or in a group."""
        return frozenset(self.users).union(*(group.members for group in self.groups.values()))

    def groups_of(self, user: str) -> tuple[str, ...]:
        return tuple(sorted(name for name, group in self.groups.items() if user in group.members))

    def limits_of(self, user: str) -> tuple[Limit, ...]:
        """The limits that bind `user` apart from everybody's: none where the policy doesn't name them."""
        own = (self.users[user],) if user in self.users else ()
        return (*own, *(self.groups[name].limit for name in self.groups_of(user)))


class SignedPolicy(Wire):
    """A policy's JSON bytes and the owner's Ed25519 signature (64 bytes) over `POLICY_LABEL + document`."""

    document: bytes = Field(max_length=1 << 20)
    signature: bytes = Field(min_length=64, max_length=64)

    def policy(self) -> Policy:
        """The document, parsed. The caller must have verified the signature: `cloister_data.owner.verify_policy`."""
        return Policy.from_json(self.document)
