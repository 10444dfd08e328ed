"""The lines of a notebook that the laptop carries out, and what it says about it to the kernel. Pure.

`%cloister put`, `get` and `pip install` move files between the laptop and the kernel. The laptop's side of the kernel
(`cloister_kernel.bridge`) does that, for a cell of the user's whose whole text is one such line; it then sends the cell
on with an `Outcome` beside it, which the kernel's own magic shows.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from cloister_data.base import Text, Wire
from cloister_data.errors import InvalidRequestError, Problem
from cloister_data.transfers import MAX_TRANSFER_BYTES, fault_of_path

METADATA = "cloister_errand"
"""Under this key of a cell's metadata the kernel finds the `Outcome`."""

MAX_LINE = 4096
MAX_PACKAGES = 50
LIMIT = f"{MAX_TRANSFER_BYTES >> 30} GiB"

USAGE = {
    "put": "%cloister put LOCAL [REMOTE]",
    "get": "%cloister get REMOTE [LOCAL] [--force]",
    "pip": "%cloister pip install NAME...",
}
_LINE = re.compile(r"%cloister +(put|get|pip)(?: +(.*))?")
_PACKAGE = re.compile(
    r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9])?"  # PEP 508's name, extras and versions; no address, no option
    r"(?:\[[A-Za-z0-9._,-]{1,100}\])?"
    r"(?:(?:===|==|~=|!=|<=|>=|<|>)[A-Za-z0-9.*+!_-]{1,64}(?:,(?:===|==|~=|!=|<=|>=|<|>)[A-Za-z0-9.*+!_-]{1,64})*)?"
)
_WHEEL = re.compile(r"[A-Za-z0-9_.+!-]{1,200}\.whl")


@dataclass(frozen=True)
class Put:
    local: str
    remote: str


@dataclass(frozen=True)
class Get:
    remote: str
    local: str
    force: bool


@dataclass(frozen=True)
class Install:
    """`packages` are names with versions, `wheels` paths of wheels on the laptop."""

    packages: tuple[str, ...]
    wheels: tuple[str, ...]


Errand = Put | Get | Install


class Outcome(Wire):
    """What became of an errand: `told` for people, or the `problem`; `wheels` is where pip finds them, in the home."""

    kind: Literal["put", "get", "pip"]
    told: Text = ""
    problem: Problem | None = None
    interrupted: bool = False
    wheels: Text = ""
    names: tuple[Text, ...] = Field(default=(), max_length=MAX_PACKAGES)


def errand_line(code: object) -> str | None:
    """The one line that a cell consists of, where that is an errand's; None for every other cell."""
    if not isinstance(code, str) or len(code) > MAX_LINE:
        return None
    line = code.strip(" \t\r\n")
    return line if line.isprintable() and _LINE.fullmatch(line) else None


def parse(kind: str, rest: str) -> Errand:
    """The errand of `%cloister KIND REST`. Raises InvalidRequestError, which says what is right."""
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise _usage(kind, f"{error}.") from error
    if kind == "pip":
        return _install(words)
    force = kind == "get" and "--force" in words
    places = [word for word in words if not (force and word == "--force")]
    if not 1 <= len(places) <= 2 or any(place.startswith("-") or not place for place in places):
        raise _usage(kind)
    if kind == "put":
        remote = places[-1] if len(places) == 2 else _last(places[0])
        return Put(places[0], _remote(remote + _last(places[0]) if remote.endswith("/") else remote))
    local = places[-1] if len(places) == 2 else _last(places[0])
    return Get(_remote(places[0]), local + _last(places[0]) if local.endswith("/") else local, force)


def parse_line(line: str) -> Errand:
    """As `parse`, of what `errand_line` gave."""
    found = _LINE.fullmatch(line)
    if found is None:
        raise InvalidRequestError("This is no line that the laptop carries out.", next_step="%cloister help")
    return parse(found[1], found[2] or "")


def local_path(text: str) -> str:
    """A path that the user's line may name on the laptop: below the notebook's directory, and nothing hidden.

    The kernel can put a line into a notebook's next cell: a hasty Enter must not hand over a key, nor plant a start-up
    file. Raises InvalidRequestError.
    """
    names = text.split("/")
    names = names[1:] if names[0] == "." else names
    if "\\" in text or not names or any(name in ("", "..") or ":" in name for name in names):
        raise InvalidRequestError(
            f"{text[:200]!r} isn't a path below the notebook's directory.",
            why="Only files there are moved: no absolute path, no '..'.",
            next_step="Copy the file there first, or name one that is there.",
        )
    if any(name.startswith((".", "~")) for name in names):
        raise InvalidRequestError(
            f"{text[:200]!r} is hidden on your laptop.",
            why="Hidden files hold keys and settings: they aren't moved.",
            next_step="Give it another name first.",
        )
    return "/".join(names)


def _install(words: list[str]) -> Install:
    if len(words) < 2 or words[0] != "install":
        raise _usage("pip")
    packages, wheels = [], []
    for word in words[1:]:
        if word.endswith(".whl") and _WHEEL.fullmatch(_last(word)):
            wheels.append(word)
        elif _PACKAGE.fullmatch(word):
            packages.append(word)
        else:
            raise _usage("pip", f"{word[:100]!r} is neither a package's name nor a wheel's path.")
    if len(words) - 1 > MAX_PACKAGES:
        raise _usage("pip", f"At most {MAX_PACKAGES} at once.")
    return Install(tuple(packages), tuple(wheels))


def _last(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _remote(path: str) -> str:
    path = path.removeprefix("~/").removeprefix("./")
    if fault := fault_of_path(path):
        raise InvalidRequestError(f"{path[:200]!r} can't be a path in the kernel's home.", why=fault)
    return path


def _usage(kind: str, why: str = "") -> InvalidRequestError:
    return InvalidRequestError(f"Write: {USAGE[kind]}", why=why, next_step="Nothing was moved. See %cloister help")
