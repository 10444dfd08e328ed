import csv
import io
from pathlib import Path

import pytest

from cloister_cli import demo_data
from cloister_cli.declare import load_policy, load_schema
from cloister_data.schema import RealColumn


def test_the_declared_files_say_what_the_code_says(tmp_path: Path) -> None:
    (tmp_path / "schema.toml").write_text(demo_data.schema_toml())
    assert load_schema(tmp_path / "schema.toml") == demo_data.schema()
    (tmp_path / "policy.toml").write_text(demo_data.policy_toml("user"))
    policy = load_policy(tmp_path / "policy.toml", "hospital-a/breast-cancer", 1)
    assert policy.platforms == ("simulated",)
    assert set(policy.users) == {"scientist"}


def test_every_record_is_dealt_once_and_lies_inside_round_bounds() -> None:
    files = demo_data.csv_files()
    rows = [row for content in files.values() for row in csv.DictReader(io.StringIO(content))]
    assert len(rows) == 569
    assert len({tuple(row.values()) for row in rows}) == 569
    assert [len(content.splitlines()) - 1 for content in files.values()] == [285, 284]
    for column in demo_data.schema().columns:
        if isinstance(column, RealColumn):
            values = [float(row[column.name]) for row in rows]
            # Inside, and not the data's own extremes.
            assert column.low <= min(values)
            assert max(values) < column.high
            assert column.low < min(values) or column.low == 0
        else:
            assert {row[column.name] for row in rows} == set(column.categories)


def test_the_notebook_is_clean_and_asks_for_epsilon_2() -> None:
    nbformat = pytest.importorskip("nbformat")
    from cloister_cli.demo import find_notebook

    notebook = nbformat.read(find_notebook(), as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert any("epsilon=2.0" in cell.source for cell in code)
