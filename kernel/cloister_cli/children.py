"""Child processes that never outlive the command that started them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from cloister_data.errors import ConfigurationError, UnavailableError

READY_SECONDS = 90.0
STOP_SECONDS = 20.0


@dataclass(frozen=True)
class Served:
    """A running cloister."""

    url: str
    trust: Path
    process: subprocess.Popen[bytes]

    def check(self) -> None:
        """Raises UnavailableError where it has ended."""
        if self.process.poll() is not None:
            raise UnavailableError("The cloister has stopped by itself.", next_step="Its log says why.")


@contextlib.contextmanager
def stopped_at_end(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Ask the process to end, whatever happens here; kill its group where it doesn't."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextlib.contextmanager
def serving(config: Path, state_dir: Path, log: Path, *options: str) -> Iterator[Served]:
    """`cloister serve --config CONFIG OPTIONS` as a child, from when it is ready until the end of the block.

    Raises ConfigurationError with what the child said where it doesn't come up.
    """
    ready = state_dir / "ready.json"
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", "cloister_cli.main", "serve", "--config", os.fspath(config), *options]
    with log.open("wb") as output:
        # Its own session: Ctrl-C reaches this process alone, which then ends the child in order.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    with stopped_at_end(process):
        deadline = time.monotonic() + READY_SECONDS
        while not ready.exists():
            if process.poll() is not None:
                raise ConfigurationError(
                    "The cloister didn't start.", why=last_words(log), next_step=f"All of its log: {log}."
                )
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"The cloister isn't ready after {READY_SECONDS:.0f} seconds.",
                    why=last_words(log),
                    next_step=f"All of its log: {log}.",
                )
            time.sleep(0.05)
        found = json.loads(ready.read_text("utf-8"))
        try:
            yield Served(found["url"], Path(found["trust"]), process)
        finally:
            if process.poll() is not None:
                # A guard that ended by itself has left its kernel service to the next one, which won't come.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)


def last_words(log: Path) -> str:
    """The last lines that a child wrote for people (its structured log is JSON)."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
        lines = file.read().decode("utf-8", "replace").splitlines()
    words = [line.strip() for line in lines if line.strip() and not line.startswith("{")]
    return " ".join(words[-4:])


@contextlib.contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind this process as Ctrl-C does, so that the children are ended."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
