"""Files between a notebook and its kernel, over a real guard: `%cloister put`, `get`, `pip install`, and who can't."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager

from cloister_data.audit import AuditPage, AuditSearch
from cloister_kernel import courier
from cloister_kernel.kernelspec import install_kernelspec
from tests.fakes.data import PEOPLE, people
from tests.fakes.kernel_client import run
from tests.fakes.running import RunningCloister, make_policy


@dataclass
class Desk:
    """A user's notebook: its directory on the laptop, and its kernel."""

    cloister: RunningCloister
    user: str
    laptop: Path
    manager: KernelManager
    client: BlockingKernelClient

    def run(self, code: str) -> tuple[str, str]:
        return run(self.client, code, timeout=60, allow_stdin=False)

    def home(self) -> list[str]:
        """Every name in the kernel's home but those of IPython and pip."""
        status, text = self.run(
            "import os\n"
            "print([os.path.join(d, n) for d, ds, fs in os.walk('.') for n in ds + fs "
            "if not d.startswith(('./.ipython', './.local')) and n not in ('.ipython', '.local', '.cache')])"
        )
        assert status == "ok"
        return sorted(name.removeprefix("./") for name in ast.literal_eval(text))

    def moved(self) -> list[tuple[str, str, int, str]]:
        """(direction, path, size, digest) of each of the user's entries in the audit log."""
        search = AuditSearch(user=self.user, kinds=("transfer",))
        page = self.cloister.session("admin").transport.call("POST", "/audit/search", search, AuditPage)
        found = []
        for entry in page.entries:
            facts = json.loads(entry.payload)["facts"]
            found.append((facts["direction"], entry.names[facts["file"]], facts["size"], facts["content"]))
        return found


@contextlib.contextmanager
def desk(cloister_: RunningCloister, user: str, base: Path) -> Iterator[Desk]:
    cloister_.add_user(user, "scientist")
    cloister_.session(user)
    install_kernelspec(user, directory=base / "jupyter")
    specs = KernelSpecManager(kernel_dirs=[str(base / "jupyter" / "kernels")], ensure_native_kernel=False)
    manager = KernelManager(kernel_name=f"cloister-{user}", kernel_spec_manager=specs)
    (base / "work").mkdir()
    manager.start_kernel(cwd=str(base / "work"))
    found = Desk(cloister_, user, base / "work", manager, manager.client())
    try:
        found.client.start_channels()
        found.client.wait_for_ready(timeout=60)
        yield found
    finally:
        found.client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.context.destroy(linger=0)


