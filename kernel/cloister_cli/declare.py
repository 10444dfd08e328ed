"""An owner's schema and policy from TOML. Pure but for reading the file; the guard checks everything again.

A schema file:

    description = "What the table is about"
    # privacy_unit = "patient"        # the column that says whose row it is; without it each row is its own person
    # partition = "site"              # a category or boolean column that divides these people for good, in public

    [[columns]]
    name = "age"
    type = "integer"                  # integer, real, category, boolean, date, text, tensor
    low = 0                           # bounds are public: choose them without looking at the data
    high = 120

A policy file (`dataset` and `version` are filled in):

    population_limit = { epsilon = 10.0, delta = 1e-5 }   # all users together
    release_delta = 1e-5
    epsilon_cap = 2.0                                      # the largest single request
    operations = ["count", "sum", "mean", "train", "evaluate"]
    platforms = ["sev-snp", "tdx"]                         # where the data may be used
    minimum_sandbox = "user"                               # none, user, confined
    transfers = "forbidden"                                # or "allowed": files between laptop and kernel
    expires = 2027-01-01                                   # or "never"

    [users]
    alice = { epsilon = 6.0, delta = 1e-5 }
    bob = { epsilon = 6.0, delta = 1e-5, epsilon_cap = 1.0, expires = 2026-12-31 }   # stricter for one account

    [groups.oncology]                                      # users that share an account, on top of their own
    members = ["alice", "bob"]
    limit = { epsilon = 8.0, delta = 1e-5 }

and, to stop at once what runs as well as what is asked:

    suspended = true                                       # the whole dataset
    suspended_users = ["bob"]
"""

from __future__ import annotations

import datetime
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from cloister_data.base import Wire
from cloister_data.errors import ConfigurationError
from cloister_data.policy import Limit, Policy
from cloister_data.schema import Schema

MAX_FILE = 4 << 20

W = TypeVar("W", bound=Wire)


def load_schema(path: Path) -> Schema:
    """Raises ConfigurationError that names the file and the wrong entry."""
    document = _plain_dates(_read_toml(path, "schema"))
    return _valid(Schema, document, path)


def load_policy(path: Path, dataset: str, version: int) -> Policy:
    """The policy of `dataset` in `version`. Raises ConfigurationError that names the file and the wrong entry."""
    document = _read_toml(path, "policy")
    for key in ("dataset", "version", "format"):
        if key in document:
            raise ConfigurationError(
                f"{path} is wrong at {key!r}.",
                why="The command fills it in: the dataset from its name, the version one above the last.",
                next_step=f"Remove {key!r} from the file.",
            )
    expires = document.get("expires", "missing")
    document["expires"] = _expiry(expires, path)
    for key, none in (("users", {}), ("groups", {}), ("suspended", False), ("suspended_users", [])):
        document.setdefault(key, none)
    for limit in _limits(document):
        if "expires" in limit:
            limit["expires"] = _expiry(limit["expires"], path)
    return _valid(Policy, {**document, "dataset": dataset, "version": version}, path)


def policy_toml(policy: Policy) -> str:
    """The policy in the form that `load_policy` reads."""
    expires = "never" if policy.expires is None else None
    stamp = f'"{expires}"' if expires else _utc(policy.expires or 0)
    lines = [
        f"# {policy.dataset}, version {policy.version}",
        f"population_limit = {_limit(policy.population_limit)}",
        f"release_delta = {policy.release_delta!r}",
        f"epsilon_cap = {policy.epsilon_cap!r}",
        f"operations = [{', '.join(_quoted(each) for each in policy.operations)}]",
        f"platforms = [{', '.join(_quoted(each) for each in policy.platforms)}]",
        f"minimum_sandbox = {_quoted(policy.minimum_sandbox)}",
        f"transfers = {_quoted(policy.transfers)}",
        f"expires = {stamp}",
        f"suspended = {str(policy.suspended).lower()}",
        f"suspended_users = [{', '.join(_quoted(each) for each in policy.suspended_users)}]",
        "",
        "[users]",
        *(f"{_quoted(user)} = {_limit(limit)}" for user, limit in sorted(policy.users.items())),
    ]
    for name, group in sorted(policy.groups.items()):
        lines += [
            "",
            f"[groups.{_quoted(name)}]",
            f"members = [{', '.join(_quoted(each) for each in group.members)}]",
            f"limit = {_limit(group.limit)}",
        ]
    return "\n".join(lines) + "\n"


