"""What a sandbox shows of the machine: a plan from the paths that a kernel needs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from cloister_data.errors import ConfigurationError
from cloister_kernel.sandbox.view import Bound, View, bubblewrap, import_path, interpreter, package_sources, plan_view


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A Python in a directory that is closed to others, a virtual environment that links to it, and a clone."""
    root = Path(os.path.realpath(tmp_path))
    for path in ("root/pyenv/3.11/bin", "root/pyenv/3.11/lib", "venv/bin", "clone/kernel/cloister", "clone/.git"):
        (root / path).mkdir(parents=True)
    (root / "root").chmod(0o700)
    (root / "root/pyenv/3.11/bin/python3").touch()
    (root / "venv/bin/python").symlink_to(root / "root/pyenv/3.11/bin/python3")
    (root / "current").symlink_to("root/pyenv/3.11")
    return root


def test_a_python_in_a_closed_directory_is_shown_under_its_own_path(machine: Path) -> None:
    python = machine / "root/pyenv/3.11"
    needed = [str(python), str(machine / "venv"), str(machine / "venv/bin/python"), str(python / "lib")]
    view = plan_view(needed, "/stage")
    assert [(piece.staged, piece.path) for piece in view.pieces] == [
        ("/stage/0", str(python)),
        ("/stage/1", str(machine / "venv")),
    ]
    assert view.links == ()  # they lie within what is shown


def test_of_a_clone_nothing_but_the_packages_is_shown(machine: Path) -> None:
    view = plan_view([str(machine / "clone/kernel/cloister")], "/stage")
    assert [piece.path for piece in view.pieces] == [str(machine / "clone/kernel/cloister")]
    assert not any(path.endswith((".git", "clone")) for path in view.readable)


def test_links_on_the_way_are_shown_too(machine: Path) -> None:
    view = plan_view([str(machine / "current/lib")], "/stage")
    assert [piece.path for piece in view.pieces] == [str(machine / "root/pyenv/3.11/lib")]
    assert [(link.path, link.target) for link in view.links] == [(str(machine / "current"), "root/pyenv/3.11")]


def test_what_usr_holds_is_shown_anyway() -> None:
    assert plan_view(["/usr/bin/env", "/bin"], "/stage") == View((), ())


def test_the_whole_machine_is_never_shown(tmp_path: Path) -> None:
    (tmp_path / "all").symlink_to("/")
    for path in ("/", str(tmp_path / "all")):
        with pytest.raises(ConfigurationError, match="whole machine"):
            plan_view([path], "/stage")


def test_this_python_and_its_packages_can_be_planned() -> None:
    view = plan_view([*interpreter(sys.executable), *package_sources()], "/stage")
    shown = [*view.readable, "/usr"]
    for needed in (os.__file__, os.path.realpath(sys.executable), *package_sources()):
        assert any(os.path.realpath(needed).startswith(top) for top in shown)
    for parent in filter(None, import_path().split(os.pathsep)):
        assert any(source.startswith(parent) for source in package_sources())


def test_the_command_makes_everything_that_kernels_share_read_only() -> None:
    view = plan_view([*interpreter(sys.executable), *package_sources()], "/stage")
    bound = (Bound("/g", "/run/guard"), Bound("/h", "/home/cloister", writable=True))
    command = bubblewrap(view, bwrap="/bwrap", status=9, data={"/etc/passwd": 8}, bound=bound, tmp_bytes=1 << 20)
    writable = [command[at + 1 : at + 3] for at, word in enumerate(command) if word == "--bind"]
    assert writable == [["/h", "/home/cloister"]]
    read_only = [command[at + 1] for at, word in enumerate(command) if word == "--ro-bind"]
    assert {"/usr", "/g", *(piece.staged for piece in view.pieces)} <= set(read_only)
    assert command[-5:] == ["--remount-ro", "/", "--chdir", "/", "--"]
    for flag in ("--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--disable-userns", "--clearenv"):
        assert flag in command
