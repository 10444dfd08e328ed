"""Executing a notebook by a local kernel: its page, a failing cell, a kernel that ends, and an interrupt."""

import os
import signal
import threading
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from cloister_cli.demo_notebook import run_notebook
from cloister_cli.demo_report import Steps
from cloister_data.errors import CloisterError


def _run(tmp_path: Path, *cells: str, kernel: str = "python3") -> str:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    source, html = tmp_path / "in.ipynb", tmp_path / "out.html"
    nbformat.write(notebook, source)
    try:
        run_notebook(source, tmp_path / "out.ipynb", html, kernel, Steps(quiet=True))
    finally:
        page = html.read_text() if html.exists() else ""
    return page


def _kernels() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if "ipykernel" in " ".join(child.cmdline())]


def test_the_page_shows_widgets_as_text(tmp_path: Path) -> None:
    page = _run(tmp_path, "import ipywidgets\nipywidgets.IntProgress(value=7)", "print(6 * 7)")
    assert "42" in page
    assert "IntProgress(value=7)" in page
    assert "widget-view+json" not in page
    assert nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[1].outputs[0].text == "42\n"
    assert not _kernels()


def test_a_failing_cell_is_told_and_the_page_is_kept(tmp_path: Path) -> None:
    with pytest.raises(CloisterError, match="ZeroDivisionError"):
        _run(tmp_path, "print('before')", "1 / 0")
    assert "before" in (tmp_path / "out.html").read_text()
    assert not _kernels()


def test_a_kernel_that_ends_at_once_is_told(tmp_path: Path) -> None:
    with pytest.raises(CloisterError, match="notebook stopped"):
        _run(tmp_path, "import os\nos._exit(3)")


def test_an_interrupt_ends_the_kernel(tmp_path: Path) -> None:
    seen: list[int] = []

    def interrupt() -> None:
        deadline = time.monotonic() + 30
        while not (tmp_path / "running").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        seen.append(len(_kernels()))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, "open('running', 'w').close()\nimport time\ntime.sleep(60)")
    assert seen == [1]  # Positive control: there was a kernel.
    assert not _kernels()
