"""`cloister attest measure`: what it prints, and how it fails. `snp/test_launch` judges what it computes."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from cloister_attest.snp.launch import VCPU_TYPES
from tests.cloister_attest.snp.test_launch import firmware
from tests.cloister_cli.conftest import Run


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "ovmf.fd"
    path.write_bytes(firmware())
    return str(path)


def test_people_get_a_line_for_their_trust_file(run: Run, image: str) -> None:
    arguments = ("attest", "measure", "--ovmf", image, "--vcpus", "2", "--vcpu-type", "EPYC-Genoa")
    done = run(*arguments, "--guest-features", "0x21")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    measurement = lines[0].removeprefix("Measurement: ")
    assert len(bytes.fromhex(measurement)) == 48
    assert tomllib.loads(lines[-1]) == {"measurements": [measurement]}
    found = json.loads(run(*arguments, "--guest-features", "33", "--json").stdout)
    assert found["measurement"] == measurement
    assert (found["mode"], found["vmm_type"], found["guest_features"], found["vcpus"]) == ("snp", "QEMU", 0x21, 2)


def test_refusals_say_what_to_do_next(run: Run, image: str, tmp_path: Path) -> None:
    for wrong in (("--vcpu-type", "Pentium"), ("--ovmf", str(tmp_path)), ("--append", "quiet"), ("--vcpus", "0")):
        given = ("--ovmf", image, "--vcpus", "1", "--vcpu-type", "EPYC")
        done = run("attest", "measure", *given, *wrong)
        assert (done.returncode, done.stdout) == (1, ""), wrong
        assert done.stderr
    for usage in (("--guest-features", "many"), ("--mode", "sev"), ("--vmm-type", "xen"), ("--vcpus", "two")):
        assert run("attest", "measure", "--ovmf", image, "--vcpus", "1", "--vcpu-type", "EPYC", *usage).returncode == 2


def test_the_help_lists_the_types(run: Run) -> None:
    done = run("attest", "measure", "--help")
    assert all(name in done.stdout for name in VCPU_TYPES)
