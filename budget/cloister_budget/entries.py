"""The leaves of the audit log, one message for each kind. Pure: laptops read them without a database.

A leaf can never be erased, so it holds nothing personal: refs (`cloister_budget.names`) instead of names, random ids,
whole numbers, digests, and a time in whole minutes. docs/audit.md lists what each kind says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from cloister_data.base import Digest, Identifier, UnixSeconds, Wire
from cloister_data.identity import Role
from cloister_data.mechanism import Mechanism
from cloister_data.policy import Limit, Operation, Platform, Sandbox
from cloister_data.transfers import MAX_TRANSFER_BYTES, Direction

MAX_PAYLOAD_BYTES = 1 << 16
"""Largest leaf."""

COARSE_SECONDS = 60
"""A leaf's time is rounded down to this: finer times would tell how long a job took."""

LIMITS_IN_A_LEAF = 100
MEMBERS_IN_A_LEAF = 300
"""A policy's limits take as many leaves as they need: `in_leaves` keeps each below `MAX_PAYLOAD_BYTES`."""

Ref = Digest
"""What a leaf calls a user, a dataset, a population or an account: see `cloister_budget.names`."""

Key = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""An Ed25519 public key, 32 bytes in hex."""

Vector = tuple[Annotated[int, Field(ge=0, le=10**24)], ...]
"""Over the orders of a population, infinity last, in `cloister_budget.loss.UNIT`."""


class GuardStarted(Wire):
    """A guard begins with a new log key, which its hardware evidence binds, and goes on from the key before it.

    `evidence` is the digest of its start evidence, `certificate` that of its TLS certificate; `previous_key` is that of
    the last start in this log, None at the first.
    """

    kind: Literal["guard-started"] = "guard-started"
    evidence: Digest
    platform: Platform
    log_key: Key
    previous_key: Key | None
    certificate: Digest


class UserCreated(Wire):
    kind: Literal["user-created"] = "user-created"
    user: Ref
    role: Role


class Login(Wire):
    kind: Literal["login"] = "login"
    user: Ref


class KernelStarted(Wire):
    """A kernel of a user starts. `sandbox` is how it is kept apart: "none" is an opt-out that everybody can see."""

    kind: Literal["kernel"] = "kernel"
    kernel: Identifier
    user: Ref
    sandbox: Sandbox


class Transferred(Wire):
    """A whole file goes to a kernel's home ("put") or leaves it for the laptop ("get"); written before it does.

    `file` is its path by ref, for a name may be personal; `content` is SHA-256 of its bytes.
    """

    kind: Literal["transfer"] = "transfer"
    direction: Direction
    kernel: Identifier
    user: Ref
    file: Ref
    size: int = Field(ge=0, le=MAX_TRANSFER_BYTES)
    content: Digest


class Counted(Wire):
    """What nobody signed in for, since the last such entry. Counted: listing it would let anybody flood the log.

    Evidence that was served, and sign-ins, tokens and witness's calls that were refused.
    """

    kind: Literal["counted"] = "counted"
    evidence: int = Field(ge=0)
    sign_ins_refused: int = Field(ge=0)
    tokens_refused: int = Field(ge=0)
    witness_calls_refused: int = Field(ge=0)


class Refused(Wire):
    """A request of a user that policy or budget refused; `request` is the digest of what was asked."""

    kind: Literal["refused"] = "refused"
    user: Ref
    code: Literal["policy-refused", "budget-refused"]
    request: Digest
    sandbox: Sandbox | None


class OwnerTermsSet(Wire):
    """An owner's signed terms come into force: from here on `witness` guards the owner's data.

    `unlock` is the digest of the key to them (`cloister_data.witness.unlock_digest`).
    """

    kind: Literal["owner-terms"] = "owner-terms"
    owner: Ref
    owner_key: Key
    version: int = Field(ge=1)
    witness: Key
    unlock: Digest
    terms: Digest


class Unlocked(Wire):
    """An owner's witness lends this guard the owner's data key, having signed for `size` entries."""

    kind: Literal["unlocked"] = "unlocked"
    owner: Ref
    witness: Key
    size: int = Field(ge=0)


class Locked(Wire):
    """An owner's data are locked again: the witness has been silent for too long, or the owner changed the terms."""

    kind: Literal["locked"] = "locked"
    owner: Ref
    reason: Literal["silent", "terms"]


class Restored(Wire):
    """A backup of the database held `first` entries; those from there to this one were put back from a copy of the log.

    No owner's data are charged again before the owner has signed for it.
    """

    kind: Literal["restored"] = "restored"
    first: int = Field(ge=0)


class GapAccepted(Wire):
    """An owner signed that they accept the restore at the entry `restored`."""

    kind: Literal["restore-accepted"] = "restore-accepted"
    owner: Ref
    owner_key: Key
    restored: int = Field(ge=0)
    statement: Digest


class PopulationOpened(Wire):
    """New accounts for new people: the Renyi orders and their shares of delta, frozen, and in how many parts.

    `parts` is 1 where the population isn't divided; `statement` is the digest of the owner's signed statement that
    these are other people, None for the owner's first population.
    """

    kind: Literal["population"] = "population"
    population: Ref
    owner: Ref
    owner_key: Key
    orders: tuple[Annotated[str, StringConstraints(pattern=r"^\d{1,4}(\.\d{1,4})?$")], ...] = Field(
        min_length=1, max_length=64
    )
    shares: tuple[int, ...] = Field(min_length=1, max_length=64)
    parts: int = Field(ge=1, le=64)
    statement: Digest | None


