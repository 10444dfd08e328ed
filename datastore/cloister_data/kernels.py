"""Kernels as the laptop starts and sees them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cloister_data.base import Identifier, Text, UnixSeconds, UserName, Wire
from cloister_data.errors import Problem
from cloister_data.policy import Sandbox
from cloister_data.transfers import MAX_TRANSFER_BYTES, HomePath, TransferTerms

MISCONFIGURED = 78
"""The exit status of a kernel service that can't start on this machine (EX_CONFIG of sysexits.h)."""

KernelState = Literal["starting", "running", "dead"]

EndingKind = Literal["asked", "exited", "signal", "memory", "idle", "lease", "room", "guard", "service"]
"""Why a kernel ended; `cloister_kernel/endings.py` says each in words."""


class KernelLaunch(Wire):
    """Asks for a kernel. `verdict` is the laptop's own verdict as JSON, shown in the notebook, trusted by nobody.

    `environment` holds display settings only (COLUMNS, LINES, TZ, LANG): names outside the list are refused.
    `home_key` opens the user's home, 32 bytes in hex that the laptop keeps; "" asks for a home that isn't kept.
    """

    verdict: Annotated[str, Field(max_length=65536)] = ""
    environment: dict[Literal["COLUMNS", "LINES", "TZ", "LANG", "NO_COLOR"], Text] = Field(default={}, max_length=8)
    home_key: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$", repr=False)] = ""


class KernelView(Wire):
    """`idle`: for how many seconds no laptop has been attached; 0 while one is."""

    kernel: Identifier
    state: KernelState
    started: UnixSeconds
    sandbox: Sandbox
    exit_code: int | None = None
    idle: int = Field(default=0, ge=0)


class KernelList(Wire):
    kernels: tuple[KernelView, ...] = Field(max_length=10_000)


class KernelStart(Wire):
    """Guard to kernel service: start a kernel for this user."""

    op: Literal["start"] = "start"
    user: UserName
    launch: KernelLaunch


class KernelSignal(Wire):
    """Guard to kernel service."""

    op: Literal["interrupt", "end", "state"]
    kernel: Identifier


class KernelAttach(Wire):
    """Guard to kernel service: from the answer on, this connection carries the kernel's frames both ways."""

    op: Literal["attach"] = "attach"
    kernel: Identifier


class KernelPut(Wire):
    """Guard to kernel service: from the answer on, `size` bytes follow in frames, and an empty frame at their end.

    The file is in its place once a second answer says so. Until the empty frame nothing of it shows.
    """

    op: Literal["put"] = "put"
    kernel: Identifier
    path: HomePath
    size: int = Field(ge=0, le=MAX_TRANSFER_BYTES)


class KernelGet(Wire):
    """Guard to kernel service: the answer says the file's size; so many bytes follow in frames."""

    op: Literal["get"] = "get"
    kernel: Identifier
    path: HomePath


class KernelRuntime(Wire):
    """Guard to kernel service: what the kernels run on."""

    op: Literal["runtime"] = "runtime"


class KernelQuery(Wire):
    """Guard to kernel service: the kernels of one user."""

    op: Literal["list"] = "list"
    user: UserName


class KernelWipe(Wire):
    """Guard to kernel service: delete the home of this user, who has no kernel now."""

    op: Literal["wipe"] = "wipe"
    user: UserName


class KernelMeet(Wire):
    """Guard to kernel service: this guard is here. Kernels that it doesn't know are registered before the answer.

    Sent every few seconds, so that the service knows that it has a guard. `guard` names one run of the guard.
    """

    op: Literal["meet"] = "meet"
    guard: Identifier


class KernelFigures(Wire):
    """A kernel service's kernels, without names. `service` names one run of it; the counts are since it started.

    `warm` ones wait for a user; `memory_bytes` is what all of them hold.
    """

    service: Identifier
    running: int = Field(ge=0)
    starting: int = Field(ge=0)
    warm: int = Field(ge=0)
    memory_bytes: int = Field(ge=0)
    started: int = Field(ge=0)
    ended: dict[EndingKind, Annotated[int, Field(ge=0)]]


KernelOrder = Annotated[
    KernelStart
    | KernelSignal
    | KernelAttach
    | KernelQuery
    | KernelWipe
    | KernelMeet
    | KernelPut
    | KernelGet
    | KernelRuntime,
    Field(discriminator="op"),
]


class KernelAnswer(Wire):
    """Kernel service to guard: the answer to one order. Exactly one field is set."""

    kernel: KernelView | None = None
    kernels: KernelList | None = None
    figures: KernelFigures | None = None
    size: int | None = Field(default=None, ge=0, le=MAX_TRANSFER_BYTES)
    runtime: TransferTerms | None = None
    problem: Problem | None = None
