"""The demo's data: scikit-learn's breast-cancer records, dealt to two hospitals, with declared public bounds.

The bounds are round figures for such measurements, chosen without the rows: an owner who took the minimum and maximum
of the data would publish two people's values.
"""

from __future__ import annotations

import csv
import io

from cloister_data.schema import CategoryColumn, RealColumn, Schema

OWNERS = ("hospital-a", "hospital-b")
DATASET = "breast-cancer"
TARGET = "diagnosis"
DEAL_SEED = 7
"""Which record goes to which hospital; public, like the records."""

_MEAN = {
    "radius": 30.0,
    "texture": 45.0,
    "perimeter": 200.0,
    "area": 2600.0,
    "smoothness": 0.2,
    "compactness": 0.4,
    "concavity": 0.5,
    "concave points": 0.25,
    "symmetry": 0.35,
    "fractal dimension": 0.12,
}
_ERROR = {
    "radius": 3.5,
    "texture": 6.0,
    "perimeter": 25.0,
    "area": 600.0,
    "smoothness": 0.04,
    "compactness": 0.15,
    "concavity": 0.5,
    "concave points": 0.06,
    "symmetry": 0.1,
    "fractal dimension": 0.04,
}
_WORST = {
    "radius": 40.0,
    "texture": 50.0,
    "perimeter": 280.0,
    "area": 4500.0,
    "smoothness": 0.25,
    "compactness": 1.2,
    "concavity": 1.5,
    "concave points": 0.35,
    "symmetry": 0.7,
    "fractal dimension": 0.25,
}
_LOW = {"radius": 5.0, "texture": 5.0, "perimeter": 30.0, "area": 100.0}
_WHAT = {
    "mean": "mean over the cell nuclei",
    "error": "standard error over the nuclei",
    "worst": "mean of the 3 largest",
}


def schema() -> Schema:
    """30 measurements of cell nuclei and the diagnosis; each row is one patient."""
    columns: list[RealColumn | CategoryColumn] = []
    for kind, highs in (("mean", _MEAN), ("error", _ERROR), ("worst", _WORST)):
        for name, high in highs.items():
            columns.append(
                RealColumn(
                    name=f"{name} error" if kind == "error" else f"{kind} {name}",
                    description=_WHAT[kind],
                    low=0.0 if kind == "error" else _LOW.get(name, 0.0),
                    high=high,
                )
            )
    columns.append(CategoryColumn(name=TARGET, description="of the biopsy", categories=("malignant", "benign")))
    return Schema(description="Breast cancer Wisconsin (diagnostic), as scikit-learn has it", columns=tuple(columns))


def schema_toml() -> str:
    """The schema as an owner would write it."""
    declared = schema()
    parts = [f'description = "{declared.description}"\n']
    for column in declared.columns:
        lines = ["[[columns]]", f'name = "{column.name}"', f'type = "{column.type}"']
        lines.append(f'description = "{column.description}"')
        if isinstance(column, RealColumn):
            lines += [f"low = {column.low!r}", f"high = {column.high!r}"]
        elif isinstance(column, CategoryColumn):
            lines.append("categories = [" + ", ".join(f'"{each}"' for each in column.categories) + "]")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def policy_toml(sandbox: str) -> str:
    """What each hospital admits."""
    return f"""\
population_limit = {{ epsilon = 10.0, delta = 1e-5 }}   # all users together
release_delta = 1e-5
epsilon_cap = 3.0                                      # the largest single request
operations = ["count", "sum", "mean", "train", "evaluate"]
platforms = ["simulated"]                              # a real owner would list sev-snp and tdx only
minimum_sandbox = "{sandbox}"
transfers = "allowed"                                  # files between laptops and kernels
expires = "never"

[users]
scientist = {{ epsilon = 8.0, delta = 1e-5 }}
"""


def csv_files() -> dict[str, str]:
    """Each hospital's rows as CSV."""
    import numpy as np
    from sklearn.datasets import load_breast_cancer

    records = load_breast_cancer()
    names = [str(name) for name in records.feature_names]
    order = np.random.default_rng(DEAL_SEED).permutation(len(records.target))
    columns = [column.name for column in schema().columns]
    files = {}
    for at, owner in enumerate(OWNERS):
        buffer = io.StringIO()
        writer = csv.writer(buffer)
        writer.writerow(columns)
        for row in order[at :: len(OWNERS)]:
            values = dict(zip(names, records.data[row].tolist(), strict=True))
            diagnosis = str(records.target_names[records.target[row]])
            writer.writerow([diagnosis if name == TARGET else repr(values[name]) for name in columns])
        files[owner] = buffer.getvalue()
    return files
