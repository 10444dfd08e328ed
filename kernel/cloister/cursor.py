"""A file that remembers how far the audit log was read, for the next time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError

from cloister.profile import read_bounded, write_private
from cloister_data.audit import AuditSearch
from cloister_data.base import Wire
from cloister_data.checkpoint import MAX_SIZE
from cloister_data.errors import ConfigurationError, ConflictError, StorageError


class Position(Wire):
    """Everything before entry `following` of the log `origin` that fits the filters was delivered."""

    format: Literal[1] = 1
    origin: str = Field(max_length=256)
    user: str | None
    dataset: str | None
    kinds: tuple[str, ...]
    following: int = Field(ge=0, le=MAX_SIZE)


class Cursor:
    """Where one search goes on. Made by `held` alone, which keeps others from the file meanwhile."""

    def __init__(self, path: Path, origin: str, wanted: AuditSearch) -> None:
        self._path = path
        kinds = tuple(sorted(set(wanted.kinds)))
        self._at = Position(origin=origin, user=wanted.user, dataset=wanted.dataset, kinds=kinds, following=0)
        known = self._read()
        if known is not None:
            self._refuse_other(known)
            self._at = known

    @classmethod
    @contextmanager
    def held(cls, path: Path, origin: str, wanted: AuditSearch) -> Iterator[Self]:
        """The cursor in `path` for this search of the log `origin`; from the start where there is no such file.

        Raises ConflictError while another process holds it, ConfigurationError for a file that isn't this search's,
        StorageError.
        """
        lock = path.with_name(f".{path.name}.lock")
        try:
            lock.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(
                f"{lock} can't be written.", why=f"{error.strerror}.", next_step="Check that folder's permissions."
            ) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConflictError(
                    f"Another search goes on from the cursor {path} at the moment.",
                    why="Two at once would deliver entries twice.",
                    next_step="Let it end, or give this search a cursor of its own.",
                ) from error
            yield cls(path, origin, wanted)
        finally:
            os.close(descriptor)

    @property
    def following(self) -> int:
        return self._at.following

    def advance(self, following: int) -> None:
        """Everything before `following` was delivered. On the disk when this returns. Raises StorageError."""
        if following != self._at.following:
            self._at = self._at.model_copy(update={"following": following})
            write_private(self._path, self._at.to_json() + b"\n")

    def _read(self) -> Position | None:
        try:
            return Position.from_json(read_bounded(self._path))
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise ConfigurationError(
                f"{self._path} isn't a cursor.",
                why=f"{error.errors(include_url=False, include_input=False)[0]['msg']}.",
                next_step="Name another file; a new one begins at the log's first entry.",
            ) from error

    def _refuse_other(self, known: Position) -> None:
        if known.origin != self._at.origin:
            why = f"It belongs to the log {known.origin!r}, and this one is {self._at.origin!r}."
        elif known.model_copy(update={"following": 0}) != self._at:
            why = "It belongs to a search with another --user, --dataset or --kind: entries would be left out."
        else:
            return
        raise ConfigurationError(
            f"The cursor {self._path} is another search's.",
            why=why,
            next_step="Give each search a cursor file of its own.",
        )
