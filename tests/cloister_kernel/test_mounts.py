"""The plan of a kernel's own view of the file system, and the view itself where root may make one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister_data.errors import ConfigurationError
from cloister_kernel.mounts import Bind, follow, plan_mounts

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NOT CHECKED: mounting needs root")


@pytest.fixture
def tree() -> Iterator[Path]:
    """open/, closed/ (0700) with python/ and secret/ in it, a chain of links to python/."""
    # Not in tmp_path: pytest closes that to others, which is what is tested here.
    with tempfile.TemporaryDirectory(prefix="cl-mounts-") as directory:
        root = Path(directory).resolve()
        root.chmod(0o755)
        (root / "open").mkdir()
        (root / "closed" / "python").mkdir(parents=True)
        library = root / "closed" / "python" / "lib.py"
        library.write_text("x = 1")
        library.chmod(0o666)
        (root / "closed" / "secret").mkdir()
        (root / "closed" / "secret" / "key").write_text("secret")
        (root / "closed" / "latest").symlink_to("python")
        (root / "open" / "python").symlink_to(root / "closed" / "latest")
        (root / "closed").chmod(0o700)
        yield root


def test_follow_records_every_link(tree: Path) -> None:
    trail = follow(str(tree / "open" / "python"))
    assert trail.real == str(tree / "closed" / "python")
    assert [(link.path, link.target) for link in trail.links] == [
        (str(tree / "open" / "python"), str(tree / "closed" / "latest")),
        (str(tree / "closed" / "latest"), "python"),
    ]


def test_follow_refuses_what_is_not_there_and_circles(tree: Path) -> None:
    with pytest.raises(ConfigurationError, match="can't be found"):
        follow(str(tree / "absent" / "x"))
    (tree / "a").symlink_to("b")
    (tree / "b").symlink_to("a")
    with pytest.raises(ConfigurationError, match="circle"):
        follow(str(tree / "a"))


def test_a_reachable_path_needs_nothing(tree: Path) -> None:
    plan = plan_mounts([Bind(path=str(tree / "open"))], [], scratch=())
    assert plan.covers == plan.binds == plan.links == ()


def test_a_closed_ancestor_is_covered_and_the_needed_bound_back(tree: Path) -> None:
    plan = plan_mounts([Bind(path=str(tree / "open" / "python"))], [], scratch=())
    assert [(cover.path, cover.needed) for cover in plan.covers] == [(str(tree / "closed"), True)]
    assert [bind.path for bind in plan.binds] == [str(tree / "closed" / "python")]
    assert [link.path for link in plan.links] == [str(tree / "closed" / "latest")]


def test_hidden_and_nested_covers_become_one(tree: Path) -> None:
    hidden = [str(tree / "closed" / "secret"), str(tree / "closed")]
    plan = plan_mounts([Bind(path=str(tree / "closed" / "python"), writable=True)], hidden, scratch=())
    assert [cover.path for cover in plan.covers] == [str(tree / "closed")]
    assert plan.binds == (Bind(path=str(tree / "closed" / "python"), writable=True),)


@needs_root
def test_the_view_shows_the_needed_and_hides_the_rest(tree: Path) -> None:
    script = f"""
import os
from cloister_kernel.mounts import Bind, carry_out, own_mount_namespace, plan_mounts
root = {str(tree)!r}
look = lambda path: (os.path.exists(path), os.access(path, os.W_OK))
print(look(root + "/closed/secret/key"))
plan = plan_mounts([Bind(path=root + "/open/python")], [], scratch=())
own_mount_namespace()
carry_out(plan, 1 << 20)
os.setresuid(200123, 200123, 200123)
print(look(root + "/closed/secret/key"))
print(open(root + "/open/python/lib.py").read())
try:
    open(root + "/open/python/lib.py", "a")
except OSError as error:
    print(error.strerror)
try:
    os.listdir(root + "/closed")
except OSError as error:
    print(error.strerror)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.stderr == ""
    # The first line is the positive control: root saw the key before.
    expected = ["(True, True)", "(False, False)", "x = 1", "Read-only file system", "Permission denied"]
    assert done.stdout.splitlines() == expected
    assert (tree / "closed" / "secret" / "key").read_text() == "secret"
