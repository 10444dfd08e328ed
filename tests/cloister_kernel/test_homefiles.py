"""What touches a kernel's home: as its uid, below it, ordinary files only; whatever a hostile kernel has put there."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister_kernel import homefiles

UID = 200_123
APART = os.geteuid() == 0
needs_root = pytest.mark.skipif(not APART, reason="NOT CHECKED: another uid can be taken from root only")


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cl-home-") as directory:
        os.chmod(directory, 0o711)
        path = Path(directory) / "home"
        path.mkdir(mode=0o700)
        if APART:
            os.chown(path, UID, UID)
        yield path


def run(operation: str, home: Path, path: str, size: int = 100, content: bytes = b"", most: int = 0) -> list[bytes]:
    """The lines that it says; what follows a get's first is one of them. `most` bounds the files that it writes."""
    head = {"home": str(home), "uid": UID if APART else None, "path": path, "size": size}

    def bound() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    done = subprocess.run(
        [sys.executable, "-I", "-S", homefiles.__file__, operation],
        input=json.dumps(head).encode() + b"\n" + content,
        capture_output=True,
        timeout=20,
        preexec_fn=bound if most else None,
    )
    return done.stdout.split(b"\n", 1)


def said(lines: list[bytes]) -> object:
    return json.loads(lines[0])


def put(home: Path, path: str, content: bytes) -> object:
    first, rest = run("put", home, path, len(content), content + b"!")
    told = json.loads(first)
    assert rest == (first + b"\n" if "size" in told else b"")
    return told


def lying(home: Path) -> list[str]:
    return sorted(str(path.relative_to(home)) for path in home.rglob("*"))


def test_a_file_goes_in_and_comes_out(home: Path) -> None:
    content = os.urandom(3 << 20)
    assert put(home, "data/x/a.bin", content) == {"size": len(content)}
    assert lying(home) == ["data", "data/x", "data/x/a.bin"]
    found = (home / "data/x/a.bin").stat()
    assert (found.st_uid, found.st_mode & 0o777) == (UID if APART else os.geteuid(), 0o600)
    lines = run("get", home, "data/x/a.bin", len(content))
    assert (said(lines), lines[1]) == ({"size": len(content)}, content)
    assert put(home, "data/x/a.bin", b"") == {"size": 0}
    assert (home / "data/x/a.bin").read_bytes() == b""


def test_what_ends_early_leaves_nothing(home: Path) -> None:
    for content in (b"", b"x" * 99, b"x" * 100, b"x" * 100 + b"?"):
        assert said(run("put", home, "new/a", 100, content)) == {"size": 100}
        assert lying(home) == []
    (home / "a").write_bytes(b"before")
    run("put", home, "a", 100, b"x" * 100)
    assert (home / "a").read_bytes() == b"before"


@pytest.mark.parametrize("path", ["..", "../x", "a/../../x", "/etc/passwd", "a//b", "", ".", "a/.", "a\0b"])
def test_paths_that_lead_out_are_refused_here_too(home: Path, path: str) -> None:
    for operation in ("put", "get"):
        assert said(run(operation, home, path, 1, b"x!")) == {"error": "bad-path"}
    assert lying(home) == []


def test_links_are_not_followed(home: Path) -> None:
    outside = home.parent / "outside"
    outside.mkdir(mode=0o777)
    os.chmod(outside, 0o777)
    (outside / "secret").write_text("secret")
    os.chmod(outside / "secret", 0o666)
    (home / "file").symlink_to(outside / "secret")
    (home / "new").symlink_to(outside / "new")
    (home / "directory").symlink_to(outside)
    for path in ("file", "new"):
        assert put(home, path, b"x") == {"error": "not-a-file"}
        assert said(run("get", home, path)) == {"error": "not-a-file"}
    assert put(home, "directory/secret", b"x") == {"error": "no-directory"}
    assert said(run("get", home, "directory/secret")) == {"error": "no-directory"}
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert (outside / "secret").read_text() == "secret"
    # The control: the same names without links.
    (home / "real").mkdir(mode=0o777)
    os.chmod(home / "real", 0o777)
    assert put(home, "real/secret", b"x") == {"size": 1}


def test_only_ordinary_files_are_touched(home: Path) -> None:
    os.mkfifo(home / "fifo")
    (home / "directory").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(home / "socket"))
        for name in ("fifo", "directory", "socket"):
            assert said(run("get", home, name)) == {"error": "not-a-file"}
            assert put(home, name, b"x") == {"error": "not-a-file"}
    if APART:
        os.mknod(home / "device", 0o666 | 0o020000, os.makedev(1, 5))  # /dev/zero
        os.chmod(home / "device", 0o666)
        assert said(run("get", home, "device")) == {"error": "not-a-file"}


def test_sizes_and_what_is_missing(home: Path) -> None:
    (home / "a").write_bytes(b"x" * 101)
    os.chmod(home / "a", 0o644)
    assert said(run("get", home, "a", 100)) == {"error": "too-large"}
    assert said(run("get", home, "a", 101)) == {"size": 101}
    assert said(run("get", home, "b")) == {"error": "not-found"}
    assert said(run("get", home, "b/c")) == {"error": "not-found"}
    assert said(run("get", home, "a/c")) == {"error": "no-directory"}


def test_a_full_disk_is_told_before_anything_is_sent(home: Path) -> None:
    assert said(run("put", home, "x/a", 1 << 20, b"", most=1 << 16)) == {"error": "disk-full"}
    assert lying(home) == []
    assert said(run("put", home, "a", 1 << 10, b"", most=1 << 16)) == {"size": 1 << 10}


@needs_root
def test_it_has_no_rights_but_the_kernels(home: Path) -> None:
    (home / "closed").write_text("root's")
    os.chmod(home / "closed", 0o600)
    assert said(run("get", home, "closed")) == {"error": "no-access"}
    (home / "roots").mkdir(mode=0o700)
    assert put(home, "roots/a", b"x") == {"error": "no-access"}
    os.chown(home / "closed", UID, UID)
    assert said(run("get", home, "closed")) == {"size": 6}  # the control


@needs_root
@pytest.mark.parametrize("uid", [0, 1000, 199_999, 265_536, -1])
def test_it_takes_no_other_uid(home: Path, uid: int) -> None:
    head = json.dumps({"home": str(home), "uid": uid, "path": "a", "size": 1}).encode() + b"\nx!"
    command = [sys.executable, "-I", "-S", homefiles.__file__, "put"]
    done = subprocess.run(command, input=head, capture_output=True, timeout=20)
    assert done.returncode != 0
    assert lying(home) == []
