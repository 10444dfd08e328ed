"""Tab completion, as notebooks do it: jedi on live objects. An annotation that it stumbles over hides every name."""

import inspect

import jedi
import pytest

import cloister

CLASSES = [value for name in cloister.__all__ if inspect.isclass(value := getattr(cloister, name))]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_public_name_is_completed(kind: type) -> None:
    completed = {found.name for found in jedi.Interpreter("x.", [{"x": kind.__new__(kind)}]).complete(1, 2)}
    assert completed >= {name for name in dir(kind) if not name.startswith("_")}
