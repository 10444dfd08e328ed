"""Patients of several sites: a dataset whose people are divided into parts."""

from __future__ import annotations

import pandas as pd

from cloister_data.schema import CategoryColumn, IntegerColumn, RealColumn, Schema

SITES = ("north", "south", "east")
SIZES = {"north": 600, "south": 300, "east": 100}
AGES = {"north": 20.0, "south": 50.0, "east": 80.0}


def sited(parts: tuple[str, ...] = SITES, column: str = "site", partition: str | None = "site") -> Schema:
    return Schema(
        privacy_unit="person",
        partition=partition,
        columns=(
            IntegerColumn(name="person", low=0, high=10**9),
            CategoryColumn(name=column, categories=parts),
            RealColumn(name="age", low=0, high=100),
        ),
    )


def patients(first: int = 0, **sizes: int) -> pd.DataFrame:
    """People numbered from `first`, those of one site after those of another; at each site all are of one age."""
    sites = [site for site, size in (sizes or SIZES).items() for _ in range(size)]
    return pd.DataFrame(
        {
            "person": range(first, first + len(sites)),
            "site": sites,
            "age": [AGES[site] for site in sites],
        }
    )
