"""The one tree of errors, and its form on the wire (RFC 9457 problem details).

Every error says what happened, why, and what to do next. An error that leaves the guard is built from
public facts only (the request, the schema, the policy, the accounts), never from rows.
"""

from __future__ import annotations

import traceback
from typing import ClassVar

from pydantic import Field

from cloister_data.base import Text, Wire


class BudgetFacts(Wire):
    """What a refusal over budget tells: what was asked, what is left, what would fit.

    All three are epsilons of one release at `delta`; `fits` is the largest request of the same kind that
    the accounts would still admit (0 when nothing would).
    """

    account: Text
    asked: float
    left: float
    fits: float
    delta: float
    hint: Text = ""


class Problem(Wire):
    """`application/problem+json` (RFC 9457) with the members `code`, `why`, `next` and `budget` added."""

    type: Text
    title: Text
    status: int = Field(ge=400, le=599)
    code: Text
    why: Text = ""
    next: Text = ""
    budget: BudgetFacts | None = None


class CloisterError(Exception):
    """The root of every error that Cloister raises on purpose.

    Attributes:
        what, why, next_step: the three sentences of the message.
        budget: the figures of a refusal over budget, else None.
    """

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500

    def __init__(self, what: str, *, why: str = "", next_step: str = "", budget: BudgetFacts | None = None) -> None:
        self.what, self.why, self.next_step, self.budget = what, why, next_step, budget
        super().__init__(" ".join(part for part in (what, why, next_step) if part))

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the line of the user's cell and the sentences, without Cloister's own frames."""
        lines = []
        for frame in traceback.extract_tb(self.__traceback__):
            if "ipykernel_" in frame.filename or frame.filename.startswith("<ipython-input"):
                lines.append(f"----> line {frame.lineno}: {frame.line}")
        sentences = (part for part in (self.what, self.why, self.next_step) if part)
        return [*lines, f"{type(self).__name__}: " + "\n".join(sentences)]

    def to_problem(self) -> Problem:
        return Problem(
            type=f"urn:cloister:problem:{self.code}",
            title=self.what[:4000],
            status=self.status,
            code=self.code,
            why=self.why[:4000],
            next=self.next_step[:4000],
            budget=self.budget,
        )


class InternalError(CloisterError):
    """A fault of ours. Its text is constant, so that it can carry nothing of the data."""


class InvalidRequestError(CloisterError):
    """The request can't be understood or contradicts the schema. Nothing was charged."""

    code, status = "invalid-request", 422


class NotFoundError(CloisterError):
    """No such thing, or none that this user may see (the two are not told apart)."""

    code, status = "not-found", 404


class UnsupportedModelError(CloisterError):
    """The model holds an operation, or a shape, that the guard doesn't run. Nothing was charged."""

    code, status = "unsupported-model", 422


class AuthenticationError(CloisterError):
    """Wrong name or password; which of the two is not told."""

    code, status = "authentication-failed", 401


class SessionExpiredError(AuthenticationError):
    """The token is missing, unknown, revoked or past its time."""

    code, status = "session-expired", 401


class ForbiddenError(CloisterError):
    """The user is known, and may not do this."""

    code, status = "forbidden", 403


class PolicyRefusedError(ForbiddenError):
    """The owner's policy doesn't admit the request. Nothing was charged."""

    code, status = "policy-refused", 403


class BudgetRefusedError(CloisterError):
    """The request doesn't fit what is left. Nothing was charged; `budget` says what would fit."""

    code, status = "budget-refused", 403


class ConflictError(CloisterError):
    """It clashes with what is there already (a name taken, a request id used for something else)."""

    code, status = "conflict", 409


class TooLargeError(CloisterError):
    """Over a stated size."""

    code, status = "too-large", 413


class TooManyRequestsError(CloisterError):
    """Too many attempts in a short time."""

    code, status = "too-many-requests", 429


class StorageError(CloisterError):
    """The disk or the database refused to write. What was reserved stays reserved until it is settled."""

    code, status = "storage-failed", 507


class UnavailableError(CloisterError):
    """A part of the cloister that this needs doesn't answer at the moment."""

    code, status = "unavailable", 503


class JobFailedError(CloisterError):
    """A job ended without a result. Its steps that were marked stay spent."""

    code, status = "job-failed", 500


class UnreachableError(CloisterError):
    """The client couldn't reach the cloister."""

    code, status = "unreachable", 503


class AttestationRefusedError(CloisterError):
    """The evidence didn't convince. Nothing was sent. The failed checks are in the message."""

    code, status = "attestation-refused", 403


class ConfigurationError(CloisterError):
    """A file or an option of this installation is wrong."""

    code, status = "configuration", 500


def _tree(root: type[CloisterError]) -> list[type[CloisterError]]:
    return [root, *(found for child in root.__subclasses__() for found in _tree(child))]


def from_problem(problem: Problem) -> CloisterError:
    """The error that `problem` describes; an unknown code becomes a plain `CloisterError`.

    Its texts lose their control characters: an error is printed, and the other side's words must not steer a terminal.
    """
    kind = next((kind for kind in _tree(CloisterError) if kind.code == problem.code), CloisterError)
    budget = problem.budget
    if budget is not None:
        budget = budget.model_copy(update={"account": _plain(budget.account), "hint": _plain(budget.hint)})
    return kind(_plain(problem.title), why=_plain(problem.why), next_step=_plain(problem.next), budget=budget)


def _plain(text: str) -> str:
    return "".join(char if char.isprintable() or char == "\n" else " " for char in text)
