"""What every benchmark prints: figures with their goals, as JSON lines or as a table for people."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True)
class Figure:
    """`goal` is the bound that `value` has to keep, on the side that `better` names; None: nothing was promised."""

    name: str
    value: float
    unit: str
    goal: float | None = None
    better: Literal["higher", "lower"] = "lower"
    detail: str = ""

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value >= self.goal if self.better == "higher" else self.value <= self.goal

    def as_json(self) -> str:
        fields = asdict(self)
        return json.dumps({**{key: fields[key] for key in ("name", "value", "unit", "goal")}, "met": self.met,
                           "detail": self.detail})  # fmt: skip


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def spread(samples: Sequence[float]) -> tuple[float, float, float]:
    """(median, first quartile, third quartile)."""
    first, middle, third = statistics.quantiles(samples, n=4)
    return middle, first, third


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="one JSON object for each figure, a line each")
    return parser


def show(figures: Iterable[Figure], as_json: bool) -> None:
    """Print each figure as soon as it is there."""
    for figure in figures:
        if as_json:
            print(figure.as_json(), flush=True)
            continue
        verdict = {True: "met", False: "MISSED", None: ""}[figure.met]
        goal = "" if figure.goal is None else f"{'>=' if figure.better == 'higher' else '<='} {figure.goal:g}"
        print(
            f"{figure.name:<44} {figure.value:>10.4g} {figure.unit:<10} {goal:<8} {verdict:<7} {figure.detail}",
            flush=True,
        )
