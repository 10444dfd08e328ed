"""What a process under the ruleset can reach, beside the same process without it."""

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cloister_kernel.sandbox import landlock
from cloister_kernel.sandbox.layers import LayerError

needs_landlock = pytest.mark.skipif(landlock.abi() < 6, reason="NOT CHECKED: this Linux has no Landlock of version 6")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NOT CHECKED: mounting needs root")

# `probe.py free|confined BASE PORT`: prints one JSON object, name -> "works" or an error's name.
PROBE = """
import contextlib, ctypes, errno, fcntl, json, os, signal, socket, subprocess, sys, termios
from cloister_kernel.process import no_new_privileges
from cloister_kernel.sandbox import landlock

how, base, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
found = {}

def attempt(name, call):
    try:
        call()
        found[name] = "works"
    except OSError as error:
        found[name] = errno.errorcode[error.errno]

def write(path):
    with open(path, "w") as file:
        file.write("x")

def read(path):
    with open(path, "rb") as file:
        file.read(1)

def connect(family, address):
    with socket.socket(family) as one:
        one.connect(address)

def bind_tcp():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))

def terminal():
    master, slave = os.openpty()
    again = os.open(os.ttyname(slave), os.O_RDWR | os.O_NOCTTY)
    fcntl.ioctl(again, termios.TIOCGWINSZ, bytes(8))
    termios.tcgetattr(again)

def shared():
    path = f"/dev/shm/cloister-landlock-{os.getpid()}"
    write(path)
    os.rename(path, path + "-2")
    os.unlink(path + "-2")

def node(path, mode):
    os.mknod(path, mode, os.makedev(1, 3))

if how == "confined":
    no_new_privileges()
    landlock.restrict(["/usr", "/lib", "/lib64", "/proc", base + "/code", base + "/one"], [base + "/home"])

attempt("read outside", lambda: read(base + "/secret/file"))
attempt("read etc", lambda: read("/etc/passwd"))
attempt("list outside", lambda: os.listdir(base + "/secret"))
attempt("read above", lambda: read(base + "/home/../secret/file"))
attempt("read by a link", lambda: read(base + "/home/link"))
attempt("write outside", lambda: write(base + "/secret/new"))
attempt("write readable", lambda: write(base + "/code/new"))
attempt("truncate readable", lambda: os.truncate(base + "/code/file", 0))
attempt("unlink readable", lambda: os.unlink(base + "/code/victim"))
attempt("hard link in", lambda: os.link(base + "/secret/file", base + "/home/hard"))
attempt("move out", lambda: os.rename(base + "/home/mine", base + "/secret/mine"))
attempt("run outside", lambda: subprocess.run([base + "/secret/true"], check=True))
attempt("character device", lambda: node(base + "/home/null", 0o020666))
attempt("block device", lambda: node(base + "/home/disk", 0o060666))
attempt("device in shm", lambda: node(f"/dev/shm/cloister-node-{os.getpid()}", 0o020666))
attempt("tcp bind", bind_tcp)
attempt("tcp connect", lambda: connect(socket.AF_INET, ("127.0.0.1", port)))
attempt("abstract socket", lambda: connect(socket.AF_UNIX, f"\\0cloister-landlock-{port}"))
attempt("signal", lambda: os.kill(os.getppid(), 0))

attempt("read code", lambda: read(base + "/code/file"))
attempt("read one file", lambda: read(base + "/one"))
attempt("list code", lambda: os.listdir(base + "/code"))
attempt("run code", lambda: subprocess.run([base + "/code/true"], check=True))
attempt("write home", lambda: write(base + "/home/new"))
attempt("directories", lambda: os.makedirs(base + "/home/a/b"))
attempt("move between directories", lambda: os.rename(base + "/home/new", base + "/home/a/b/new"))
attempt("truncate home", lambda: os.truncate(base + "/home/a/b/new", 0))
attempt("fifo", lambda: os.mkfifo(base + "/home/fifo"))
attempt("socket file", lambda: socket.socket(socket.AF_UNIX).bind(base + "/home/socket"))
attempt("symlink", lambda: os.symlink("a", base + "/home/sym"))
attempt("run home", lambda: subprocess.run([base + "/home/true"], check=True))
for device in ("null", "zero", "full", "random", "urandom"):
    attempt("read " + device, lambda: read("/dev/" + device))
attempt("write null", lambda: write("/dev/null"))
attempt("terminal", terminal)
attempt("shared memory", shared)
attempt("unix socket", lambda: connect(socket.AF_UNIX, base + "/guard/socket"))
attempt("own child", lambda: subprocess.Popen(["/usr/bin/true"]).terminate())
attempt("own abstract socket", lambda: socket.socket(socket.AF_UNIX).bind(f"\\0cloister-{os.getpid()}"))
with contextlib.suppress(FileNotFoundError):
    os.unlink(f"/dev/shm/cloister-node-{os.getpid()}")
print(json.dumps(found))
"""

