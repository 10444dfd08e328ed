"""A person's walk through a real JupyterLab in a real browser, with a cloister's kernel."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from cloister_data.schema import RealColumn, Schema
from cloister_kernel.kernelspec import install_kernelspec
from tests.fakes.running import RunningCloister, make_policy, running_cloister

playwright_api = pytest.importorskip("playwright.sync_api", reason="NOT CHECKED: the browser needs playwright")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="NOT CHECKED: a browser. Install it: apt-get install chromium"),
]

DATASET = "hospital/ages"
SCHEMA = Schema(columns=(RealColumn(name="age", low=0, high=100),))


@pytest.fixture(scope="module")
def cloister_running() -> Iterator[RunningCloister]:
    with running_cloister() as found:
        found.add_user("ann", "scientist")
        rows = pd.DataFrame({"age": [float(20 + at % 60) for at in range(200)]})
        found.upload(DATASET, rows, SCHEMA, make_policy(DATASET, {"ann": 10.0}))
        found.session("ann")
        install_kernelspec("ann", "Cloister: ann", found.base / "jupyter")
        yield found


@pytest.fixture(scope="module")
def lab(cloister_running: RunningCloister) -> Iterator[str]:
    """The address of a JupyterLab that is like a new user's: its own folders, one empty notebook, a token."""
    base = cloister_running.base
    folder = base / "notebooks"
    folder.mkdir()
    nbformat.write(nbformat.v4.new_notebook(), folder / "walk.ipynb")  # type: ignore[no-untyped-call]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ServerApp.ip=127.0.0.1"]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}"]
    command += ["--ServerApp.allow_root=True"]
    environment = os.environ | {
        "JUPYTER_TOKEN": token,
        "JUPYTER_PATH": str(base / "jupyter"),
        **{f"JUPYTER_{kind}_DIR": str(base / f"jupyter-{kind.lower()}") for kind in ("CONFIG", "DATA", "RUNTIME")},
    }
    with (base / "lab.log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5):
                    break
            except OSError:
                assert server.poll() is None, (base / "lab.log").read_text()[-4000:]
                assert time.monotonic() < deadline, (base / "lab.log").read_text()[-4000:]
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/lab/workspaces/walk/tree/walk.ipynb?reset&token={token}"
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(20)
        finally:
            server.kill()


class Walk:
    """One notebook on a page, by what a person sees and presses."""

    def __init__(self, page: playwright_api.Page) -> None:
        self.page = page
        self.cells = 0

    def write(self, code: str) -> playwright_api.Locator:
        """Type a cell's code; returns the cell."""
        cell = self.page.locator(".jp-NotebookPanel .jp-CodeCell").nth(self.cells)
        cell.locator(".cm-content").click()
        self.page.keyboard.insert_text(code)
        return cell

    def run(self, code: str) -> playwright_api.Locator:
        """Execute the next cell (Shift+Enter); returns its outputs."""
        cell = self.write(code)
        self.page.keyboard.press("Shift+Enter")
        self.cells += 1
        return cell.locator(".jp-OutputArea-output")

    def complete(self, entry: str) -> None:
        """Press Tab until `entry` is offered, and take it. JupyterLab waits a second for an answer and then shows
        nothing: on a busy machine the kernel's first completion, which loads jedi, takes longer.
        """
        item = self.page.locator(".jp-Completer-item", has_text=entry).first
        for _ in range(20):
            self.page.keyboard.press("Tab")
            try:
                item.click(timeout=3_000)
            except playwright_api.TimeoutError:
                continue
            return
        raise AssertionError(f"{entry} was never offered")

    def kernel_menu(self, entry: str) -> None:
        self.page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Kernel$")).click()
        self.page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{entry}$")).first.click()


@pytest.fixture
def walk(lab: str) -> Iterator[Walk]:
    with playwright_api.sync_playwright() as driver:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(20_000)
        page.goto(lab)
        yield Walk(page)
        browser.close()


def test_a_notebook_in_the_browser(walk: Walk) -> None:
    page, expect = walk.page, playwright_api.expect
    expect.set_options(timeout=20_000)
    # The notebook names no kernel, so JupyterLab asks.
    dialog = page.locator(".jp-Dialog")
    dialog.locator("select").select_option(label="Cloister: ann")
    dialog.get_by_role("button", name="Select Kernel").click()
    expect(page.locator(".jp-KernelName").first).to_have_text("Cloister: ann")
    state = page.locator(".jp-Notebook-ExecutionIndicator").first
    expect(state).to_have_attribute("data-status", "idle")

    expect(walk.run("import cloister\ncloister.datasets()")).to_contain_text([DATASET])
    expect(walk.run(f"ds = cloister.dataset({DATASET!r})\nds")).to_contain_text(["opaque"])

    # An interrupt ends the cell and keeps what was computed.
    walk.run("kept = 6 * 7\nimport time\nprint('asleep', flush=True)\ntime.sleep(60)")
    sleeping = page.locator(".jp-CodeCell").nth(walk.cells - 1).locator(".jp-OutputArea-output")
    expect(sleeping.first).to_contain_text("asleep")
    walk.kernel_menu("Interrupt Kernel")
    expect(sleeping.last).to_contain_text("KeyboardInterrupt")
    expect(walk.run("print('kept', kept)")).to_contain_text(["kept 42"])

    # Completion, by the kernel's own names.
    walk.write("ds.bud")
    walk.complete("budget")
    cell = page.locator(".jp-CodeCell").nth(walk.cells)
    expect(cell.locator(".cm-content")).to_contain_text("ds.budget")
    page.keyboard.press("Shift+Enter")
    walk.cells += 1
    expect(cell.locator(".jp-OutputArea-output").first).to_contain_text("all users")

    plot = walk.run(
        "import matplotlib.pyplot as plt\nfigure = plt.figure(figsize=(2, 2))\nplt.plot([1, 3, 2])\nplt.show()"
    )
    expect(plot.locator("img")).to_have_attribute("src", re.compile("^data:image/png;base64,"))

    expect(walk.run("1 / 0")).to_contain_text(["ZeroDivisionError"])

    walk.kernel_menu("Restart Kernel.")
    page.get_by_role("button", name="Confirm Kernel Restart").click()
    expect(state).not_to_have_attribute("data-status", "idle")
    expect(state).to_have_attribute("data-status", "idle")
    expect(walk.run("print('kept' in globals())")).to_have_text(["False"])
    if shots := os.environ.get("CLOISTER_SCREENSHOTS"):
        page.screenshot(path=Path(shots) / "lab.png")
