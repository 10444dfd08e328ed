"""The documents as tests read them: fenced blocks, tables, commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "deploy").glob("*.md")),
)

_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block: what stands after the fence, what is inside, and the HTML comment on the line before, if any."""

    document: Path
    line: int
    info: str
    text: str
    note: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks(document: Path) -> Iterator[Block]:
    content = document.read_text("utf-8")
    for found in _FENCE.finditer(content):
        before = content[: found.start()].rstrip("\n").rsplit("\n", 1)[-1].strip()
        note = before[4:-3].strip() if before.startswith("<!--") and before.endswith("-->") else ""
        indent = len(found["indent"])
        text = "\n".join(line[indent:] for line in found["text"].splitlines())
        yield Block(document, content[: found.start()].count("\n") + 1, found["info"].strip(), text, note)


def table(document: Path, first_heading: str) -> list[list[str]]:
    """The rows of the one table whose first column has this heading; cells without backticks."""
    lines = document.read_text("utf-8").splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith(f"| {first_heading} |")]
    if len(starts) != 1:
        raise AssertionError(f"{document.name} has {len(starts)} tables that begin with {first_heading!r}")
    rows = []
    for line in lines[starts[0] + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("`", "") for cell in line.strip().strip("|").split("|")])
    return rows


def vectors(document: Path) -> dict[str, dict[str, str]]:
    """The blocks marked `vector NAME`: lines of `key = value`; a backslash and n stand for a newline."""
    found: dict[str, dict[str, str]] = {}
    for block in blocks(document):
        if block.info.startswith("vector "):
            pairs = (line.split("=", 1) for line in block.text.splitlines())
            found[block.info.removeprefix("vector ")] = {
                key.strip(): value.strip().replace("\\n", "\n") for key, value in pairs
            }
    return found
