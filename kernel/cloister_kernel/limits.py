"""How many kernels there may be (pure)."""

from __future__ import annotations

from dataclasses import dataclass

from cloister_data.errors import TooManyRequestsError

ABANDONED_SECONDS = 600.0
"""A laptop that was away for so long may have lost its kernel for good: at the limit, the kernel makes room."""


@dataclass(frozen=True)
class Limits:
    """Kernels that run or start: of one user, and of all together. Kernels that wait for a user don't count."""

    per_user: int = 8
    total: int = 64

    def refusal(self, own: int, all_together: int) -> TooManyRequestsError | None:
        """Why a user with `own` of `all_together` kernels can't have one more; None where they can."""
        if own >= self.per_user:
            return TooManyRequestsError(
                f"You have {own} kernels already.",
                why=f"The limit for one user is {self.per_user}.",
                next_step="Shut one down in JupyterLab. One whose JupyterLab is gone makes room after ten minutes.",
            )
        if all_together >= self.total:
            return TooManyRequestsError(
                "This cloister runs as many kernels as it may.",
                why=f"The limit for all users together is {self.total}.",
                next_step="Try again later, and shut down those that you don't need; the admin sets the limit.",
            )
        return None
