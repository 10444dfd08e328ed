"""The handle is opaque because the data are elsewhere.

Random sentinel rows are uploaded; a notebook trains on them, asks a question and evaluates, through the real
provisioner. Then everything the kernel's process has (memory, open files, home) is searched for the rows, as float32,
float64 and text. The worker that trains is searched while it trains: it must hold them, or the search proves nothing.
"""

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
from nbclient import NotebookClient

from cloister_data.schema import BooleanColumn, RealColumn, Schema, TextColumn
from cloister_kernel.kernelspec import install_kernelspec
from tests.fakes.memory import open_files, search_files, search_memory
from tests.fakes.running import RunningCloister, make_policy, running_cloister

ROWS = 400
SAMPLED = 8
COLUMNS = ("a", "b", "c", "d")
DATASET = "hospital/sentinels"

# Features are scaled by their declared bounds: with these they stay as they are.
SCHEMA = Schema(
    columns=(
        *(RealColumn(name=name, low=-1, high=1) for name in COLUMNS),
        BooleanColumn(name="ill"),
        TextColumn(name="note", max_bytes=64),
    )
)

TRAIN = """
import cloister, torch, os
ds = cloister.dataset("hospital/sentinels")
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
job = ds.train(model, features=["a", "b", "c", "d"], target="ill", loss="cross_entropy", optimizer="adam", lr=1e-2,
               epochs=EPOCHS, batch_size=100, max_grad_norm=1.0, epsilon=4.0)
"""


def sentinels() -> pd.DataFrame:
    draw = np.random.default_rng(secrets.randbits(64))
    values = {name: draw.uniform(-1, 1, ROWS) for name in COLUMNS}
    return pd.DataFrame(
        {
            **values,
            "ill": values["a"] + values["b"] > 0,
            "note": [f"sentinel-{secrets.token_hex(12)}" for _ in range(ROWS)],
        }
    )


