"""Files on their way between a laptop and a kernel's home: their names, their sizes, and what is said about them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from cloister_data.base import Digest, Identifier, Wire

MAX_TRANSFER_BYTES = 2 << 30
"""Bytes of one file, in either direction."""
MAX_TRANSFER_FRAME = 1 << 20
"""Bytes of a file in one frame between the guard and the kernel service."""
MAX_PATH = 255
"""Characters of a file's path, and bytes of each of its names."""

Direction = Literal["put", "get"]
"""To the kernel's home, or from it."""


def fault_of_path(path: str) -> str:
    """Why `path` can't name a file in a kernel's home, in words; or nothing."""
    if not path or len(path) > MAX_PATH:
        return f"A path has 1 to {MAX_PATH} characters."
    if not path.isprintable():
        return "A path has no control characters and no line breaks."
    names = path.split("/")
    if any(name in ("", ".", "..") for name in names):
        return "A path is relative to the kernel's home, and stays in it."
    if any(len(name.encode(errors="replace")) > MAX_PATH for name in names):
        return f"Each name in a path has at most {MAX_PATH} bytes."
    return ""


def _valid_path(path: str) -> str:
    if fault := fault_of_path(path):
        raise ValueError(fault)
    return path


HomePath = Annotated[str, Field(max_length=MAX_PATH), AfterValidator(_valid_path)]
"""Where a file lies, relative to the kernel's home: names with `/` between them; no `..`, nothing unprintable."""


class TransferRequest(Wire):
    """What is asked: the digest of it is what a refusal's entry in the audit log names."""

    direction: Direction
    kernel: Identifier
    path: HomePath


class TransferQuery(Wire):
    """What is asked before anything is sent: may files be moved to and from this kernel?"""

    kernel: Identifier


class TransferTerms(Wire):
    """What may be moved to and from a kernel, and for which Python a wheel has to be made.

    `python` is the kernel's version ("3.11"), `machine` what it runs on ("x86_64"), `glibc` its C library's version
    ("2.36"), empty where it has another one.
    """

    max_bytes: int = Field(ge=0)
    python: str = Field(pattern=r"^[0-9]{1,2}\.[0-9]{1,3}$")
    machine: str = Field(pattern=r"^[a-z0-9_]{1,32}$")
    glibc: str = Field(pattern=r"^([0-9]{1,2}\.[0-9]{1,3})?$")


class TransferView(Wire):
    """A file that has arrived whole in the kernel's home, and is in the audit log."""

    path: HomePath
    size: int = Field(ge=0, le=MAX_TRANSFER_BYTES)
    sha256: Digest
