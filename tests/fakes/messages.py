"""Every message class of `cloister_data`, found by importing all of its modules."""

import importlib
import pkgutil

import cloister_data
from cloister_data.base import Wire


def every_message() -> list[type[Wire]]:
    """All subclasses of `Wire` that `cloister_data` defines, by name."""
    for module in pkgutil.iter_modules(cloister_data.__path__):
        importlib.import_module(f"cloister_data.{module.name}")
    found: set[type[Wire]] = set()
    open_ends: list[type[Wire]] = [Wire]
    while open_ends:
        for child in open_ends.pop().__subclasses__():
            found.add(child)
            open_ends.append(child)
    return sorted(
        (kind for kind in found if kind.__module__.startswith("cloister_data.")), key=lambda kind: kind.__name__
    )
