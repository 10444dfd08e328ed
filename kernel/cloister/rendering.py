"""Plain text and HTML for people. Every value is escaped: names and texts come from other people."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape

_CELL = "text-align:left;padding:.15em .7em"


def figure(value: float) -> str:
    """A number with four significant digits."""
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def share(value: float) -> str:
    """A share in [0, 1] as a percentage, rounded up: what is used never looks smaller than it is."""
    if value >= 1:
        return "100%"
    tenths = -int(-value * 1000 // 1)
    return f"{min(tenths, 999) / 10:g}%"


def one_line(text: str) -> str:
    """Without control characters, so that nobody's text can steer a terminal."""
    return "".join(char if char.isprintable() else " " for char in text)


def text_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned by spaces."""
    cells = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(header), *(len(row[at]) for row in cells), 0) for at, header in enumerate(headers)]
    lines = [headers, ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def html_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th style="{_CELL}">{escape(header)}</th>' for header in headers)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{escape(cell)}</td>' for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def html_meter(used: float, reserved: float, label: str) -> str:
    """A bar of what is used (dark) and held by running jobs (light); `label` says it in words."""
    first, second = 100 * min(1.0, used), 100 * min(1.0 - min(1.0, used), reserved)
    return (
        f'<div role="img" aria-label="{escape(label)}" title="{escape(label)}" style="display:inline-flex;width:12em;'
        f'height:.8em;border:1px solid #6e7781;border-radius:.3em;overflow:hidden;vertical-align:middle">'
        f'<span style="width:{first:.1f}%;background:#0969da"></span>'
        f'<span style="width:{second:.1f}%;background:#9ecbff"></span></div> {escape(label)}'
    )


def text_meter(used: float, reserved: float, width: int = 20) -> str:
    """The same bar as text: `#` is used, `+` is held by running jobs."""
    first = min(width, -int(-min(1.0, used) * width // 1))
    second = min(width - first, -int(-min(1.0, reserved) * width // 1))
    return "[" + "#" * first + "+" * second + "." * (width - first - second) + "]"


def html_box(title: str, body: str) -> str:
    return f'<div class="cloister"><p><b>{escape(title)}</b></p>{body}</div>'


def day(seconds: int) -> str:
    """A day in UTC."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")
    except (OverflowError, OSError, ValueError):
        return f"{seconds} s"


def duration(seconds: float) -> str:
    if seconds < 1:
        return "a second"
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
