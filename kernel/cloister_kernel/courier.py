"""On the laptop: carries out `%cloister put`, `get` and `pip install`, for one kernel.

What is read and written here is named by the user's own line. Of the other side only a file's bytes are taken, at most
so many, into a new file that gets its name when it is whole. An outcome reaches the kernel: it says nothing of the
laptop but what the line says.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cloister.errands import LIMIT, Get, Install, Outcome, Put, local_path, parse_line
from cloister_data.errors import (
    CloisterError,
    ConfigurationError,
    ConflictError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    StorageError,
    TooLargeError,
    UnreachableError,
)
from cloister_data.transfers import MAX_TRANSFER_BYTES
from cloister_kernel.remote import RemoteKernel
from cloister_kernel.wheels import Interrupted, download

CHUNK = 1 << 18
SHOW_SECONDS = 0.5
MAX_TOLD = 4000
WHEELS = ".cloister-wheels"
"""Where wheels lie in the kernel's home until they are installed."""

Show = Callable[[str], None]


class Courier:
    """`directory` is where local paths begin: the notebook's directory, None where it isn't known."""

    def __init__(self, remote: RemoteKernel, directory: Path | None) -> None:
        self._remote, self._directory = remote, directory

    def carry_out(self, line: str, show: Show, cancelled: threading.Event) -> Outcome:
        """What the line says, and what became of it: never an exception. Blocks."""
        kind = line.split()[1]
        wheels = f"{WHEELS}/{secrets.token_hex(8)}" if kind == "pip" else ""
        told, problem, interrupted = "", None, False
        names: tuple[str, ...] = ()
        try:
            match errand := parse_line(line):
                case Put():
                    told = self._put(self._local(errand.local), errand.local, errand.remote, show, cancelled)
                case Get():
                    told = self._get(errand, show, cancelled)
                case Install():
                    told, names = self._install(errand, wheels, show, cancelled)
        except Interrupted:
            interrupted = True
        except CloisterError as error:
            problem = error.to_problem()
        except Exception as error:
            failed = InternalError("Your laptop failed to move the file.", why=f"{type(error).__name__}.")
            problem = failed.to_problem()
        return Outcome.model_validate(
            {"kind": kind, "told": told[:MAX_TOLD], "problem": problem, "interrupted": interrupted, "wheels": wheels}
            | {"names": names}
        )

    def _local(self, text: str) -> Path:
        if self._directory is None:
            raise ConfigurationError(
                "It isn't known in which directory this notebook lies.", next_step="Restart the kernel."
            )
        return self._directory / local_path(text)

    def _put(self, path: Path, local: str, remote: str, show: Show, cancelled: threading.Event) -> str:
        """`local` is what the user calls the file at `path`."""
        with contextlib.ExitStack() as opened:
            try:
                # A FIFO mustn't wait for its writer.
                flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
                file = opened.enter_context(open(os.open(path, flags), "rb", buffering=0))
            except OSError as error:
                raise _not_read(local, error) from error
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise InvalidRequestError(f"{local} is no ordinary file.", next_step="Give a file's path.")
            size = found.st_size
            if size > min(MAX_TRANSFER_BYTES, self._remote.transfer_terms().max_bytes):
                raise TooLargeError(
                    f"{local} has {size} bytes.", why=f"A file may have {LIMIT}.", next_step="Split it."
                )
            digest = hashlib.sha256()

            def chunks() -> Iterator[bytes]:
                left, meter = size, _Meter(path.name, size, show)
                while left:
                    _look(cancelled)
                    chunk = file.read(min(left, CHUNK))
                    if not chunk:
                        raise InvalidRequestError(f"{local} became shorter meanwhile.", next_step="Try again.")
                    digest.update(chunk)
                    left -= len(chunk)
                    yield chunk
                    meter.show(size - left)

            arrived = self._remote.put_file(remote, chunks(), size)
        if (arrived.size, arrived.sha256) != (size, digest.hexdigest()):
            raise UnreachableError(f"{local} arrived as something else.", next_step="Put it again.")
        return f"{local} is in the kernel's home as {remote} ({amount(size)}, SHA-256 {arrived.sha256})."

    def _get(self, errand: Get, show: Show, cancelled: threading.Event) -> str:
        target = self._local(errand.local)
        _refuse_target(target, errand)
        with self._remote.get_file(errand.remote) as (size, chunks):
            try:
                descriptor, name = tempfile.mkstemp(prefix=".cloister-get-", dir=target.parent)
            except OSError as error:
                raise _not_written(errand.local, error) from error
            unfinished, digest, meter = Path(name), hashlib.sha256(), _Meter(target.name, size, show)
            try:
                with open(descriptor, "wb") as file:
                    for chunk in chunks:
                        _look(cancelled)
                        digest.update(chunk)
                        file.write(chunk)
                        meter.show(file.tell())
                _look(cancelled)
                _name(unfinished, target, errand.force)
            except OSError as error:
                raise _not_written(errand.local, error) from error
            finally:
                unfinished.unlink(missing_ok=True)
        return f"{errand.remote} is on your laptop as {errand.local} ({amount(size)}, SHA-256 {digest.hexdigest()})."

    def _install(
        self, errand: Install, wheels: str, show: Show, cancelled: threading.Event
    ) -> tuple[str, tuple[str, ...]]:
        """Also the names that pip is given in the kernel: packages, and files of `wheels`."""
        paths = [self._local(wheel) for wheel in errand.wheels]
        for wheel, path in zip(errand.wheels, paths, strict=True):
            if not path.is_file():
                raise NotFoundError(f"There is no file {wheel} on your laptop.", next_step="Check the path.")
        terms = self._remote.transfer_terms()
        show(f"pip looks for wheels for Python {terms.python} on {terms.machine}")
        with tempfile.TemporaryDirectory(prefix="cloister-wheels-") as directory:
            found = download(errand.packages, paths, terms, Path(directory), show, cancelled)
            for path in found:
                self._put(path, path.name, f"{wheels}/{path.name}", show, cancelled)
        names = (*errand.packages, *(f"{wheels}/{path.name}" for path in paths))
        return f"{len(found)} wheels are in the kernel's home.", names


