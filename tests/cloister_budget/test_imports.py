"""What laptops need of the budget loads no database, and no heavy library."""

from __future__ import annotations

import subprocess
import sys

PURE = [
    "receipts",
    "replay",
    "refs",
    "books",
    "entries",
    "orders",
    "loss",
    "filter",
    "calibrate",
    "quote",
    "policy",
    "merkle",
]


def loaded_by(modules: list[str]) -> set[str]:
    code = f"import sys, {', '.join('cloister_budget.' + name for name in modules)}; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    return {name.split(".")[0] for name in found.split()}


def test_the_pure_modules_load_no_database_and_nothing_heavy() -> None:
    assert not loaded_by(PURE) & {"sqlalchemy", "alembic", "dp_accounting", "numpy", "scipy", "torch", "opacus"}


def test_the_ledger_does_load_a_database() -> None:
    assert "sqlalchemy" in loaded_by(["ledger"])
