"""python -m tests.fuzz [--seconds N | --runs N] [--target NAME]...: coverage-guided fuzzing with atheris.

Each target runs in a child of its own, under bounds on memory and on the time of one input, in a directory of its own
that is removed afterwards. A finding ends with its input in base64 and the traceback, and with exit status 1; status 2
says that atheris isn't installed or a target doesn't exist.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

MEMORY_BYTES = 3 << 30
RSS_MEGABYTES = 1024
INPUT_SECONDS = 5
SPARE_SECONDS = 60
SEED = 20_250_601
KEPT = 8192
"""Bytes of a finding that are printed."""


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the verifier's parsers.")
    arguments.add_argument("--seconds", type=float, default=60, help="for all targets together (60)")
    arguments.add_argument(
        "--runs", type=int, help="inputs for each target, instead of a time: the same ones each time"
    )
    arguments.add_argument("--target", action="append", metavar="NAME", help="one target; may be given again")
    given = arguments.parse_args()
    try:
        import atheris
    except ModuleNotFoundError:
        print("atheris isn't installed: it has wheels for CPython 3.11 to 3.13 on x86-64 Linux.", file=sys.stderr)
        return 2
    # It says of every module that it is instrumented.
    with (
        contextlib.redirect_stderr(io.StringIO()),
        atheris.instrument_imports(include=["cloister_attest", "tests.fuzz.control"]),
    ):
        from tests.fuzz import targets
    known = targets.TARGETS | {"control": targets.CONTROL}
    wanted = given.target or list(targets.TARGETS)
    if unknown := [name for name in wanted if name not in known]:
        print(f"No such target: {', '.join(unknown)}. There are {', '.join(known)}.", file=sys.stderr)
        return 2
    share = max(1, round(given.seconds / len(wanted)))
    found = [name for name in wanted if not fuzzed(atheris, name, known[name], given.runs, share)]
    print(f"fuzz: {len(wanted)} targets, {len(found)} with findings{': ' if found else ''}{', '.join(found)}")
    return 1 if found else 0


def fuzzed(atheris: Any, name: str, target: Any, runs: int | None, seconds: int) -> bool:
    """Whether the target did well. Prints a line, and what was found."""
    with tempfile.TemporaryDirectory(prefix="cloister-fuzz-") as folder:
        home = Path(folder)
        (home / "corpus").mkdir()
        for index, seed in enumerate(target.seeds()):
            (home / "corpus" / f"seed-{index}").write_bytes(seed)
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            _child(atheris, home, target, runs, seconds)
        status = _wait(child, seconds + SPARE_SECONDS)
        log = (home / "log").read_text("utf-8", "replace") if (home / "log").exists() else ""
        inputs = sum(1 for _ in (home / "corpus").iterdir())
        well = status == 0
        print(f"{name:<20} {'ok' if well else 'FOUND'}  {time.monotonic() - began:5.1f} s  corpus {inputs}", flush=True)
        if not well:
            print(log[-4000:])
            for artifact in home.glob("finding-*"):
                print(f"input ({artifact.name}): {base64.b64encode(artifact.read_bytes()[:KEPT]).decode()}", flush=True)
        return well


def _child(atheris: Any, home: Path, target: Any, runs: int | None, seconds: int) -> None:
    """Never returns: atheris ends the process."""

    def run(data: bytes) -> None:
        try:
            target.run(data)
        except BaseException:
            (home / "finding-exception").write_bytes(data)
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(77)

    try:
        log = os.open(home / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(home)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        bound = [f"-runs={runs}"] if runs is not None else [f"-max_total_time={seconds}"]
        options = [
            *bound,
            f"-seed={SEED}",
            f"-timeout={INPUT_SECONDS}",
            f"-rss_limit_mb={RSS_MEGABYTES}",
            f"-max_len={target.longest}",
            # The seeds are whole inputs: mutations of them may have their length from the beginning.
            "-len_control=0",
            "-use_value_profile=1",
            f"-artifact_prefix={home}/finding-",
            "-print_final_stats=1",
        ]
        atheris.Setup(["tests.fuzz", *options, str(home / "corpus")], run)
        atheris.Fuzz()
    finally:
        os._exit(70)


def _wait(child: int, seconds: float) -> int:
    """The child's exit status; it is killed where it outlives the bound."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


if __name__ == "__main__":
    sys.exit(main())
