"""The main job, end to end, as `make demo` runs it: the quickstart notebook through the real provisioner."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import psutil
import pytest


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """(the demo's folder, its summary)"""
    folder = tmp_path_factory.mktemp("demo") / "state"
    before = {process.pid for process in psutil.process_iter()}
    done = subprocess.run(
        [sys.executable, "-m", "cloister_cli.main", "demo", "--state", os.fspath(folder), "--json"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    left = [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.pid not in before and any(str(folder) in part for part in process.info["cmdline"] or ())
    ]
    assert left == []
    return folder, json.loads(done.stdout)


def test_the_summary_is_what_a_new_user_was_promised(demo: tuple[Path, dict[str, object]]) -> None:
    _, summary = demo
    assert summary["simulated"] is True
    assert "none failed" in str(summary["verdict"])
    assert isinstance(summary["accuracy"], float)
    assert summary["accuracy"] >= 0.85
    accounts = summary["accounts"]
    assert isinstance(accounts, list)
    assert {account["population"].split("/")[0] for account in accounts} == {"hospital-a", "hospital-b"}
    for account in accounts:
        # The training's epsilon is 2, so no hospital's guarantee is cheaper than that.
        assert 2 <= account["used"] < account["limit"]["epsilon"]
        assert account["reserved_share"] == 0


def outputs(folder: Path) -> list[tuple[str, str]]:
    """(source, everything it showed as text) of each executed cell."""
    notebook = nbformat.read(folder / "notebooks" / "quickstart.ipynb", as_version=4)
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            shown = [output.get("text", "") or str(output.get("data", {})) for output in cell.outputs]
            assert all(output.output_type != "error" for output in cell.outputs), cell.source
            found.append((cell.source, "\n".join(shown)))
    return found


def test_the_notebook_shows_every_step(demo: tuple[Path, dict[str, object]]) -> None:
    folder, summary = demo
    cells = outputs(folder)
    for source, shown in (
        ("cloister.attestation()", "SIMULATED HARDWARE"),
        ("cloister.datasets()", "hospital-b/breast-cancer"),
        ("hospital_a", "opaque"),
        (".mock(", "mean radius"),
        (".cost(epsilon", "nothing was spent"),
        (".mean(epsilon", "noised"),
        (".rehearse(", "nothing was charged"),
        (".wait()", "done"),
        (".evaluate(", "accuracy"),
        ("history()", "model"),
    ):
        matching = [text for code, text in cells if source in code]
        assert matching, source
        assert any(shown in text for text in matching), (source, matching)
    html = Path(str(summary["html"])).read_text("utf-8")
    assert "hospital-a/breast-cancer" in html
    assert "Traceback" not in html


def test_the_kernel_ran_elsewhere(demo: tuple[Path, dict[str, object]]) -> None:
    folder, _ = demo
    spec = json.loads((folder / "jupyter" / "kernels" / "cloister-demo" / "kernel.json").read_text())
    assert spec["metadata"]["kernel_provisioner"]["provisioner_name"] == "cloister-provisioner"
    log = (folder / "serve.log").read_text()
    assert "kernel started" in log
    assert "sandbox=confined" in log


def test_no_password_and_no_key_is_readable_by_others(demo: tuple[Path, dict[str, object]]) -> None:
    folder, _ = demo
    secret = [folder / "passwords.json", folder / "cloister.toml", *folder.rglob("*.pem"), *folder.rglob("token.json")]
    secret += [folder / "state", folder / "state" / "master.key", folder / "state" / "cloister.db"]
    assert len(secret) > 6
    for path in secret:
        assert path.stat().st_mode & 0o077 == 0, path
