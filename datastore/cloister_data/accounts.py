"""Budgets as people see them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cloister_data.base import DatasetName, Identifier, Label, Text, UnixSeconds, UserName, Wire
from cloister_data.policy import Limit


class AccountView(Wire):
    """One account of a population, or of one `part` of it where its people are divided.

    `used_share` is the share of the limit that the filter has consumed, min over orders of S_k/B_k rounded up;
    `used` = `used_share` x `limit.epsilon`. `reserved_share` is what running requests hold on top. `fits` is the
    largest epsilon of one Laplace release that is still admitted (0 when none is). `guarantee` is the highest limit
    ever set: what holds for everything that was released. A group's account lists its members.
    """

    account: Text
    population: DatasetName
    part: Label | None = None
    scope: Literal["user", "group", "population"]
    user: UserName | None
    group: UserName | None = None
    members: tuple[UserName, ...] = Field(default=(), max_length=100_000)
    limit: Limit
    guarantee: Limit
    used_share: float = Field(ge=0, le=1)
    reserved_share: float = Field(ge=0, le=1)
    used: float = Field(ge=0)
    fits: float = Field(ge=0)
    datasets: tuple[DatasetName, ...] = Field(default=(), max_length=10_000)


class AccountList(Wire):
    accounts: tuple[AccountView, ...] = Field(max_length=100_000)


class ChargeView(Wire):
    """What a request cost: its own tight epsilon at delta, and the accounts it was charged to.

    `policies` gives, for each dataset of the request, the version of the policy that admitted it.
    """

    charge: Identifier
    state: Literal["reserved", "committed", "released"]
    epsilon: float
    delta: float
    steps: int | None = None
    steps_charged: int | None = None
    accounts: tuple[Text, ...] = Field(default=(), max_length=1024)
    policies: dict[DatasetName, int] = Field(default={}, max_length=64)


class UsedAt(Wire):
    """The share of an account's present limit that was used at a time, which is in whole minutes."""

    at: UnixSeconds
    used_share: float = Field(ge=0, le=1)


class AccountHistory(Wire):
    """How an account was used over time, the oldest first: one point for each minute in which something was settled."""

    account: Text
    points: tuple[UsedAt, ...] = Field(max_length=1000)


class AccountHistoryList(Wire):
    histories: tuple[AccountHistory, ...] = Field(max_length=100_000)


class WhatIfChange(Wire):
    """A paid request that the draft would have refused, by `rule` ("budget" where a limit refuses it)."""

    charge: Identifier
    user: UserName
    operation: Text
    epsilon: float
    created: UnixSeconds
    rule: Text
    reason: Text


class WhatIf(Wire):
    """What a draft would have changed: of `requests` past ones about the dataset, `refused` would not have been paid.

    `changes` holds the first 1000 of them, the oldest first.
    """

    dataset: DatasetName
    requests: int = Field(ge=0)
    refused: int = Field(ge=0)
    changes: tuple[WhatIfChange, ...] = Field(max_length=1000)
