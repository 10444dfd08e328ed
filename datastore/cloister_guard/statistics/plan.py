"""What a question will cost and what its answer will look like, decided before any data is opened. Pure.

Adjacency is zero-out with a public number of units N: a neighbour replaces one unit's row by nulls, and a null adds
nothing to any sum. So one unit moves a count by at most 1 and a sum of values, each clipped to the declared bounds, by
at most the largest clipped value; where N is known the values are centred first, which halves that.

Sums are exact int64 sums of fixed-point values (a lattice), the noise is an integer: no floating-point noise anywhere.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from cloister_data.base import Label, Text, Wire
from cloister_data.errors import InvalidRequestError
from cloister_data.mechanism import Composition, DiscreteLaplace, Mechanism
from cloister_data.schema import (
    BOOLEAN_VALUES,
    BooleanColumn,
    CategoryColumn,
    Column,
    IntegerColumn,
    RealColumn,
    Schema,
)
from cloister_data.statistics import MAX_GROUPS, Question
from cloister_guard.statistics.noise import check_epsilon, discrete_laplace, quantile

MAX_UNITS = 1 << 31
"""With values of at most 2^30 steps, sums stay below 2^61."""

RESOLUTION = 1 << 30
"""Steps from the centre to a bound, where the values aren't small integers anyway."""


class Lattice(Wire):
    """A value x becomes round((x - centre) / step), clipped to [-bound, bound]; that moves it by `rounding` steps."""

    centre: float
    step: float = Field(gt=0)
    bound: int = Field(ge=1, le=1 << 31)
    rounding: float = Field(ge=0, le=0.5)


class QueryPlan(Wire):
    """Everything about a query's answer but its numbers.

    Attributes:
        groups: one estimate each, in this order; none for a single number.
        units: the public number of units N.
        lattice: how values are summed; None for a count.
        denominator: what a mean divides by: N, or a count that is noised as well.
        mechanism: one discrete Laplace over the vector of groups, or a composition of two (sums, then counts).
        errors_95: of each estimate, as Estimate.error_95. Where a mean divides by a noised count this is a forecast for
            units spread evenly over the groups; the answer states each error anew from its noised numbers.
        title: the question in words, for people.
    """

    operation: Literal["count", "sum", "mean"]
    column: Label | None
    group_by: Label | None
    groups: tuple[Label, ...] = Field(max_length=MAX_GROUPS)
    units: int = Field(ge=0, le=MAX_UNITS)
    lattice: Lattice | None
    denominator: Literal["units", "noisy count"] | None
    low: float
    high: float
    mechanism: Mechanism
    errors_95: tuple[float, ...] = Field(min_length=1, max_length=MAX_GROUPS)
    title: Text

    @property
    def cells(self) -> int:
        return max(1, len(self.groups))

    @property
    def parts(self) -> tuple[DiscreteLaplace, ...]:
        """The mechanism's parts: (sums or counts,) or (sums, counts)."""
        parts = self.mechanism.parts if isinstance(self.mechanism, Composition) else (self.mechanism,)
        return tuple(part for part in parts if isinstance(part, DiscreteLaplace))


def plan(question: Question, schema: Schema, units: int, epsilon: float) -> QueryPlan:
    """The plan of `question` over `units` units at `epsilon`.

    Raises InvalidRequestError for an unknown or unsuitable column, a group that isn't a category, or a bad epsilon.
    """
    check_epsilon(epsilon)
    if not 0 <= units <= MAX_UNITS:
        raise InvalidRequestError(f"A question can be asked about at most {MAX_UNITS} units.")
    groups = _groups(question, schema)
    if question.operation == "count":
        return _count(question, schema, groups, units, epsilon)
    column = _measured(question, schema)
    low, high = _bounds(column)
    # With a known number of addends the sum is centred: a null and the middle of the bounds are the same addend.
    fixed = not groups and not column.nullable
    lattice = _lattice(column, low, high, centred=fixed or question.operation == "mean")
    divided = question.operation == "mean"
    mechanism: Mechanism
    if divided and not fixed:
        # Sums and counts share epsilon in equal parts.
        mechanism = Composition(parts=(discrete_laplace(lattice.bound, epsilon / 2), discrete_laplace(1, epsilon / 2)))
    else:
        mechanism = discrete_laplace(lattice.bound, epsilon)
    found = QueryPlan(
        operation=question.operation,
        column=column.name,
        group_by=question.group_by,
        groups=groups,
        units=units,
        lattice=lattice,
        denominator=None if not divided else ("units" if fixed else "noisy count"),
        low=low,
        high=high,
        mechanism=mechanism,
        errors_95=(0.0,),
        title=_title(question),
    )
    return found.model_copy(update={"errors_95": (_forecast(found, lattice),) * found.cells})


