"""The attestation verdict where people look: in the notebook."""

from __future__ import annotations

import os
from html import escape

from pydantic import ValidationError

from cloister.connection import SOCKET_VARIABLE, current_session
from cloister_attest.result import AttestationResult
from cloister_data.errors import ConfigurationError, NotFoundError

VERDICT_VARIABLE = "CLOISTER_VERDICT"
"""Set by the cloister in its kernels: the verdict that the laptop sent along, as JSON."""

FROM_LAPTOP = (
    "Computed by the laptop that started this kernel, before anything was sent. This kernel can't check it: "
    "what a cloister says of itself proves nothing. Trust the copy that your laptop shows."
)
OWN = "Computed on this computer, when the session was opened."


class Attestation:
    """A verdict, and who came to it.

    Attributes:
        result: one answer per named check, the measurement, the chip.
        note: who computed it.
    """

    def __init__(self, result: AttestationResult, note: str) -> None:
        self.result, self.note = result, note

    @property
    def ok(self) -> bool:
        return self.result.ok

    @property
    def simulated(self) -> bool:
        return self.result.simulated

    def __repr__(self) -> str:
        return f"{self.result.table()}\n\n{self.note}"

    def _repr_html_(self) -> str:
        return f"{self.result._repr_html_()}<p><small>{escape(self.note)}</small></p>"


def attestation() -> Attestation:
    """The verdict on the cloister that you work with.

    Raises NotFoundError where this kernel got none, ConfigurationError where nothing is connected.
    """
    session = current_session()
    if session is not None:
        return Attestation(session.verdict, OWN)
    if not os.environ.get(SOCKET_VARIABLE):
        raise ConfigurationError(
            "No cloister is connected, so there is no verdict.", next_step="Call cloister.use(NAME) first."
        )
    stored = os.environ.get(VERDICT_VARIABLE, "")
    try:
        return Attestation(AttestationResult.from_json(stored), FROM_LAPTOP)
    except ValidationError as error:
        raise NotFoundError(
            "This kernel got no verdict from a laptop that can be read.",
            why="It wasn't started through a cloister's kernelspec." if not stored else "It is of another version.",
            next_step="Start it from JupyterLab with the cloister's kernel, or look at: cloister connect.",
        ) from error
