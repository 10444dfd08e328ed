"""Which cells the laptop carries out: one exact line, and nothing that only looks like it."""

from __future__ import annotations

import pytest

from cloister.errands import Get, Install, Put, errand_line, local_path, parse_line
from cloister_data.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("code", "errand"),
    [
        ("%cloister put a.csv", Put("a.csv", "a.csv")),
        ("  %cloister  put  data/a.csv \n", Put("data/a.csv", "a.csv")),
        ("%cloister put a.csv x/", Put("a.csv", "x/a.csv")),
        ("%cloister put 'a b.csv' \"c d.csv\"", Put("a b.csv", "c d.csv")),
        ("%cloister put a.csv ~/x.csv", Put("a.csv", "x.csv")),
        ("%cloister put {name}", Put("{name}", "{name}")),
        ("%cloister get out/m.pt", Get("out/m.pt", "m.pt", False)),
        ("%cloister get m.pt models/ --force", Get("m.pt", "models/m.pt", True)),
        (
            "%cloister pip install polars 'numpy>=2,<3' x[a,b]==1.0",
            Install(("polars", "numpy>=2,<3", "x[a,b]==1.0"), ()),
        ),
        ("%cloister pip install w/tiny-1.0-py3-none-any.whl", Install((), ("w/tiny-1.0-py3-none-any.whl",))),
    ],
)
def test_lines_that_are_carried_out(code: str, errand: object) -> None:
    line = errand_line(code)
    assert line is not None
    assert parse_line(line) == errand


@pytest.mark.parametrize(
    "code",
    [
        *("", "1 + 1", "%cloister status", "%cloister", "%%cloister put a", "# %cloister put a", "x = %cloister put a"),
        *("%cloister put a\nx = 1", "x = 1\n%cloister put a", "%cloister put a\r%cloister get b", "%cloister putt a"),
        *(
            "%cloister put a\x1b[2J",
            "%cloister\tput a",
            "%cloister put a\u2028b",
            "%cloister put " + "a" * 5000,
            None,
            7,
            ["%cloister put a"],
        ),
        "get_ipython().run_line_magic('cloister', 'put a')",
    ],
    ids=lambda code: ascii(code)[:40],
)
def test_cells_that_are_the_kernels_alone(code: object) -> None:
    assert errand_line(code) is None


@pytest.mark.parametrize(
    "line",
    [
        *("%cloister put", "%cloister put a b c", "%cloister put --force a", "%cloister put 'a", "%cloister put a ''"),
        *(
            "%cloister get",
            "%cloister get ../x",
            "%cloister get /etc/passwd",
            "%cloister get a/../../b",
            "%cloister get a//b",
        ),
        *("%cloister put a ../b", "%cloister put a /b", "%cloister pip", "%cloister pip install", "%cloister pip list"),
        *("%cloister pip install -r x", "%cloister pip install --index-url=http://x y", "%cloister pip install ./dir"),
        *(
            "%cloister pip install 'x @ git+https://y'",
            "%cloister pip install https://x/y.whl?",
            "%cloister pip install ..",
        ),
        *("%cloister pip install a.tar.gz/", "%cloister pip install 'a;b'", "%cloister pip install " + "a " * 51),
    ],
    ids=lambda line: line[:50],
)
def test_lines_that_are_wrong_say_what_is_right(line: str) -> None:
    found = errand_line(line)
    assert found is not None
    with pytest.raises(InvalidRequestError, match=r"Write: %cloister|can't be a path"):
        parse_line(found)


@pytest.mark.parametrize("path", ["a.csv", "./a.csv", "data/a b.csv", "a..b"])
def test_local_paths(path: str) -> None:
    assert local_path(path) == path.removeprefix("./")


@pytest.mark.parametrize(
    "path",
    [
        *("/etc/passwd", "../a", "a/../b", "a/..", "", ".", "..", "a//b", "a/", "C:/x", "c:\\x", "a\\b"),
        *(".ssh/id_ed25519", "a/.git/config", ".bashrc", "~/x", "~root/x", "./.env"),
    ],
)
def test_local_paths_that_are_refused(path: str) -> None:
    with pytest.raises(InvalidRequestError):
        local_path(path)