def _limits(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Every limit in a document that isn't checked yet."""
    users, groups = document.get("users"), document.get("groups")
    found = [document.get("population_limit"), *(users.values() if isinstance(users, dict) else ())]
    found += (
        [each.get("limit") for each in groups.values() if isinstance(each, dict)] if isinstance(groups, dict) else []
    )
    return [each for each in found if isinstance(each, dict)]


def _limit(limit: Limit) -> str:
    parts = [f"epsilon = {limit.epsilon!r}", f"delta = {limit.delta!r}"]
    if limit.epsilon_cap is not None:
        parts.append(f"epsilon_cap = {limit.epsilon_cap!r}")
    if limit.expires is not None:
        parts.append(f"expires = {_utc(limit.expires)}")
    return f"{{ {', '.join(parts)} }}"


def _quoted(text: str) -> str:
    return f'"{text}"'


def _utc(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _expiry(value: object, path: Path) -> int | None:
    if value == "never":
        return None
    if isinstance(value, datetime.datetime):
        moment = value if value.tzinfo is not None else value.replace(tzinfo=datetime.UTC)
        return int(moment.timestamp())
    if isinstance(value, datetime.date):
        midnight = datetime.datetime.combine(value, datetime.time(), datetime.UTC)
        return int(midnight.timestamp())
    raise ConfigurationError(
        f"{path} is wrong at 'expires'.",
        why="A policy says until when it holds." if value == "missing" else f"{value!r} is no date.",
        next_step='Write a date (expires = 2027-01-01, UTC), or expires = "never".',
    )


def _plain_dates(value: Any) -> Any:
    """TOML's dates as ISO 8601 text, as the schema's date columns take them."""
    if isinstance(value, dict):
        return {key: _plain_dates(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain_dates(each) for each in value]
    return value.isoformat() if isinstance(value, datetime.date) else value


def _read_toml(path: Path, what: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE + 1)
        if len(content) > MAX_FILE:
            raise ConfigurationError(f"The {what} file {path} is larger than {MAX_FILE >> 20} MiB.")
        return tomllib.loads(content.decode("utf-8"))
    except OSError as error:
        raise ConfigurationError(
            f"The {what} file {path} can't be read.", why=f"{error.strerror}.", next_step="Check the path."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"The {what} file {path} isn't TOML.", why=f"{error}.") from error


def _valid(kind: type[W], document: dict[str, Any], path: Path) -> W:
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        # A misspelt key is both unknown and missing under its right name: the unknown one is what was written.
        found = error.errors(include_url=False, include_input=False)
        first = min(found, key=lambda each: each["type"] != "extra_forbidden")
        raise ConfigurationError(
            f"{path} is wrong at {_where(first['loc'], document)!r}.",
            why=f"{first['msg']}.",
            next_step="`cloister dataset upload --help` shows a sample of both files.",
        ) from error


def _where(location: tuple[int | str, ...], document: dict[str, Any]) -> str:
    """`columns.3.low` with the column's name instead of its number."""
    parts = [str(part) for part in location]
    if len(location) > 1 and location[0] == "columns" and isinstance(location[1], int):
        entry = document["columns"][location[1]]
        if isinstance(entry, dict) and "name" in entry:
            parts[1] = str(entry["name"])
    return ".".join(parts) or "the file"
