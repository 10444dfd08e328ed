"""A share over time as a plot of characters."""

from __future__ import annotations

from collections.abc import Sequence

from cloister.rendering import day
from cloister_data.accounts import UsedAt

WIDTH, HEIGHT = 60, 8
_EIGHTHS = " ▁▂▃▄▅▆▇█"


def plot(points: Sequence[UsedAt], width: int = WIDTH, height: int = HEIGHT) -> list[str]:
    """Lines from 100% down to 0%, the first and the last day below. A column shows the share at its time's end."""
    if not points:
        return ["nothing is used yet"]
    first, last = points[0].at, points[-1].at
    columns = []
    for place in range(width):
        until = first + (last - first) * (place + 1) / width
        columns.append(max((each.used_share for each in points if each.at <= until), default=0.0))
    lines = []
    for row in range(height, 0, -1):
        label = f"{100 * row / height:>4.0f}% |" if row in (height, height // 2) else "      |"
        lines.append(label + "".join(_cell(share * height - (row - 1)) for share in columns).rstrip())
    lines.append("   0% +" + "-" * width)
    begin, end = day(first), day(last)
    lines.append("       " + begin + end.rjust(width - len(begin)))
    return lines


def _cell(filled: float) -> str:
    """A cell of which this share is filled; what is used at all is seen."""
    if filled <= 0:
        return _EIGHTHS[0]
    return _EIGHTHS[min(8, max(1, round(filled * 8)))]
