"""Questions about columns, and what an answer looks like."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cloister_data.base import Label, RequestId, Wire
from cloister_data.datasets import SplitRef
from cloister_data.mechanism import Mechanism

Epsilon = float
MAX_GROUPS = 4096


class Question(Wire):
    """`operation` over `column`, for each declared category of `group_by` where that is given.

    `count` without a column counts rows, with one the rows that have a value there. A null counts for nothing.
    """

    source: SplitRef
    operation: Literal["count", "sum", "mean"]
    column: Label | None = None
    group_by: Label | None = None


class QueryRequest(Wire):
    request_id: RequestId
    question: Question
    epsilon: Epsilon = Field(gt=0, le=1000)


class QueryCostRequest(Wire):
    """The same as a query, but it asks what that would cost, and spends nothing."""

    question: Question
    epsilon: Epsilon = Field(gt=0, le=1000)


class Estimate(Wire):
    """One noisy number. `error_95`: with probability .95 the noise moved the value by less (a public figure)."""

    group: Label | None = None
    value: float
    error_95: float = Field(ge=0)


class CostView(Wire):
    """What a request would cost and whether it would be admitted now. Computed from public facts alone.

    `epsilon` is the release's own tight epsilon at `delta`; `expected_error` is `error_95` of each number where that
    is public (None for a training). `share` maps each account to the share of its limit that the request would add.
    """

    mechanism: Mechanism
    epsilon: float
    delta: float
    expected_error: float | None
    shares: dict[str, float] = Field(max_length=1024)
    admitted: bool
    why_not: str = Field(default="", max_length=4096)
    steps: int | None = None
