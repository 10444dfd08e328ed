"""From names in a request to datasets that the caller may use: every refusal here costs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloister_budget.clock import steady_time
from cloister_budget.policy import AccessRequest, decide, halted
from cloister_budget.tables import Dataset, DatasetVersion, PolicyRow
from cloister_data.datasets import DatasetView, SplitRef
from cloister_data.errors import ConflictError, InvalidRequestError, NotFoundError, PolicyRefusedError
from cloister_data.policy import Limit, Operation, Platform, Policy
from cloister_data.release import SourceVersion
from cloister_data.schema import Schema
from cloister_guard.identity import Caller


@dataclass(frozen=True)
class Source:
    """One dataset of a request, as it stands now, with the policy that admitted the request.

    `policy_digest` and `schema_digest` are those that the log knows the policy and the schema by.
    """

    ref: SplitRef
    row: Dataset
    version: DatasetVersion
    policy: Policy
    policy_digest: str
    data_schema: Schema
    schema_digest: str

    @property
    def as_version(self) -> SourceVersion:
        return SourceVersion(
            dataset=self.row.name,
            version=self.version.version,
            policy_version=self.policy.version,
            population=self.row.population,
            division=self.ref.division,
        )


def load_policy(session: Session, dataset: Dataset) -> Policy:
    """The policy in force. Its signature was verified when it was stored."""
    return _in_force(session, dataset)[0]


def _in_force(session: Session, dataset: Dataset) -> tuple[Policy, str]:
    return _policy(session.get_one(PolicyRow, (dataset.name, dataset.policy_version)).document)


@lru_cache(maxsize=1024)
def _policy(document: bytes) -> tuple[Policy, str]:
    """(the policy, its digest): every request asks for those of the same few documents."""
    policy = Policy.from_json(document)
    return policy, policy.digest()


@lru_cache(maxsize=1024)
def _schema(stored: str) -> tuple[Schema, str]:
    schema = Schema.from_json(stored)
    return schema, schema.digest()


def _visible(caller: Caller, dataset: Dataset, policy: Policy) -> bool:
    return caller.user in policy.readers or (caller.role == "owner" and caller.user == dataset.owner)


def _load(session: Session, ref: SplitRef, caller: Caller) -> Source:
    row = session.get(Dataset, ref.dataset)
    policy, policy_digest = _in_force(session, row) if row is not None else (None, "")
    if row is None or policy is None or not _visible(caller, row, policy):
        raise NotFoundError(
            f"There is no dataset {ref.dataset!r} for you here.",
            why="Either it doesn't exist or its owner's policy doesn't name you.",
            next_step="cloister.datasets() lists those that you may use.",
        )
    version = session.get_one(DatasetVersion, (row.name, row.version))
    schema, schema_digest = _schema(version.schema_json)
    if ref.division is not None and ref.division not in schema.parts:
        raise InvalidRequestError(
            f"{row.name} has no part {ref.division!r}.",
            why=f"Its parts are {', '.join(schema.parts)}." if schema.parts else "Its schema declares no partition.",
            next_step="Name one of these parts, or ask about the whole. Nothing was charged."
            if schema.parts
            else "Ask about the whole. Nothing was charged.",
        )
    return Source(ref, row, version, policy, policy_digest, schema, schema_digest)


def load_sources(session: Session, caller: Caller, refs: tuple[SplitRef, ...]) -> tuple[Source, ...]:
    """The sources of a request as they stand. Raises NotFoundError, or InvalidRequestError where they don't fit."""
    if len({ref.dataset for ref in refs}) != len(refs):
        raise InvalidRequestError(
            "A dataset is named twice.",
            next_step="Name each dataset once: one part of it, or the whole. Nothing was charged.",
        )
    sources = tuple(_load(session, ref, caller) for ref in refs)
    if len(populations(sources)) != len(sources):
        raise InvalidRequestError(
            "Two of the datasets are about the same people.",
            why="One person would count twice, which the price of one request doesn't cover.",
            next_step="Use datasets of different populations together.",
        )
    first = sources[0].data_schema
    if any(source.data_schema.columns != first.columns for source in sources):
        raise InvalidRequestError(
            "The datasets don't have the same schema, so they can't be used as one.",
            next_step="Compare their schemas with cloister.dataset(NAME).",
        )
    return sources


