"""Executes a notebook through the cloister's kernel, with progress on the terminal, and saves it as HTML."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import copy
import threading
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cloister_cli.demo_report import Steps
from cloister_data.errors import CloisterError

CELL_SECONDS = 300
STOP_SECONDS = 10.0


def run_notebook(source: Path, executed: Path, html: Path, kernel: str, steps: Steps) -> None:
    """Run every cell of `source` by `kernel`; write the executed notebook and its HTML, also of a failed run.

    Raises CloisterError where a cell fails.
    """
    started = time.monotonic()
    notebook = nbformat.read(source, as_version=4)  # type: ignore[no-untyped-call]
    notebook.metadata["kernelspec"] = {"name": kernel, "display_name": "Cloister: demo", "language": "python"}
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    columns = (
        SpinnerColumn(),
        TextColumn("The quickstart runs in the remote kernel:"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=steps.console, transient=True) as progress:
        task = progress.add_task("starting the kernel", total=len(code))

        def begin(cell: Any, cell_index: int) -> None:
            progress.update(task, description=title(notebook, cell_index))

        def end(cell: Any, cell_index: int, execute_reply: Any) -> None:
            progress.advance(task)

        client = NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            shutdown_kernel="immediate",
            kernel_name=kernel,
            resources={"metadata": {"path": str(executed.parent)}},
            on_cell_start=lambda cell, cell_index: begin(cell, cell_index) if cell.cell_type == "code" else None,
            on_cell_executed=end,
        )
        try:
            _execute(client)
        except CellExecutionError as error:
            raise _failed(f"{error.ename}: {error.evalue}", html) from error
        except (RuntimeError, TimeoutError, DeadKernelError) as error:
            # jupyter_client says by a bare RuntimeError that a kernel didn't come up.
            raise _failed((str(error).strip() or type(error).__name__).splitlines()[0], html) from error
        finally:
            # nbclient would clean up once more at exit, and fail where the kernel is gone already.
            atexit.unregister(client._cleanup_kernel)
            _save(notebook, executed, html)
    steps.done(f"The quickstart ran in the remote kernel: {len(code)} cells", time.monotonic() - started)


def _execute(client: NotebookClient) -> None:
    """Run the notebook in a thread: in the main one nbclient would take the signals, and keep them.

    An interrupt here cancels the run, shuts the kernel down and goes on as KeyboardInterrupt.
    """
    loop = asyncio.new_event_loop()
    task = loop.create_task(client.async_execute())
    failures: list[BaseException] = []
    ended = threading.Event()

    def run() -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(task)
        except BaseException as error:  # raised again in the main thread
            failures.append(error)
        finally:
            left = asyncio.all_tasks(loop)
            for each in left:
                each.cancel()
            with contextlib.suppress(Exception):
                loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            loop.close()
            ended.set()

    threading.Thread(target=run, name="notebook", daemon=True).start()
    try:
        # Not Thread.join: interrupted, it takes the thread for ended (Python 3.11).
        while not ended.wait(0.2):
            pass
    except KeyboardInterrupt:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(task.cancel)
        ended.wait(STOP_SECONDS)
        raise
    if failures:
        raise failures[0]


def title(notebook: Any, index: int) -> str:
    """The heading over a cell."""
    for cell in reversed(notebook.cells[: index + 1]):
        if cell.cell_type == "markdown":
            for line in cell.source.splitlines():
                if line.startswith("#"):
                    return str(line.lstrip("# ").strip())
    return ""


def _save(notebook: Any, executed: Path, html: Path) -> None:
    from nbconvert import HTMLExporter

    nbformat.write(notebook, executed)  # type: ignore[no-untyped-call]
    exporter = HTMLExporter()  # type: ignore[no-untyped-call]
    body, _ = exporter.from_notebook_node(without_widgets(notebook))
    html.write_text(body, "utf-8")


def without_widgets(notebook: Any) -> Any:
    """A copy that shows the text in place of each widget: a saved page has no kernel, and must fetch no scripts."""
    page = copy.deepcopy(notebook)
    page.metadata.pop("widgets", None)
    for cell in page.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/plain" in data:
                data.pop("application/vnd.jupyter.widget-view+json", None)
    return page


def _failed(why: str, html: Path) -> CloisterError:
    return CloisterError(
        "The quickstart notebook stopped at an error.", why=why, next_step=f"The notebook as far as it ran: {html}."
    )
