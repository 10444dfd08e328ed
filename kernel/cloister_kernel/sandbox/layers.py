"""The error of a sandbox that lacks a layer. Standard library only: it is raised inside the sandbox too."""

from __future__ import annotations


class LayerError(Exception):
    """A layer of the sandbox is missing or didn't take hold: the kernel must not start.

    Attributes:
        layer: its name, as the documents call it.
        why: what was seen.
        mend: what the admin can do.
    """

    def __init__(self, layer: str, why: str, mend: str) -> None:
        self.layer, self.why, self.mend = layer, why, mend
        super().__init__(f"{layer}: {why} {mend}")
