"""On the laptop: wheels for a kernel that has no network. pip finds and downloads them; no package's code runs here."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from cloister_data.errors import InvalidRequestError, TooLargeError, UnavailableError
from cloister_data.transfers import TransferTerms

POLL_SECONDS = 0.1
END_SECONDS = 5.0
TOLD_LINES, MAX_TOLD = 8, 4000


class Interrupted(Exception):
    """The user has cancelled it."""


def platforms(terms: TransferTerms) -> list[str]:
    """The platform tags of wheels that the kernel's machine takes, the best first (PEP 600, PEP 599)."""
    tags = []
    if terms.glibc:
        major, minor = (int(part) for part in terms.glibc.split("."))
        if major == 2:
            tags += [f"manylinux_2_{each}_{terms.machine}" for each in range(minor, 4, -1)]
        tags += [f"{old}_{terms.machine}" for old in ("manylinux2014", "manylinux2010", "manylinux1")]
    return [*tags, f"linux_{terms.machine}"]


def download(
    packages: Sequence[str],
    wheels: Sequence[Path],
    terms: TransferTerms,
    into: Path,
    show: Callable[[str], None],
    cancelled: threading.Event,
) -> list[Path]:
    """The wheels of `packages` and of `wheels`, with all that they need, in `into`.

    pip takes them from where this computer's pip is configured to. It takes wheels only: building a package would run
    its code here. What a package needs on some systems only (`sys_platform`) it looks up for this computer, which may
    be another system than the kernel's: pip can't be told. Where it fails its own words are shown.

    Raises InvalidRequestError, TooLargeError, Interrupted.
    """
    options = [option for tag in platforms(terms) for option in ("--platform", tag)]
    command = [
        *(sys.executable, "-m", "pip", "download", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"),
        *("--quiet", "--dest", str(into), "--implementation", "cp", "--python-version", terms.python, *options),
        *("--", *packages, *(str(wheel) for wheel in wheels)),
    ]
    # An empty directory to start in: Python and pip look there for modules and files.
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, cwd=empty)
        except OSError as error:
            raise UnavailableError("pip can't be started on your laptop.", why=type(error).__name__) from error
        with process:
            _wait(process, cancelled)
        said.seek(0)
        told = said.read(1 << 20).decode(errors="replace")
    if process.returncode != 0:
        # Not in the error, which the kernel gets to see: they may name indexes and directories.
        show("\n".join(told.strip().splitlines()[-TOLD_LINES:])[:MAX_TOLD] + "\n")
        raise InvalidRequestError(
            "pip on your laptop found no wheels that the kernel can take.",
            why="Its own words are above.",
            next_step=f"The kernel has Python {terms.python} on {terms.machine}. Nothing was moved.",
        )
    found = sorted(path for path in into.iterdir() if path.name.endswith(".whl") and path.is_file())
    size = sum(path.stat().st_size for path in found)
    if size > terms.max_bytes:
        raise TooLargeError(f"The wheels have {size} bytes.", why=f"The limit is {terms.max_bytes} bytes.")
    return found


def _wait(process: subprocess.Popen[bytes], cancelled: threading.Event) -> None:
    while True:
        try:
            process.wait(POLL_SECONDS)
            return
        except subprocess.TimeoutExpired:
            if cancelled.is_set():
                process.terminate()
                try:
                    process.wait(END_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                raise Interrupted from None