@pytest.fixture(scope="module")
def ann(shared_cloister: RunningCloister, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    with desk(shared_cloister, "files-ann", tmp_path_factory.mktemp("ann")) as found:
        yield found


@pytest.fixture(autouse=True)
def clean(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "ann" in request.fixturenames:
        here: Desk = request.getfixturevalue("ann")
        here.run(
            "import os, shutil\n"
            "for n in os.listdir('.'):\n"
            "    shutil.rmtree(n) if os.path.isdir(n) and not os.path.islink(n) else os.remove(n)"
        )
        for path in here.laptop.iterdir():
            path.unlink()


def test_a_file_goes_there_and_back(ann: Desk) -> None:
    content = os.urandom(3_000_001)
    (ann.laptop / "a b.bin").write_bytes(content)
    before = ann.moved()
    status, text = ann.run("%cloister put 'a b.bin' data/x.bin")
    assert status == "ok", text
    assert "2.9 MiB of 2.9 MiB" in text  # progress
    assert "a b.bin is in the kernel's home as data/x.bin" in text
    assert ann.home() == ["data", "data/x.bin"]
    status, text = ann.run("%cloister get data/x.bin back.bin")
    assert status == "ok", text
    assert (ann.laptop / "back.bin").read_bytes() == content
    assert sorted(path.name for path in ann.laptop.iterdir()) == ["a b.bin", "back.bin"]
    _, digest = ann.run("import hashlib; print(hashlib.sha256(open('data/x.bin', 'rb').read()).hexdigest())")
    entry = ("data/x.bin", len(content), digest.strip())
    assert ann.moved() == [*before, ("put", *entry), ("get", *entry)]


def test_an_empty_file_and_a_file_over_another(ann: Desk) -> None:
    (ann.laptop / "a").write_bytes(b"")
    assert ann.run("%cloister put a")[0] == "ok"
    assert ann.run("os.path.getsize('a')")[1] == "0"
    (ann.laptop / "a").write_bytes(b"second")
    assert ann.run("%cloister put a")[0] == "ok"
    assert ann.run("open('a').read()")[1] == "'second'"


def test_the_cells_keep_their_order(ann: Desk) -> None:
    """All of them are sent at once, as JupyterLab does: a transfer waits for what is before and holds what is after."""
    (ann.laptop / "in").write_text("first")
    asked = [
        ann.client.execute(code)
        for code in (
            "import time; time.sleep(0.5); open('late', 'w').write('made before')",
            "%cloister get late",
            "%cloister put in",
            "open('in').read()",
        )
    ]
    replies = {}
    while len(replies) < len(asked):
        reply = ann.client.get_shell_msg(timeout=30)
        replies[reply["parent_header"]["msg_id"]] = reply["content"]["status"]
    assert [replies[each] for each in asked] == ["ok"] * 4
    assert (ann.laptop / "late").read_text() == "made before"


def test_nothing_is_moved_after_a_cell_that_failed(ann: Desk) -> None:
    (ann.laptop / "in").write_text("x")
    asked = [ann.client.execute("import time; time.sleep(0.3); 1 / 0"), ann.client.execute("%cloister put in")]
    replies = [ann.client.get_shell_msg(timeout=30) for _ in asked]
    assert [reply["content"]["status"] for reply in replies] == ["error", "error"]
    assert "cell before this one failed" in replies[1]["content"]["evalue"]
    time.sleep(0.2)  # a kernel drops what comes in the moment of an error
    assert ann.home() == []


@pytest.mark.parametrize(("operation", "way"), [("put", "signal"), ("get", "signal"), ("put", "message")])
def test_an_interrupt_ends_it_and_nothing_half_written_remains(
    ann: Desk, operation: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    going = threading.Event()

    def slowly(_self: object, _done: int) -> None:
        going.set()
        time.sleep(0.05)

    (ann.laptop / "big").write_bytes(bytes(32 << 20))
    ann.run("open('large', 'wb').write(bytes(32 << 20))")
    before = [each for each in ann.moved() if each[0] == "put"]
    monkeypatch.setattr(courier._Meter, "show", slowly)
    ann.client.execute("%cloister put big" if operation == "put" else "%cloister get large")
    assert going.wait(20)
    started = time.monotonic()
    if way == "signal":
        ann.manager.interrupt_kernel()
    else:
        ann.client.control_channel.send(ann.client.session.msg("interrupt_request"))
    reply = ann.client.get_shell_msg(timeout=20)
    assert time.monotonic() - started < 5
    assert reply["content"]["ename"] == "KeyboardInterrupt"
    ann.client.kernel_info(reply=True, timeout=20)
    deadline = time.monotonic() + 10
    while (found := ann.home()) != ["large"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found == ["large"]
    assert [path.name for path in ann.laptop.iterdir()] == ["big"]
    assert [each for each in ann.moved() if each[0] == "put"] == before  # what was never whole isn't in the log
    assert ann.run("1 + 1") == ("ok", "2")


def refused(ann: Desk, line: str, why: str) -> None:
    before = ann.moved()
    status, text = ann.run(line)
    assert status == "error", text
    assert why in text
    assert str(ann.laptop) not in text  # the kernel isn't told where the laptop keeps what
    assert ann.moved() == before


def test_what_the_laptop_refuses_is_an_error_of_the_cell(ann: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    (ann.laptop / "a").write_text("mine")
    (ann.laptop / ".key").write_text("secret")
    (ann.laptop.parent / "outside").write_text("secret")
    os.mkfifo(ann.laptop / "fifo")
    ann.run("open('a', 'w').write('theirs')")
    refused(ann, "%cloister put nope", "There is no file nope on your laptop")
    refused(ann, "%cloister put a/b", "There is no file a/b on your laptop")
    refused(ann, "%cloister put fifo", "no ordinary file")
    refused(ann, "%cloister put .", "can't be a path")
    refused(ann, "%cloister put ../outside", "isn't a path below the notebook's directory")
    refused(ann, f"%cloister put {ann.laptop.parent}/outside", "isn't a path below the notebook's directory")
    refused(ann, "%cloister put .key", "is hidden on your laptop")
    refused(ann, "%cloister put a ../b", "stays in it")
    refused(ann, "%cloister get a", "is there already")
    refused(ann, "%cloister get a x/", "There is no directory for x/a")
    refused(ann, "%cloister get a ../b", "isn't a path below")
    refused(ann, "%cloister get a .bashrc", "is hidden")
    refused(ann, "%cloister get b", "There is no 'b' in the kernel's home")
    refused(ann, "%cloister put", "Write: %cloister put LOCAL [REMOTE]")
    refused(ann, "%cloister pip install --index-url=x y", "Write: %cloister pip install NAME")
    assert ann.home() == ["a"]
    assert (ann.laptop / "a").read_text() == "mine"
    monkeypatch.setattr(courier, "MAX_TRANSFER_BYTES", 3)
    refused(ann, "%cloister put a b", "has 4 bytes")
    # The controls.
    monkeypatch.undo()
    assert ann.run("%cloister get a --force")[0] == "ok"
    assert (ann.laptop / "a").read_text() == "theirs"
    assert ann.run("%cloister put a b")[0] == "ok"


def test_what_a_hostile_home_holds_is_not_moved(ann: Desk) -> None:
    (ann.laptop / "a").write_text("x")
    ann.run(
        "os.mkfifo('fifo'); os.mkdir('dir'); os.symlink('/etc/passwd', 'link'); os.symlink('/tmp', 'out')\n"
        "os.symlink('/proc/self/environ', 'env'); os.symlink(os.getcwd() + '/dir', 'inside')"
    )
    for name in ("fifo", "dir", "link", "env"):
        refused(ann, f"%cloister get {name}", "no ordinary file")
        refused(ann, f"%cloister put a {name}", "no ordinary file")
    refused(ann, "%cloister put a out/x", "no directory")
    refused(ann, "%cloister put a inside/x", "no directory")
    refused(ann, "%cloister get out/x", "no directory")
    # Refused while the laptop still sends: it gets the reason nevertheless.
    (ann.laptop / "a").write_bytes(bytes(24 << 20))
    refused(ann, "%cloister put a dir", "no ordinary file")
    # A name with a line break is no line: the kernel's magic alone sees it, and moves nothing.
    refused(ann, "get_ipython().run_line_magic('cloister', 'put a \\nb')", "")
    assert [path.name for path in ann.laptop.iterdir()] == ["a"]


def test_a_kernel_never_meets_what_writes_into_its_home(ann: Desk) -> None:
    (ann.laptop / "a").write_bytes(bytes(64 << 20))
    status, _ = ann.run(
        "import os, signal, subprocess, sys, threading, time\n"
        "def kill():\n"
        "    end = time.monotonic() + 10\n"
        "    while time.monotonic() < end and not killed:\n"
        "        for pid in os.listdir('/proc'):\n"
        "            try:\n"
        "                if pid.isdigit() and int(pid) != os.getpid() and b'homefiles' in "
        "open(f'/proc/{pid}/cmdline', 'rb').read():\n"
        "                    os.kill(int(pid), signal.SIGKILL); killed.append(pid)\n"
        "            except OSError: pass\n"
        "killed = []; thread = threading.Thread(target=kill); thread.start()"
    )
    assert status == "ok"
    assert ann.run("%cloister put a")[0] == "ok"
    assert ann.run("len(killed)")[1] == "0"
    # The control: such a process of its own it finds.
    own = "subprocess.run([sys.executable, '-c', 'import time; time.sleep(20)', 'homefiles']).returncode"
    assert ann.run(f"code = {own}; thread.join(); code, len(killed)")[1] == "(-9, 1)"


def test_a_line_inside_other_code_is_the_kernels_alone(ann: Desk) -> None:
    (ann.laptop / "a").write_text("x")
    for code in (
        "%cloister put a\nprint(1)",
        "x = 1\n%cloister put a",
        "get_ipython().run_line_magic('cloister', 'put a')",
        "get_ipython().run_cell('%cloister put a').raise_error()",
        "%time %cloister put a",
        "y = %cloister put a",
    ):
        refused(ann, code, "have to be the only line of their cell")
    assert ann.home() == []
    assert ann.run("%cloister put a")[0] == "ok"  # the control: the same, alone


HOSTILE = """
kernel = get_ipython().kernel
content = {"code": LINE, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False,
           "stop_on_error": True}
outcome = {"kind": "put", "told": "done"}
sent = globals().get("sent", 0)
for kind in ("execute_request", "execute_reply", "execute_input", "input_request", "comm_msg"):
    for socket in (kernel.iopub_socket, kernel.shell_stream, kernel.stdin_socket, kernel.control_stream):
        if socket is None:
            continue
        for parent in (None, kernel.get_parent("shell")):
            for identity in (None, kernel._shell_parent_ident.get(), [b"shell"], [b"cloister"]):
                try:
                    kernel.session.send(socket, kind, content, parent=parent, ident=identity,
                                        metadata={"cloister_errand": outcome})
                    sent += 1
                except Exception as error:
                    pass
kernel.get_parent("shell")["metadata"]["cloister_errand"] = outcome
get_ipython().set_next_input(LINE, replace=False)
print(LINE)
get_ipython().run_line_magic("cloister", "put secret")
"""


def test_nothing_that_a_kernel_sends_makes_the_laptop_move_a_file(
    shared_cloister: RunningCloister, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with desk(shared_cloister, "files-eve", tmp_path_factory.mktemp("eve")) as eve:
        (eve.laptop / "secret").write_text("the laptop's")
        eve.run("open('planted', 'w').write('the kernel\\'s')")
        lines = ("%cloister put secret", "%cloister get planted")
        for line in lines:
            eve.client.execute(HOSTILE.replace("LINE", repr(line)))
        # Another client, which the forged messages don't confuse.
        eve.client.stop_channels()
        eve.client = eve.manager.client()
        eve.client.start_channels()
        eve.client.wait_for_ready(timeout=60)
        assert eve.run("sent >= 100")[1] == "True"
        time.sleep(0.5)
        assert eve.moved() == []
        assert eve.home() == ["planted"]
        assert [path.name for path in eve.laptop.iterdir()] == ["secret"]
        # The control: the same lines, from the front end.
        for line in lines:
            assert eve.run(line)[0] == "ok"
        assert [entry[:2] for entry in eve.moved()] == [("put", "secret"), ("get", "planted")]


def wheel(directory: Path, name: str, tag: str = "py3-none-any", requires: str = "") -> Path:
    path = directory / f"{name}-1.0-{tag}.whl"
    info = f"{name}-1.0.dist-info"
    needs = f"Requires-Dist: {requires}\n" if requires else ""
    files = {
        f"{name}.py": f"answer = {name!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the laptop's pip is configured to: no network, the wheels of this directory."""
    directory = tmp_path / "index"
    directory.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def test_packages_are_found_by_the_laptop_and_installed_without_a_network(ann: Desk, index: Path) -> None:
    wheel(ann.laptop, "clotinylocal")
    wheel(index, "clotinyneeds", requires="clotinydep>=1.0")
    wheel(index, "clotinydep", tag=f"cp{sys.version_info[0]}{sys.version_info[1]}-none-any")
    status, text = ann.run("%cloister pip install clotinyneeds clotinylocal-1.0-py3-none-any.whl")
    assert status == "ok", text
    assert "3 wheels are in the kernel's home" in text
    imported = "import clotinylocal, clotinyneeds, clotinydep; print(clotinylocal.answer, clotinyneeds.answer)"
    assert ann.run(imported) == ("ok", "clotinylocal clotinyneeds\n")
    assert [name for name in ann.home() if name != ".cloister-wheels"] == []
    assert {path.rsplit("/", 1)[1] for _, path, _, _ in ann.moved() if path.startswith(".cloister-wheels/")} >= {
        "clotinylocal-1.0-py3-none-any.whl"
    }


def test_no_package_s_code_runs_on_the_laptop(ann: Desk, index: Path) -> None:
    ran = index / "ran"
    with zipfile.ZipFile(index / "clotinysource-1.0.zip", "w") as archive:
        archive.writestr(
            "clotinysource-1.0/setup.py", f"open({str(ran)!r}, 'w')\nfrom setuptools import setup\nsetup()\n"
        )
    status, text = ann.run("%cloister pip install clotinysource")
    assert status == "error"
    assert "pip on your laptop found no wheels" in text
    assert "No matching distribution" in text  # pip's own words
    assert not ran.exists()
    wheel(index, "clotinyother", tag="cp27-none-any")
    assert ann.run("%cloister pip install clotinyother")[0] == "error"


def test_an_owner_s_policy_forbids_it(
    shared_cloister: RunningCloister, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name = "files-owner/records"
    with desk(shared_cloister, "files-bob", tmp_path_factory.mktemp("bob")) as bob:
        (bob.laptop / "a").write_text("x")
        assert bob.run("%cloister put a")[0] == "ok"  # the control: before any policy names the user
        shared_cloister.upload(name, people(50), PEOPLE, make_policy(name, {"files-bob": 1.0}, transfers="forbidden"))
        for line in ("%cloister put a", "%cloister get a b", "%cloister pip install a"):
            refused(bob, line, f"The policy of {name} forbids")
        assert [path.name for path in bob.laptop.iterdir()] == ["a"]
        assert bob.run("%cloister budget")[0] == "ok"


def test_the_magics(ann: Desk) -> None:
    status, text = ann.run("%cloister status")
    assert status == "ok"
    for told in ("proven (SIMULATED hardware)", "files-ann (scientist)", "sandbox", "reachable"):
        assert told in text
    assert (
        "NOT REACHABLE"
        in ann.run(
            "import cloister.connection as c; c.forget(); os.environ['X'] = "
            "os.environ.pop('CLOISTER_GUARD_SOCKET')\n%cloister status"
        )[1]
    )
    ann.run("os.environ['CLOISTER_GUARD_SOCKET'] = os.environ['X']")
    assert "No privacy accounts" in ann.run("%cloister budget")[1]
    status, text = ann.run("%cloister help")
    assert (status, "A file may have 2 GiB" in text, "%cloister put LOCAL [REMOTE]" in text) == ("ok", True, True)
    status, text = ann.run("%cloister frobnicate")
    assert (status, "status, budget, put, get, pip, help" in text) == ("error", True)
    assert ann.run("%cloister status now")[0] == "error"
    assert ann.run("cloister.datasets().__class__.__name__") == ("ok", "'Catalogue'")  # without an import

    def completed(code: str) -> set[str]:
        return set(ann.client.complete(code, reply=True, timeout=20)["content"]["matches"])

    assert completed("%cloister ") >= {"status", "budget", "put", "get", "pip", "help"}
    assert completed("%cloister st") == {"status"}
    assert "install" in completed("%cloister pip ")
    assert "datasets" in " ".join(completed("cloister.data"))
