"""A layer of the sandbox that can't be set, in words. Standard library only: the kernel's own process raises it."""

from __future__ import annotations

from cloister_kernel.process import PR_GET_NO_NEW_PRIVS, prctl


class LayerError(Exception):
    """The kernel must not start: `layer` can't be set or doesn't hold, because of `why`; `mend` says what to do."""

    def __init__(self, layer: str, why: str, mend: str) -> None:
        super().__init__(layer, why, mend)
        self.layer, self.why, self.mend = layer, why, mend

    def __str__(self) -> str:
        return f"The notebook kernel can't be confined: {self.layer}. {self.why} {self.mend}"


def need_no_new_privileges(layer: str) -> None:
    """Raises LayerError: without it a privileged process could set the layer, and lose none of its privileges."""
    if prctl(PR_GET_NO_NEW_PRIVS, 0) != 1:
        raise LayerError(layer, "no_new_privs isn't set.", "Set it first, with prctl(PR_SET_NO_NEW_PRIVS).")