def _forecast(query: QueryPlan, lattice: Lattice) -> float:
    """`QueryPlan.errors_95`: each addend was rounded by `lattice.rounding` steps at most, then came the noise."""
    if query.denominator == "noisy count":
        return ratio_error(query, lattice, 0.0, query.units / query.cells)
    sums = query.parts[0]
    error = lattice.step * (quantile(sums.scale, 0.95) + lattice.rounding * query.units)
    return error if query.denominator is None else error / max(1, query.units)


def ratio_error(query: QueryPlan, lattice: Lattice, offset: float, count: float) -> float:
    """A bound for the error of a noised sum over a noised count, which holds with probability .95; at most the range.

    |s'/c' - s/c| <= (t_s + |s'/c'| t_c) / (c' - t_c) where the noises are below t_s and t_c, each with probability
    .975. `offset` is |s'/c'| in the column's unit, `count` is c'.
    """
    sums, counts = query.parts
    width, count_error = query.high - query.low, quantile(counts.scale, 0.975)
    if count <= count_error:
        return width
    sum_error = lattice.step * quantile(sums.scale, 0.975)
    return min(width, (sum_error + offset * count_error) / (count - count_error) + lattice.step * lattice.rounding)


def _count(question: Question, schema: Schema, groups: tuple[str, ...], units: int, epsilon: float) -> QueryPlan:
    if question.column is not None:
        _known(question.column, schema)
    mechanism = discrete_laplace(1, epsilon)
    return QueryPlan(
        operation="count",
        column=question.column,
        group_by=question.group_by,
        groups=groups,
        units=units,
        lattice=None,
        denominator=None,
        low=0.0,
        high=float(units),
        mechanism=mechanism,
        errors_95=(float(quantile(mechanism.scale, 0.95)),) * max(1, len(groups)),
        title=_title(question),
    )


def _known(name: str, schema: Schema) -> Column:
    column = schema.column(name)
    if column is None:
        raise InvalidRequestError(
            f"The dataset has no column {name!r}.",
            why="Its schema doesn't declare one.",
            next_step="The handle's repr lists the columns. Nothing was charged.",
        )
    if name == schema.privacy_unit:
        raise InvalidRequestError(
            f"{name!r} names the privacy unit.",
            why="Questions about whose row it is aren't answered.",
            next_step="Ask about another column. Nothing was charged.",
        )
    return column


def _groups(question: Question, schema: Schema) -> tuple[str, ...]:
    if question.group_by is None:
        return ()
    column = _known(question.group_by, schema)
    if question.group_by == question.column:
        raise InvalidRequestError(
            f"{question.group_by!r} is both the column and the group.",
            next_step="Count without a column, or group by another one. Nothing was charged.",
        )
    match column:
        case CategoryColumn():
            return column.categories
        case BooleanColumn():
            return BOOLEAN_VALUES
        case _:
            raise InvalidRequestError(
                f"{question.group_by!r} can't be a group: it is of type {column.type}.",
                why="The groups must be known without looking at the data.",
                next_step="Group by a category or a boolean column. Nothing was charged.",
            )


def _measured(question: Question, schema: Schema) -> IntegerColumn | RealColumn | BooleanColumn:
    if question.column is None:
        raise InvalidRequestError(
            f"A {question.operation} needs a column.", next_step='Write ds["column"]. Nothing was charged.'
        )
    column = _known(question.column, schema)
    if not isinstance(column, IntegerColumn | RealColumn | BooleanColumn):
        raise InvalidRequestError(
            f"There is no {question.operation} of {column.name!r}: it is of type {column.type}.",
            next_step="Take an integer, real or boolean column, or a count. Nothing was charged.",
        )
    return column


def _bounds(column: IntegerColumn | RealColumn | BooleanColumn) -> tuple[float, float]:
    return (0.0, 1.0) if isinstance(column, BooleanColumn) else (float(column.low), float(column.high))


def _lattice(column: IntegerColumn | RealColumn | BooleanColumn, low: float, high: float, *, centred: bool) -> Lattice:
    """Whole numbers keep their own lattice (halves where centred) as long as that is no finer than RESOLUTION."""
    centre = low + (high - low) / 2 if centred else 0.0
    reach = max(high - centre, centre - low)
    if not isinstance(column, RealColumn):
        step = 0.5 if centred else 1.0
        bound = math.ceil(reach / step)
        if bound <= RESOLUTION:
            return Lattice(centre=centre, step=step, bound=max(1, bound), rounding=0.0)
    if reach / RESOLUTION <= 0:
        raise InvalidRequestError(f"The declared bounds of {column.name!r} are too close to tell values apart.")
    return Lattice(centre=centre, step=reach / RESOLUTION, bound=RESOLUTION, rounding=0.5)


def _title(question: Question) -> str:
    what = question.operation if question.column is None else f"{question.operation} of {question.column}"
    by = "" if question.group_by is None else f" by {question.group_by}"
    return f"{what}{by}, {question.source.title}"
