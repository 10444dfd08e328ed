"""Small datasets for tests, made here."""

from __future__ import annotations

import numpy as np
import pandas as pd

from cloister_data.schema import BooleanColumn, CategoryColumn, IntegerColumn, RealColumn, Schema, TextColumn

PEOPLE = Schema(
    description="people",
    columns=(
        RealColumn(name="height", low=100, high=220),
        IntegerColumn(name="age", low=0, high=120),
        CategoryColumn(name="ward", categories=("north", "south", "east")),
        BooleanColumn(name="ill"),
        TextColumn(name="note", max_bytes=64),
        RealColumn(name="weight", low=0, high=300, nullable=True),
    ),
)


def people(rows: int, seed: int = 0) -> pd.DataFrame:
    """Rows of `PEOPLE`; whoever is taller than 160 is ill."""
    draw = np.random.default_rng(seed)
    height = draw.uniform(120, 200, rows).round(3)
    return pd.DataFrame(
        {
            "height": height,
            "age": draw.integers(0, 100, rows),
            "ward": draw.choice(["north", "south", "east"], rows, p=[0.5, 0.4, 0.1]),
            "ill": height > 160,
            "note": [f"note {number}" for number in range(rows)],
            "weight": np.where(draw.uniform(size=rows) < 0.1, np.nan, draw.uniform(40, 120, rows).round(2)),
        }
    )
