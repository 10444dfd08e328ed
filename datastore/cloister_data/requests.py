"""Requests for more budget: a scientist asks an owner, the owner answers with a new signed policy or a reason."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from cloister_data.base import DatasetName, Identifier, UnixSeconds, UserName, Wire
from cloister_data.policy import SignedPolicy

Reason = Annotated[str, StringConstraints(min_length=1, max_length=2000)]


class BudgetRequest(Wire):
    """Ask a dataset's owner for a limit that is higher by `epsilon`."""

    dataset: DatasetName
    epsilon: float = Field(gt=0, le=1000)
    reason: Reason


class BudgetAnswer(Wire):
    """The owner's answer, exactly one of: the dataset's next policy, which gives the user more; a reason why not."""

    granted: SignedPolicy | None = None
    refused: Reason | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.granted is None) == (self.refused is None):
            raise ValueError("an answer is either a signed policy or a reason")
        return self


class BudgetRequestView(Wire):
    """A request as its user and its owner see it. `policy_version` is that of the policy by which it was granted."""

    request: Identifier
    user: UserName
    owner: UserName
    dataset: DatasetName
    epsilon: float
    reason: Reason
    state: Literal["open", "granted", "refused"]
    answer: str = Field(default="", max_length=2000)
    policy_version: int | None = None
    created: UnixSeconds
    answered: UnixSeconds | None = None


class BudgetRequestList(Wire):
    requests: tuple[BudgetRequestView, ...] = Field(max_length=100_000)