class _Meter:
    """Shows how far a file is, now and then."""

    def __init__(self, name: str, size: int, show: Show) -> None:
        self._name, self._size, self._show = name, size, show
        self._next = time.monotonic() + SHOW_SECONDS

    def show(self, done: int) -> None:
        if time.monotonic() >= self._next or (done == self._size and done > CHUNK):
            self._next = time.monotonic() + SHOW_SECONDS
            self._show(f"{self._name}: {amount(done)} of {amount(self._size)}")


def amount(size: int) -> str:
    """A number of bytes for people."""
    if size < 1 << 10:
        return f"{size} bytes"
    return f"{size / (1 << 10):.1f} KiB" if size < 1 << 20 else f"{size / (1 << 20):.1f} MiB"


def _look(cancelled: threading.Event) -> None:
    if cancelled.is_set():
        raise Interrupted


def _refuse_target(target: Path, errand: Get) -> None:
    if target.is_dir() and not target.is_symlink():
        raise InvalidRequestError(
            f"{errand.local} is a directory.", next_step="Name the file in it, or end the path with a slash."
        )
    if not target.parent.is_dir():
        raise NotFoundError(f"There is no directory for {errand.local} on your laptop.", next_step="Make it first.")
    if os.path.lexists(target) and not errand.force:
        raise ConflictError(
            f"{errand.local} is there already.",
            why="Nothing is overwritten unasked.",
            next_step="Add --force to replace it.",
        )


def _name(unfinished: Path, target: Path, force: bool) -> None:
    """In one step; without `force` not over a file that has come meanwhile. Raises OSError."""
    if force:
        unfinished.replace(target)
        return
    try:
        os.link(unfinished, target)
    except FileExistsError:
        raise
    except OSError:  # no hard links there
        if os.path.lexists(target):
            raise
        unfinished.rename(target)


def _not_read(local: str, error: OSError) -> CloisterError:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return NotFoundError(f"There is no file {local} on your laptop.", next_step="Check the path.")
    return StorageError(f"{local} can't be read on your laptop.", why=f"{error.strerror}.")


def _not_written(local: str, error: OSError) -> StorageError:
    return StorageError(f"{local} can't be written on your laptop.", why=f"{error.strerror}. Nothing of it remains.")
