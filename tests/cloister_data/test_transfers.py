"""The name of a file in a kernel's home can't lead out of it, nor steer a terminal."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from cloister_data.transfers import MAX_PATH, TransferRequest, TransferTerms

KERNEL = "0" * 32


@pytest.mark.parametrize("path", ["a.csv", "data/a b.csv", ".cache/x", "ä/ö", "a" * MAX_PATH, "...", "-x"])
def test_paths_in_the_home(path: str) -> None:
    assert TransferRequest(direction="put", kernel=KERNEL, path=path).path == path


@pytest.mark.parametrize(
    "path",
    [
        *("", "/", "/etc/passwd", "..", "../x", "a/../x", "a/..", "./a", "a/./b", "a//b", "a/", "."),
        *("a\nb", "a\0b", "a\x1b[2J", "a\u2028b", "a\u202eb", "a\ud800b", "a" * (MAX_PATH + 1), "ä" * 128),
    ],
    ids=ascii,
)
def test_paths_that_are_refused(path: str) -> None:
    with pytest.raises(ValidationError):
        TransferRequest(direction="get", kernel=KERNEL, path=path)


def test_a_huge_path_is_refused_by_its_length() -> None:
    with pytest.raises(ValidationError, match="at most 255"):
        TransferRequest(direction="put", kernel=KERNEL, path="a/" * (1 << 20) + "a")


@pytest.mark.parametrize("field", [{"python": "3.11; x"}, {"machine": "x86 64"}, {"machine": "-r"}, {"glibc": "2.x"}])
def test_what_goes_into_a_command_is_bounded(field: dict[str, str]) -> None:
    good = {"max_bytes": 1, "python": "3.11", "machine": "x86_64", "glibc": "2.36"}
    TransferTerms.model_validate(good)
    with pytest.raises(ValidationError):
        TransferTerms.model_validate(good | field)