REFUSED = {
    **dict.fromkeys(("read outside", "read etc", "list outside", "read above", "read by a link"), "EACCES"),
    **dict.fromkeys(("write outside", "write readable", "truncate readable", "unlink readable"), "EACCES"),
    **dict.fromkeys(("run outside", "move out", "tcp bind", "tcp connect"), "EACCES"),
    "hard link in": "EXDEV",
    **dict.fromkeys(("abstract socket", "signal"), "EPERM"),
}
ROOT_REFUSED = dict.fromkeys(("character device", "block device", "device in shm"), "EACCES")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    for name in ("secret", "code", "home", "guard"):
        (tmp_path / name).mkdir()
    for name in ("secret/file", "code/file", "code/victim", "home/mine", "one"):
        (tmp_path / name).write_text("text")
    for name in ("secret", "code", "home"):
        shutil.copy("/usr/bin/true", tmp_path / name / "true")
    (tmp_path / "home/link").symlink_to(tmp_path / "secret/file")
    return tmp_path


def probe(how: str, base: Path) -> dict[str, str]:
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as abstract, socket.socket(socket.AF_UNIX) as named:
        tcp.bind(("127.0.0.1", 0))
        port = tcp.getsockname()[1]
        abstract.bind(f"\0cloister-landlock-{port}")
        named.bind(str(base / "guard/socket"))
        for one in (tcp, abstract, named):
            one.listen()
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROBE, how, str(base), str(port)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@needs_landlock
def test_what_the_ruleset_leaves_and_what_it_takes(base: Path) -> None:
    confined = probe("confined", base)
    refused = REFUSED | (ROOT_REFUSED if os.geteuid() == 0 else {})
    assert {name: confined[name] for name in refused} == refused
    others = set(confined) - set(REFUSED) - set(ROOT_REFUSED)
    assert {name: confined[name] for name in others} == dict.fromkeys(others, "works")


def test_all_of_it_works_without_the_ruleset(base: Path) -> None:
    free = probe("free", base)
    wanted = {name for name in free if name not in ROOT_REFUSED or os.geteuid() == 0}
    assert {name: free[name] for name in wanted} == dict.fromkeys(wanted, "works")


def confined_child(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    head = "from cloister_kernel.process import no_new_privileges\nfrom cloister_kernel.sandbox import landlock\n"
    return subprocess.run(
        [sys.executable, "-c", head + script, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@needs_landlock
def test_a_thread_that_would_stay_free_stops_it() -> None:
    script = """
import threading
stop = threading.Event()
thread = threading.Thread(target=stop.wait)
thread.start()
no_new_privileges()
try:
    landlock.restrict(["/usr"], [])
finally:
    stop.set()
"""
    done = confined_child(script)
    assert done.returncode == 1
    assert "LayerError: The notebook kernel can't be confined: Landlock. There are other threads" in done.stderr


@needs_landlock
def test_a_path_that_is_not_there_stops_it() -> None:
    done = confined_child('no_new_privileges()\nlandlock.restrict(["/usr", "/nowhere-at-all"], [])')
    assert done.returncode == 1
    assert "No such file or directory (/nowhere-at-all)" in done.stderr


def test_an_old_linux_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, words in ((0, "doesn't offer it"), (1, "offers version 1"), (2, "offers version 2")):
        monkeypatch.setattr(landlock, "abi", lambda version=version: version)
        with pytest.raises(LayerError, match=words) as caught:
            landlock.restrict(["/usr"], [])
        assert caught.value.layer == "Landlock"
        assert "Linux 6.2" in caught.value.mend


@needs_landlock
def test_without_no_new_privileges_nothing_is_set() -> None:
    if ctypes.CDLL(None).prctl(39, 0, 0, 0, 0) == 1:
        pytest.skip("the tests' own process has it already")
    with pytest.raises(LayerError, match="no_new_privs"):
        landlock.restrict(["/usr"], [])


@needs_landlock
@pytest.mark.parametrize("version", [3, 4, 5, 6])
def test_older_versions_are_served_what_they_know(base: Path, version: int) -> None:
    """A version's ruleset is a prefix of the newest one's, so this Linux takes it as an old one would."""
    script = f"""
import os, sys
base = sys.argv[1]
landlock.abi = lambda: {version}
no_new_privileges()
landlock.restrict(["/usr", "/proc"], [base + "/home"])
os.truncate(base + "/home/mine", 0)
try:
    os.truncate(base + "/code/file", 0)
except PermissionError:
    print("refused")
"""
    done = confined_child(script, str(base))
    assert done.stdout == "refused\n", done.stderr


MOUNTED_LATER = """
import ctypes, os, sys
base, rule = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)

def mount(source, target, flags):
    assert libc.mount(source, target, b"tmpfs", ctypes.c_ulong(flags), None) == 0, ctypes.get_errno()

assert libc.unshare(0x20000) == 0
mount(b"none", b"/", 1 << 14 | 1 << 18)
ready, go = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    no_new_privileges()
    landlock.restrict(["/usr", "/proc"], [rule])
    os.write(ready[1], b"x")
    os.read(go[0], 1)
    try:
        open(base + "/home/kernel/file", "w").close()
    except PermissionError:
        os._exit(7)
    os._exit(0)
os.read(ready[0], 1)
mount(b"home", os.fsencode(base + "/home/kernel"), 0)
os.write(go[1], b"x")
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@needs_landlock
@needs_root
@pytest.mark.parametrize(("rule", "code"), [("home", "0"), ("home/kernel", "7")])
def test_a_rule_for_a_home_that_is_mounted_later_is_its_parents(base: Path, rule: str, code: str) -> None:
    (base / "home/kernel").mkdir()
    done = confined_child(MOUNTED_LATER, str(base), str(base / rule))
    assert done.stdout.strip() == code, done.stderr
