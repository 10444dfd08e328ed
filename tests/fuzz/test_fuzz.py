"""A short run of the fuzzer over every target, the same one each time; and a fault that it must find."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris has wheels for CPython on x86-64 Linux alone"
)


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@needs_atheris
def test_a_short_run_over_every_target_finds_nothing() -> None:
    from tests.fuzz.targets import TARGETS

    done = fuzz("--runs", "400")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^([a-z-]+) +ok ", done.stdout, re.M) == list(TARGETS)
    assert f"fuzz: {len(TARGETS)} targets, 0 with findings" in done.stdout


@needs_atheris
def test_a_fault_is_found() -> None:
    """The control reads past its input for one in 65536 of the inputs that begin as it demands."""
    done = fuzz("--runs", "2000000", "--target", "control")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "IndexError" in done.stdout
    assert "input (finding-exception): UlBSV" in done.stdout
    assert "1 targets, 1 with findings: control" in done.stdout


@needs_atheris
def test_wrong_usage_is_status_2() -> None:
    done = fuzz("--target", "nothing")
    assert done.returncode == 2
    assert "No such target: nothing" in done.stderr


def test_the_seeds_of_every_target_are_accepted() -> None:
    """What the fuzzer changes is valid to begin with, or it would only look at refusals."""
    from tests.fuzz.targets import TARGETS, appraise_simulated_input, appraise_snp_input, appraise_tdx_input

    for name, accepted in (
        ("appraise-snp", appraise_snp_input),
        ("appraise-tdx", appraise_tdx_input),
        ("appraise-simulated", appraise_simulated_input),
    ):
        seeds = TARGETS[name].seeds()
        assert seeds
        assert all(accepted(seed) for seed in seeds), name
    for name, target in TARGETS.items():
        assert target.seeds(), name
        assert all(len(seed) <= target.longest for seed in target.seeds()), name