def patterns(rows: pd.DataFrame) -> dict[str, list[bytes]]:
    """What rows look like in memory. Pairs of float32 neighbours, by row and by column, so that chance can't match."""
    matrix = rows[list(COLUMNS)].to_numpy()
    single = matrix.astype(np.float32)
    some = range(0, ROWS - 1, ROWS // SAMPLED)
    return {
        "float32 by row": [single[row, :2].tobytes() for row in some],
        "float32 by column": [single[row : row + 2, 0].tobytes() for row in some],
        "float64": [matrix[row, 1].tobytes() for row in some],
        "text": [rows.note[row].encode() for row in some],
        "number as text": [repr(float(matrix[row, 2])).encode() for row in some],
    }


@pytest.fixture(scope="module")
def scene() -> Iterator[tuple[RunningCloister, pd.DataFrame]]:
    rows = sentinels()
    with running_cloister() as found:
        found.add_user("ann", "scientist")
        found.upload(DATASET, rows, SCHEMA, make_policy(DATASET, {"ann": 40.0}))
        found.session("ann")
        yield found, rows


@pytest.fixture
def notebook(scene: tuple[RunningCloister, pd.DataFrame], monkeypatch: pytest.MonkeyPatch) -> NotebookClient:
    found, _ = scene
    monkeypatch.setenv("JUPYTER_PATH", str(found.base / "jupyter"))
    install_kernelspec("ann", "Cloister: ann", found.base / "jupyter")
    return NotebookClient(nbformat.v4.new_notebook(), kernel_name="cloister-ann", timeout=120)


def run(client: NotebookClient, code: str) -> str:
    """Execute one cell; its text output."""
    cell = nbformat.v4.new_code_cell(code)
    client.nb.cells.append(cell)
    client.execute_cell(cell, len(client.nb.cells) - 1)
    return "".join(output.get("text", "") for output in cell.outputs)


def kernel_process(notebook: NotebookClient) -> psutil.Process:
    """The kernel's process as this machine numbers it: in its own namespace it has another pid."""
    name = secrets.token_hex(6)
    run(notebook, f"import ctypes, os\nctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)  # PR_SET_NAME")
    (found,) = [process for process in psutil.process_iter(["name"]) if process.info["name"] == name]
    return found


def test_the_kernel_never_holds_rows(scene: tuple[RunningCloister, pd.DataFrame], notebook: NotebookClient) -> None:
    found, rows = scene
    wanted = patterns(rows)
    everything = [pattern for group in wanted.values() for pattern in group]
    with notebook.setup_kernel():
        code = TRAIN.replace("EPOCHS", "5")
        code += 'trained = job.result()\nprint(ds["a"].mean(epsilon=0.5).value)\nds.mock(rows=50)\n'
        code += 'print(ds.evaluate(trained, target="ill", metric="accuracy", epsilon=1.0).value)\n'
        assert len(run(notebook, code).split()) >= 2
        kernel = kernel_process(notebook)
        pid = kernel.pid
        guard = psutil.Process(found.process.pid)
        assert kernel.pid not in {guard.pid, *(worker.pid for worker in workers(found))}
        if os.geteuid() == 0:
            assert kernel.uids().real not in (0, guard.uids().real)
        try:
            in_memory = search_memory(pid, everything)
        except PermissionError:
            pytest.skip("this user may not read the kernel's memory: run as root, or set kernel.yama.ptrace_scope=0")
        # The home is mounted for the kernel alone; root sees it through the kernel's own eyes.
        home = Path(f"/proc/{pid}/root" + run(notebook, "print(os.environ['HOME'])").strip())
        assert home.is_dir()
        assert in_memory == set()
        assert search_files([*open_files(pid), home], everything) == set()
        # The search does see what a kernel holds.
        planted = secrets.token_bytes(12)
        run(notebook, f"held = bytes.fromhex('{planted.hex()}')\nopen(os.path.expanduser('~/held'), 'wb').write(held)")
        assert search_memory(pid, [planted]) == {planted}
        assert search_files([home], [planted]) == {planted}


def test_the_worker_that_trains_holds_rows(
    scene: tuple[RunningCloister, pd.DataFrame], notebook: NotebookClient
) -> None:
    """The positive control: the same search finds the same rows where they must be."""
    if os.geteuid() != 0:
        pytest.skip("only root may read the memory of a worker, which forbids it to everybody else")
    found, rows = scene
    wanted = patterns(rows)
    with notebook.setup_kernel():
        run(notebook, TRAIN.replace("EPOCHS", "4000"))
        try:
            hits = {kind: set[bytes]() for kind in wanted}
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and not (hits["float32 by row"] and hits["float64"] and hits["text"]):
                (worker,) = workers(found)
                for kind, group in wanted.items():
                    hits[kind] |= search_memory(worker.pid, group)
            held = {kind for kind, found_ in hits.items() if found_}
            assert held >= {"float32 by row", "float64", "text"}
        finally:
            run(notebook, "job.cancel()")


def test_a_second_process_of_the_kernels_user_finds_no_way_in(
    scene: tuple[RunningCloister, pd.DataFrame], notebook: NotebookClient
) -> None:
    """What a hostile cell would try first: the guard's files, its memory, and its control socket."""
    if os.geteuid() != 0:
        pytest.skip("kernels have a user of their own only where the cloister is started by root")
    found, _ = scene
    code = f"""
import os, socket
def attempt(what):
    try:
        what()
        return "open"
    except OSError as error:
        return "closed"
def connect(path):
    socket.socket(socket.AF_UNIX).connect(path)
tries = [lambda: os.listdir({str(found.state)!r}), lambda: open({str(found.state / "cloister.db")!r}),
         lambda: open({str(found.state / "master.key")!r}), lambda: open("/proc/{found.process.pid}/mem", "rb"),
         lambda: open("/proc/{found.process.pid}/environ", "rb"), lambda: os.kill({found.process.pid}, 0),
         lambda: connect({str(found.runtime / "control.sock")!r}),
         lambda: connect({str(found.runtime / "kernels.sock")!r}),
         lambda: connect({str(found.runtime / "g" / "other" / "guard.sock")!r}), lambda: os.setuid(0)]
print(*[attempt(each) for each in tries])
print(attempt(lambda: connect(os.environ["CLOISTER_GUARD_SOCKET"])))
own = os.path.basename(os.path.dirname(os.environ["CLOISTER_GUARD_SOCKET"]))
for place in ("g", "k", "h", "s"):
    try:
        print(*[name[:12] == own[:12] for name in os.listdir(os.path.join({str(found.runtime)!r}, place))])
    except (PermissionError, FileNotFoundError):
        print(True)
"""
    # What another kernel would have: a socket of a directory that this kernel's uid may not enter.
    other = found.runtime / "g" / "other"
    other.mkdir(mode=0o700)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener, notebook.setup_kernel():
        listener.bind(str(other / "guard.sock"))
        listener.listen()
        first, own, *places = run(notebook, code).strip().splitlines()
    assert first.split() == ["closed"] * 10
    assert own == "open"
    assert places == ["True"] * 4  # of other kernels not even the names are seen


def workers(found: RunningCloister) -> list[psutil.Process]:
    children = psutil.Process(found.process.pid).children(recursive=True)
    return [child for child in children if "cloister_guard.worker" in child.cmdline()]


def test_no_thread_is_left() -> None:
    """But for the timers of the sessions that these fixtures still hold open; theirs is another test."""
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("cloister")]
    assert [name for name in left if name != "cloister-reattest"] == []
