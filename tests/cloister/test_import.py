"""`import cloister` stays light: notebooks and commands start at once."""

import json
import subprocess
import sys

import pytest

import cloister

HEAVY = ("torch", "numpy", "pandas", "sqlalchemy", "pyarrow", "ipywidgets", "matplotlib", "cloister_guard")


def _loaded(statement: str) -> set[str]:
    code = f"{statement}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_importing_the_sdk_loads_nothing_heavy() -> None:
    assert not _loaded("import cloister").intersection(HEAVY)


def test_the_command_line_loads_nothing_heavy() -> None:
    assert not _loaded("import cloister_cli.main").intersection(HEAVY)


def test_a_kernels_preload_loads_not_even_what_it_shows() -> None:
    """A kernel has `cloister` and its magics before the first cell."""
    assert not _loaded("import cloister.magics").intersection({*HEAVY, "pydantic", "httpx", "cloister.catalogue"})
    assert "cloister.catalogue" in _loaded("import cloister; cloister.datasets")  # the control


def test_every_public_name_is_found_where_it_is_said_to_be() -> None:
    assert sorted(name for names in cloister._WHERE.values() for name in names) == sorted(cloister.__all__)
    with pytest.raises(AttributeError):
        cloister.no_such_name  # noqa: B018


def test_positive_control() -> None:
    assert "numpy" in _loaded("import cloister, numpy")