def admit(
    sources: tuple[Source, ...], caller: Caller, *, operation: Operation, epsilon: float, platform: Platform
) -> None:
    """Raises PolicyRefusedError, with the rule that refused, unless every owner's policy admits the request."""
    for source in sources:
        decision = decide(
            AccessRequest(
                user=caller.user,
                dataset=source.row.name,
                operation=operation,
                epsilon=epsilon,
                platform=platform,
                sandbox=caller.sandbox,
            ),
            source.policy,
            int(steady_time()),
        )
        if not decision.allowed:
            raise PolicyRefusedError(
                f"The policy of {source.row.name} doesn't admit this ({decision.rule}).",
                why=decision.reason,
                next_step="Ask the owner, or change the request. Nothing was charged.",
            )


def hold_policies(session: Session, sources: tuple[Source, ...], user: str) -> None:
    """For the transaction that pays: hold the policies that admitted the request until it ends.

    What `admit` decided may be minutes old, because requests wait for a worker. Raises ConflictError where a policy or
    the rows were replaced meanwhile, or a policy has run out; PolicyRefusedError where one now suspends the user.
    """
    rows = _rows_now(session, sources, lock=True)
    _refuse_halted([load_policy(session, row) for row in rows.values()], user)
    for source in sources:
        row = rows[source.row.name]
        seen = (source.policy.version, source.version.version)
        expires = source.policy.expires
        if (row.policy_version, row.version) != seen or (expires is not None and steady_time() >= expires):
            raise ConflictError(
                f"The policy or the data of {row.name} changed while the request waited.",
                why="It was admitted under the earlier ones.",
                next_step="Nothing was charged. Send it again, under a new request id.",
            )


def refuse_halted(session: Session, sources: tuple[Source, ...], user: str) -> None:
    """Raises PolicyRefusedError where an owner has suspended the user, or the dataset, since the request was paid."""
    rows = _rows_now(session, sources, lock=False)
    _refuse_halted([load_policy(session, row) for row in rows.values()], user)


def _rows_now(session: Session, sources: tuple[Source, ...], *, lock: bool) -> dict[str, Dataset]:
    # Locked in the order of their names, and before any account: every writer keeps this order.
    wanted = select(Dataset).where(Dataset.name.in_([source.row.name for source in sources])).order_by(Dataset.name)
    if lock:
        wanted = wanted.with_for_update(read=True)
    return {row.name: row for row in session.scalars(wanted.execution_options(populate_existing=True))}


def _refuse_halted(policies: list[Policy], user: str) -> None:
    for policy in policies:
        reason = halted(policy, user)
        if reason:
            raise PolicyRefusedError(
                f"The policy of {policy.dataset} doesn't admit this (suspended).",
                why=reason,
                next_step="Ask the owner. What was marked or paid before stays spent.",
            )


def _tightness(limit: Limit) -> tuple[float, float]:
    return limit.epsilon, limit.delta


def release_delta(sources: tuple[Source, ...]) -> float:
    """The delta at which a release over these sources states its epsilon: the strictest owner's."""
    return min(source.policy.release_delta for source in sources)


def populations(sources: tuple[Source, ...]) -> list[str]:
    return sorted({source.row.population for source in sources})


def parts_asked(sources: tuple[Source, ...]) -> dict[str, str]:
    """The part that the request is about of each population of which it is about one part."""
    return {source.row.population: source.ref.division for source in sources if source.ref.division is not None}


def visible_datasets(session: Session, caller: Caller, *, simulated: bool) -> list[DatasetView]:
    """The catalogue of one caller, by name."""
    views = []
    for row in session.scalars(select(Dataset).order_by(Dataset.name)):
        policy = load_policy(session, row)
        if _visible(caller, row, policy):
            version = session.get_one(DatasetVersion, (row.name, row.version))
            schema = Schema.from_json(version.schema_json)
            views.append(
                DatasetView(
                    name=row.name,
                    version=row.version,
                    owner=row.owner,
                    population=row.population,
                    data_schema=schema,
                    units=version.units,
                    part_units=dict(zip(schema.parts, version.part_units, strict=True)),
                    adjacency="zero-out",
                    policy_version=policy.version,
                    operations=policy.operations,
                    epsilon_cap=policy.epsilon_cap,
                    release_delta=policy.release_delta,
                    limit=min(policy.limits_of(caller.user), key=_tightness, default=policy.population_limit),
                    suspended=bool(halted(policy, caller.user)),
                    expires=policy.expires,
                    simulated=simulated,
                )
            )
    return views