class Uploaded(Wire):
    """A dataset's next version. `data_schema` is the declaration's digest, `units` the public number of people.

    `keys` says who can lock it: the owner, where they have a witness, else nobody (a key file of the machine).
    """

    kind: Literal["upload"] = "upload"
    keys: Literal["owner", "file"]
    dataset: Ref
    version: int = Field(ge=1)
    population: Ref
    data_schema: Digest
    units: int = Field(ge=0)
    owner_key: Key


class PolicySet(Wire):
    """A policy signed by `owner_key` comes into force; its limits are the `limits` leaves that follow at once."""

    kind: Literal["policy"] = "policy"
    dataset: Ref
    version: int = Field(ge=1)
    policy: Digest
    owner_key: Key
    limits: int = Field(ge=1)


class AccountLimit(Wire):
    """What one account may lose, and whom it binds. `part` counts from 0 where the population is divided.

    `members` may go on in another `AccountLimit` of the same account; a population's account binds everybody and names
    nobody.
    """

    account: Ref
    scope: Literal["population", "user", "group"]
    part: int = Field(ge=0, le=63)
    limit: Limit
    members: tuple[Ref, ...] = Field(max_length=MEMBERS_IN_A_LEAF)


def in_leaves(limits: Iterable[AccountLimit]) -> Iterator[tuple[AccountLimit, ...]]:
    """The limits in their order, in so many pieces that each fits a leaf."""
    piece: list[AccountLimit] = []
    for limit in limits:
        members = sum(len(each.members) for each in piece)
        if len(piece) == LIMITS_IN_A_LEAF or members + len(limit.members) > MEMBERS_IN_A_LEAF:
            yield tuple(piece)
            piece = []
        piece.append(limit)
    if piece:
        yield tuple(piece)


class LimitsSet(Wire):
    kind: Literal["limits"] = "limits"
    dataset: Ref
    version: int = Field(ge=1)
    limits: tuple[AccountLimit, ...] = Field(min_length=1, max_length=LIMITS_IN_A_LEAF)


class ChargedSource(Wire):
    """A dataset that a request is about, and the signed policy that admitted it. `part` is None for all of them."""

    dataset: Ref
    version: int = Field(ge=1)
    data_schema: Digest
    policy_version: int = Field(ge=1)
    policy: Digest
    part: int | None = Field(ge=0, le=63)


class PopulationLoss(Wire):
    """What the whole request costs each of its accounts within one population, and which those are."""

    population: Ref
    loss: Vector = Field(min_length=2, max_length=65)
    accounts: tuple[Ref, ...] = Field(min_length=1, max_length=512)


class ChargeReserved(Wire):
    """A request is paid, whole, on all of its accounts, before it is computed.

    `request` is the digest of what was asked; `direct` is in `cloister_budget.orders.DIRECT_UNIT`; `steps` those of a
    training.
    """

    kind: Literal["charge-reserved"] = "charge-reserved"
    charge: Identifier
    user: Ref
    operation: Operation
    request: Digest
    sandbox: Sandbox | None
    sources: tuple[ChargedSource, ...] = Field(min_length=1, max_length=16)
    mechanism: Mechanism
    epsilon: float
    delta: float
    losses: tuple[PopulationLoss, ...] = Field(min_length=1, max_length=16)
    direct: int = Field(ge=0)
    steps: int | None = Field(ge=1)


class ChargeSettled(Wire):
    """A charge ends without an answer. `steps` of a training were executed; None says all of a statistic.

    `state` is "released" where nothing was executed and everything came back.
    """

    kind: Literal["charge-settled"] = "charge-settled"
    charge: Identifier
    state: Literal["committed", "released"]
    steps: int | None = Field(ge=0)


class Released(Wire):
    """An answer leaves: the charge is settled with it. `receipt` is the digest of what its receipt says."""

    kind: Literal["release"] = "release"
    release: Identifier
    charge: Identifier
    receipt: Digest
    steps: int | None = Field(ge=1)


class BudgetRequested(Wire):
    """A scientist asks an owner for more. `content` is a salted commitment to what was said."""

    kind: Literal["budget-request"] = "budget-request"
    request: Identifier
    user: Ref
    dataset: Ref
    content: Digest


class BudgetAnswered(Wire):
    kind: Literal["budget-answer"] = "budget-answer"
    request: Identifier
    state: Literal["granted", "refused"]
    content: Digest


Entry = Annotated[
    GuardStarted
    | UserCreated
    | Login
    | KernelStarted
    | Transferred
    | Counted
    | Refused
    | OwnerTermsSet
    | Unlocked
    | Locked
    | Restored
    | GapAccepted
    | PopulationOpened
    | Uploaded
    | PolicySet
    | LimitsSet
    | ChargeReserved
    | ChargeSettled
    | Released
    | BudgetRequested
    | BudgetAnswered,
    Field(discriminator="kind"),
]


class LeafBody(Wire):
    """What a leaf's hash covers, as canonical JSON: its place, its time in whole minutes, and what happened."""

    v: Literal[1] = 1
    index: int = Field(ge=0)
    at: UnixSeconds
    facts: Entry
