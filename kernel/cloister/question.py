"""Questions to a dataset: columns and groups, and what asking would cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, overload

from cloister import rendering
from cloister.checks import check_epsilon, check_group, check_measured, find_column
from cloister.connection import current
from cloister.paid import request_id, send_paid
from cloister.releases import Release
from cloister_data import release as wire
from cloister_data import statistics as ask
from cloister_data.datasets import SplitRef
from cloister_data.mechanism import Mechanism
from cloister_data.schema import Schema

Operation = Literal["count", "sum", "mean"]


class Cost:
    """What a request would cost, and whether it would be admitted now. It was computed without the data.

    Attributes:
        epsilon, delta: the release's own tight loss.
        expected_error: the largest error of its numbers with probability .95; None for a training.
        shares: for each account the share of its limit that the request would add.
        admitted, why_not: whether it fits now.
        steps: of a training.
    """

    def __init__(self, view: ask.CostView) -> None:
        self._view = view

    @property
    def mechanism(self) -> Mechanism:
        return self._view.mechanism

    @property
    def epsilon(self) -> float:
        return self._view.epsilon

    @property
    def delta(self) -> float:
        return self._view.delta

    @property
    def expected_error(self) -> float | None:
        return self._view.expected_error

    @property
    def shares(self) -> dict[str, float]:
        return dict(self._view.shares)

    @property
    def admitted(self) -> bool:
        return self._view.admitted

    @property
    def why_not(self) -> str:
        return self._view.why_not

    @property
    def steps(self) -> int | None:
        return self._view.steps

    def __repr__(self) -> str:
        error = (
            ""
            if self.expected_error is None
            else f"; error \N{PLUS-MINUS SIGN} {rendering.figure(self.expected_error)} (95%)"
        )
        steps = "" if self.steps is None else f"; {self.steps} steps"
        verdict = (
            "it would be admitted now" if self.admitted else f"NOT admitted now: {rendering.one_line(self.why_not)}"
        )
        shares = "".join(
            f"\n  {rendering.one_line(name)}: {rendering.share(share)} of its limit"
            for name, share in sorted(self.shares.items())
        )
        return (
            f"<Cost: epsilon {rendering.figure(self.epsilon)} at delta {self.delta:g}{error}{steps}; {verdict}; "
            f"nothing was spent>{shares}"
        )


class Question:
    """A question that was put together and not asked yet: free until `ask`."""

    def __init__(self, question: ask.Question) -> None:
        self._question = question

    def cost(self, epsilon: float) -> Cost:
        """What asking with `epsilon` would cost and how exact the answer would be. Spends nothing."""
        request = ask.QueryCostRequest(question=self._question, epsilon=check_epsilon(epsilon))
        return Cost(current().call("POST", "/queries/cost", request, ask.CostView))

    def ask(self, epsilon: float) -> Release:
        """Pay `epsilon` and get the answer.

        Raises PolicyRefusedError or BudgetRefusedError (nothing is charged then).
        """
        request = ask.QueryRequest(request_id=request_id(), question=self._question, epsilon=check_epsilon(epsilon))
        caller = current()
        return Release(send_paid(lambda: caller.call("POST", "/queries", request, wire.Release)))

    def __repr__(self) -> str:
        question = self._question
        what = question.operation if question.column is None else f"{question.operation} of {question.column!r}"
        by = "" if question.group_by is None else f" by {question.group_by!r}"
        return (
            f"<Question: {what}{by}, {question.source.title}; free until you ask: "
            ".cost(epsilon=...) tells the price, .ask(epsilon=...) pays it>"
        )


def _either(question: Question, epsilon: float | None) -> Release | Question:
    return question if epsilon is None else question.ask(epsilon)


class ColumnHandle:
    """One column of a dataset: a name to ask about. There is nothing behind it."""

    def __init__(self, source: Callable[[], SplitRef], schema: Schema, name: str, group_by: str | None = None) -> None:
        self._column = find_column(schema, name)
        self._source = source
        self._group_by = group_by

    @property
    def name(self) -> str:
        return self._column.name

    @overload
    def mean(self, epsilon: float) -> Release: ...
    @overload
    def mean(self, epsilon: None = None) -> Question: ...
    def mean(self, epsilon: float | None = None) -> Release | Question:
        """The mean of the values (nulls left out). Without epsilon: a Question, which costs nothing."""
        return _either(self._question("mean"), epsilon)

    @overload
    def sum(self, epsilon: float) -> Release: ...
    @overload
    def sum(self, epsilon: None = None) -> Question: ...
    def sum(self, epsilon: float | None = None) -> Release | Question:
        """The sum of the values (a null adds nothing)."""
        return _either(self._question("sum"), epsilon)

    @overload
    def count(self, epsilon: float) -> Release: ...
    @overload
    def count(self, epsilon: None = None) -> Question: ...
    def count(self, epsilon: float | None = None) -> Release | Question:
        """How many units have a value here."""
        return _either(self._question("count"), epsilon)

    def _question(self, operation: Operation) -> Question:
        check_measured(self._column, operation)
        return Question(
            ask.Question(source=self._source(), operation=operation, column=self._column.name, group_by=self._group_by)
        )

    def __repr__(self) -> str:
        by = "" if self._group_by is None else f" by {self._group_by!r}"
        return f"<Column {self.name!r}{by}, {self._column.type}: .mean, .sum and .count take epsilon=>"


class GroupHandle:
    """A dataset by the declared categories of one column."""

    def __init__(self, source: Callable[[], SplitRef], schema: Schema, by: str) -> None:
        self._column = find_column(schema, by)
        check_group(self._column)
        self._source, self._schema = source, schema

    def __getitem__(self, name: str) -> ColumnHandle:
        return ColumnHandle(self._source, self._schema, name, self._column.name)

    @overload
    def count(self, epsilon: float) -> Release: ...
    @overload
    def count(self, epsilon: None = None) -> Question: ...
    def count(self, epsilon: float | None = None) -> Release | Question:
        """How many units are in each group."""
        question = ask.Question(source=self._source(), operation="count", group_by=self._column.name)
        return _either(Question(question), epsilon)

    def __repr__(self) -> str:
        return f'<Groups by {self._column.name!r}: .count(epsilon=...), ["column"].mean(epsilon=...)>'
