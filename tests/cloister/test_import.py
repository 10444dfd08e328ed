"""`import cloister` stays light: notebooks and commands start at once."""

import json
import subprocess
import sys

HEAVY = ("torch", "numpy", "pandas", "sqlalchemy", "pyarrow", "ipywidgets", "matplotlib", "cloister_guard")


def _loaded(statement: str) -> set[str]:
    code = f"{statement}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_importing_the_sdk_loads_nothing_heavy() -> None:
    assert not _loaded("import cloister").intersection(HEAVY)


def test_the_command_line_loads_nothing_heavy() -> None:
    assert not _loaded("import cloister_cli.main").intersection(HEAVY)


def test_positive_control() -> None:
    assert "numpy" in _loaded("import cloister, numpy")
