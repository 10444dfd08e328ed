"""What the books hold: one value for each owner, population, dataset, account and open charge. Pure."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from cloister_budget.loss import Vector
from cloister_budget.orders import Orders
from cloister_data.policy import Limit


@dataclass(frozen=True)
class TermsBook:
    """An owner's terms in force: `witness` is a public key in hex, `unlock` the digest of the key to the data."""

    version: int
    witness: str
    unlock: str


@dataclass(frozen=True)
class PopulationBook:
    """`scope_accounts` are the population's own accounts, one for each part."""

    ref: str
    owner: str
    owner_key: str
    orders: Orders
    parts: int
    datasets: tuple[str, ...] = ()
    scope_accounts: tuple[str, ...] = ()


@dataclass(frozen=True)
class DatasetBook:
    """`pending` limits leaves of the policy in force are still to come; `bound` are each user's accounts by it."""

    ref: str
    population: str
    version: int
    data_schema: str
    policy: int = 0
    policy_digest: str = ""
    pending: int = 0
    bound: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class AccountBook:
    """An account's terms; `ceilings` are its budgets over its population's orders, as `filter.within` takes them."""

    ref: str
    population: str
    part: int
    scope: str
    limit: Limit | None
    ceilings: Vector
    direct_budget: int


class Held(NamedTuple):
    """What an account has lost, spent and reserved together, over its population's orders, and the direct delta."""

    loss: Vector
    direct: int


class OpenCharge(NamedTuple):
    """A charge that isn't settled: what it holds of which accounts."""

    losses: tuple[tuple[tuple[str, ...], Vector], ...]
    direct: int
    steps: int | None


class Layer(ChainMap[str, Any]):
    """A ChainMap of two, which is looked up several times for each charge."""

    def __getitem__(self, key: str) -> Any:
        mine, base = self.maps
        return mine[key] if key in mine else base[key]

    def get(self, key: str, default: Any = None) -> Any:
        mine, base = self.maps
        return mine[key] if key in mine else base.get(key, default)
