"""deploy/ works as it is: the unit is valid, the sample configuration loads and names every key, their paths agree."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cloister_data.errors import ConfigurationError
from cloister_guard.config import Bootstrap, GuardConfig, load_config
from tests.fakes.documents import ROOT, table

DEPLOY = ROOT / "deploy"
SAMPLE = DEPLOY / "cloister.toml"
UNIT = DEPLOY / "cloister.service"
KERNELS = DEPLOY / "cloister-kernels.service"
UNITS = [UNIT, KERNELS, DEPLOY / "cloister-witness.service"]
HASH = "$argon2id$v=19$m=65536,t=3,p=4$c29tZXNhbHQ$YWJjZGVmZ2hpamtsbW5vcHFyc3R1dnd4eXo"


def uncommented(text: str) -> str:
    """The sample with every `# key = value` and `# [table]` in force, and a whole hash."""
    text = re.sub(r"^# (\[bootstrap\]|[a-z_]+ = )", r"\1", text, flags=re.M)
    return text.replace("$argon2id$v=19$m=65536,t=3,p=4$...", HASH)


def test_the_sample_loads() -> None:
    config = load_config(SAMPLE)
    assert config.platform == "simulated"
    assert config.bootstrap is None


def test_the_sample_names_every_key_and_its_default(tmp_path: Path) -> None:
    everything = tmp_path / "cloister.toml"
    # Some keys are for real hardware alone.
    real = uncommented(SAMPLE.read_text("utf-8")).replace('platform = "simulated"', 'platform = "sev-snp"')
    everything.write_text(real, "utf-8")
    full, plain = load_config(everything), load_config(SAMPLE)
    assert full.model_fields_set == set(GuardConfig.model_fields)
    assert full.bootstrap == Bootstrap(admin="admin", password_hash=HASH)
    for name in (
        "homes",
        "database_url",
        "max_queries",
        "max_jobs",
        "worker_memory_mb",
        "refusals_per_minute",
        "kernels_per_user",
        "kernels_total",
        "kernel_idle_seconds",
    ):
        assert getattr(full, name) == getattr(plain, name), f"the sample states another default for {name}"


def test_a_key_that_is_not_known_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "cloister.toml"
    wrong.write_text("colour = 'blue'\n" + SAMPLE.read_text("utf-8"), "utf-8")
    with pytest.raises(ConfigurationError, match="colour"):
        load_config(wrong)


def directives(unit: Path = UNIT) -> dict[str, str]:
    lines = (line for line in unit.read_text("utf-8").splitlines() if "=" in line and not line.startswith("#"))
    return dict(line.split("=", 1) for line in lines)


def test_the_unit_and_the_sample_agree() -> None:
    config, unit = load_config(SAMPLE), directives()
    assert config.state_dir == Path("/var/lib") / unit["StateDirectory"]
    assert unit["StateDirectoryMode"] == "0700"
    assert config.runtime_dir == Path("/run") / unit["RuntimeDirectory"]
    assert unit["RuntimeDirectoryMode"] == "0711"
    configuration = f"--config /etc/{unit['ConfigurationDirectory']}/cloister.toml"
    assert unit["ExecStart"].endswith(f" serve {configuration} --kernels-apart")
    runbook = (DEPLOY / "runbook.md").read_text("utf-8")
    assert unit["ExecStart"].split()[0].removesuffix("/bin/cloister") in runbook


def test_the_two_units_share_their_places_and_nothing_else() -> None:
    guard, kernels = directives(), directives(KERNELS)
    for shared in ("ConfigurationDirectory", "RuntimeDirectory", "RuntimeDirectoryMode", "RuntimeDirectoryPreserve"):
        assert guard[shared] == kernels[shared]
    assert guard["RuntimeDirectoryPreserve"] == "yes", "the stop of one would take the other's sockets away"
    assert kernels["ExecStart"] == guard["ExecStart"].replace("serve", "kernels").removesuffix(" --kernels-apart")
    assert KERNELS.name in guard["Wants"]
    assert KERNELS.name in guard["After"]
    text = UNIT.read_text("utf-8") + KERNELS.read_text("utf-8")
    assert not re.search("^(Requires|Requisite|BindsTo|PartOf|Upholds)=", text, re.M), "a restart of one ends the other"
    assert guard["CapabilityBoundingSet"] == "CAP_CHOWN"
    assert kernels["InaccessiblePaths"] == f"-/var/lib/{guard['StateDirectory']}"
    assert load_config(SAMPLE).homes == Path("/var/lib") / kernels["StateDirectory"]


def test_every_unit_is_in_the_runbook() -> None:
    rows = [row[0].strip("`") for row in table(DEPLOY / "runbook.md", "file")]
    assert {unit.name for unit in UNITS} == {name for name in rows if name.endswith(".service")}
    assert {path.name for path in DEPLOY.iterdir()} == {*rows, "runbook.md"}


def verify(unit: Path) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("NOT CHECKED: systemd-analyze isn't installed, so nothing has verified deploy/cloister.service")
    return subprocess.run([tool, "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_accepts_the_unit(tmp_path: Path, unit: Path) -> None:
    # The command isn't installed at its place here; everything else of the unit is as it is shipped.
    here = tmp_path / unit.name
    here.write_text(unit.read_text("utf-8").replace("/opt/cloister/bin/cloister", "/bin/true"), "utf-8")
    answer = verify(here)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")


def test_systemd_would_complain(tmp_path: Path) -> None:
    wrong = tmp_path / "cloister.service"
    text = UNIT.read_text("utf-8").replace("/opt/cloister/bin/cloister", "/bin/true")
    wrong.write_text(text.replace("RestartSec=2", "RestartSec=soon\nProtectEverything=yes"), "utf-8")
    answer = verify(wrong)
    assert "Failed to parse sec value" in answer.stderr
    assert "ProtectEverything" in answer.stderr
