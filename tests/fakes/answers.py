"""Answers as a guard would give them, with figures that tests recognise."""

from __future__ import annotations

import secrets

from cloister_data.accounts import AccountList, AccountView, ChargeView
from cloister_data.datasets import DatasetView, SplitRef
from cloister_data.mechanism import Composition, DiscreteLaplace, DpSgd, Mechanism
from cloister_data.policy import Limit
from cloister_data.release import Receipt, Release, SourceVersion
from cloister_data.schema import (
    BooleanColumn,
    CategoryColumn,
    IntegerColumn,
    RealColumn,
    Schema,
    TextColumn,
)
from cloister_data.statistics import CostView, Estimate
from cloister_data.training import JobView

SCHEMA = Schema(
    description="A <b>small</b> table",
    privacy_unit="patient",
    columns=(
        TextColumn(name="patient", max_bytes=64),
        IntegerColumn(name="age", low=0, high=120),
        RealColumn(name="weight", low=0, high=300, nullable=True),
        CategoryColumn(name="smoker", categories=("never", "once", "daily")),
        BooleanColumn(name="ill", description="<script>alert(1)</script>"),
        TextColumn(name="notes", max_bytes=1000),
    ),
)
LIMIT = Limit(epsilon=8.0, delta=1e-5)
SGD = DpSgd(noise_multiplier=5.0, sample_rate=0.25, steps=70)


def dataset(name: str = "hospital-a/patients", schema: Schema = SCHEMA) -> DatasetView:
    return DatasetView(
        name=name,
        version=1,
        owner=name.split("/")[0],
        population=name,
        data_schema=schema,
        units=285,
        adjacency="zero-out",
        policy_version=1,
        operations=("count", "sum", "mean", "train", "evaluate"),
        epsilon_cap=3.0,
        release_delta=1e-5,
        limit=LIMIT,
        expires=None,
        simulated=True,
    )


def accounts(*names: str) -> AccountList:
    """For each population one account of the user (25% used) and one of all users (10% used, 5% held)."""
    views = []
    for name in names:
        for scope, used, held in (("user", 0.25, 0.0), ("population", 0.1, 0.05)):
            views.append(
                AccountView(
                    account=name if scope == "population" else f"{name}:scientist",
                    population=name,
                    scope=scope,
                    user="scientist" if scope == "user" else None,
                    limit=LIMIT,
                    guarantee=LIMIT,
                    used_share=used,
                    reserved_share=held,
                    used=8 * used,
                    fits=5.0 if scope == "user" else 6.0,
                    datasets=(name,),
                )
            )
    return AccountList(accounts=tuple(views))


def cost(epsilon: float = 0.2, admitted: bool = True) -> CostView:
    return CostView(
        mechanism=DiscreteLaplace(sensitivity=1, scale=1 / epsilon),
        epsilon=epsilon,
        delta=1e-5,
        expected_error=0.5,
        shares={"hospital-a/patients": 0.0111},
        admitted=admitted,
        why_not="" if admitted else "It doesn't fit what is left in hospital-a/patients.",
    )


def release(
    estimates: tuple[Estimate, ...] = (Estimate(value=54.25, error_95=1.5),),
    *,
    kind: str = "statistic",
    mechanism: Mechanism | None = None,
    epsilon: float = 0.2,
) -> Release:
    charge, identity = secrets.token_hex(16), secrets.token_hex(16)
    return Release(
        release=identity,
        kind=kind,  # type: ignore[arg-type]
        title="mean of age, hospital-a/patients",
        estimates=estimates,
        charge=ChargeView(charge=charge, state="committed", epsilon=epsilon, delta=1e-5),
        receipt=Receipt(
            release=identity,
            charge=charge,
            user="scientist",
            request="0" * 64,
            sources=(
                SourceVersion(
                    dataset="hospital-a/patients", version=1, policy_version=1, population="hospital-a/patients"
                ),
            ),
            adjacency="zero-out",
            mechanism=mechanism or DiscreteLaplace(sensitivity=1, scale=5.0),
            epsilon=epsilon,
            delta=1e-5,
            evidence="1" * 64,
            leaf=3,
            entry=b"{}",
            inclusion=(),
            checkpoint="note",
            log_key=bytes(32),
            simulated=True,
            witnesses=(),
            witnessed=(),
            rollback="not prevented",
            issued=1_700_000_000,
        ),
    )


def ratio(epsilon: float = 0.3) -> Release:
    """A grouped mean: ratios of two noised numbers."""
    part = DiscreteLaplace(sensitivity=1, scale=10.0)
    return release(
        (Estimate(group="never", value=1.0, error_95=0.5), Estimate(group="<daily>", value=2.0, error_95=0.25)),
        mechanism=Composition(parts=(part, part)),
        epsilon=epsilon,
    )


def job(state: str = "running", done: int = 0, job_id: str = "a" * 32) -> JobView:
    return JobView(
        job=job_id,
        kind="train",
        state=state,  # type: ignore[arg-type]
        sources=(SplitRef(dataset="hospital-a/patients", part="train"),),
        created=1_700_000_000,
        steps=70,
        steps_done=done,
        charged_steps=done,
        epsilon=2.0,
        delta=1e-5,
        mechanism=SGD,
        release="b" * 32 if state == "done" else None,
        code="job-failed" if state == "failed" else "",
    )
