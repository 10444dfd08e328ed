"""The guard's control socket: only the kernel spawner may connect (root, or the guard's own uid).

It is the one place that says whose kernel a socket belongs to. Messages are frames of `cloister_data.framing`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cloister_data.base import Identifier, Text, UserName, Wire
from cloister_data.errors import Problem
from cloister_data.policy import Sandbox


class RegisterKernel(Wire):
    """A kernel is about to start: make its socket, owned by `uid`, answering as `user`.

    `service` names the run of the kernel service whose kernel it is: kernels of an earlier run died with it. `again`:
    it runs already, and was registered before.
    """

    op: Literal["register"] = "register"
    kernel: Identifier
    uid: int = Field(ge=0, le=2**32 - 2)
    user: UserName
    sandbox: Sandbox
    service: Identifier
    again: bool = False


class EndKernel(Wire):
    """The kernel has ended: close and remove its socket."""

    op: Literal["end"] = "end"
    kernel: Identifier


ControlOrder = Annotated[RegisterKernel | EndKernel, Field(discriminator="op")]


class ControlAnswer(Wire):
    """`socket` is the absolute path of the kernel's guard socket after `register`, else empty."""

    socket: Text = ""
    problem: Problem | None = None
