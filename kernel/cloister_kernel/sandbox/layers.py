"""What is raised where a layer of the sandbox can't be put in place."""

from __future__ import annotations


class LayerError(Exception):
    """A layer of the sandbox is missing or fails: the kernel isn't started.

    Attributes:
        layer: its name, such as "cgroup".
        why: what is missing, in a sentence.
        mend: what to do about it, in a sentence.
    """

    def __init__(self, layer: str, why: str, mend: str) -> None:
        self.layer, self.why, self.mend = layer, why, mend
        super().__init__(f"{layer}: {why} {mend}")
