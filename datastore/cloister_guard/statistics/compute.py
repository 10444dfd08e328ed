"""From rows to noised estimates: exact int64 aggregates, integer noise, then arithmetic on noised numbers alone.

Every function is total: empty tables, empty groups and columns of nulls give numbers like any other input, so that
neither an error nor a shape tells anything about the rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cloister_data.mechanism import DiscreteLaplace
from cloister_data.schema import BOOLEAN_VALUES
from cloister_data.statistics import Estimate
from cloister_guard.statistics.noise import add_noise, quantile
from cloister_guard.statistics.plan import Lattice, QueryPlan, ratio_error

IntVector = npt.NDArray[np.int64]


def answer(query: QueryPlan, table: pa.Table) -> list[Estimate]:
    """The noised answer of `query` over the selected rows."""
    noised = [
        add_noise(vector.tolist(), part.scale)
        for vector, part in zip(exact_vectors(query, table), query.parts, strict=True)
    ]
    return estimates(query, noised)


def exact_vectors(query: QueryPlan, table: pa.Table) -> list[IntVector]:
    """What the mechanism's parts are applied to: int64[cells] each. One unit moves each by its sensitivity at most."""
    cells = _cells(query, table)
    present = cells >= 0
    if query.column is None:
        return [_counts(cells[present], query.cells)]
    if query.lattice is None:
        present &= ~table.column(query.column).is_null().to_numpy()
        return [_counts(cells[present], query.cells)]
    values, valid = _lattice_values(table.column(query.column), query.lattice)
    present &= valid
    sums = np.zeros(query.cells, dtype=np.int64)
    np.add.at(sums, cells[present], values[present])
    return [sums] if len(query.parts) == 1 else [sums, _counts(cells[present], query.cells)]


def estimates(query: QueryPlan, noised: Sequence[Sequence[int]]) -> list[Estimate]:
    """Arithmetic on noised integers: it may use them, the plan, and nothing else."""
    groups: tuple[str | None, ...] = query.groups or (None,)
    return [
        Estimate(group=group, value=value, error_95=error)
        for group, (value, error) in zip(groups, _figures(query, noised), strict=True)
    ]


def _figures(query: QueryPlan, noised: Sequence[Sequence[int]]) -> list[tuple[float, float]]:
    lattice, first = query.lattice, noised[0]
    if lattice is None:
        return [(float(count), error) for count, error in zip(first, query.errors_95, strict=True)]
    if query.operation == "sum":
        offset = query.units * lattice.centre
        return [(offset + lattice.step * total, error) for total, error in zip(first, query.errors_95, strict=True)]
    if query.denominator == "units":
        known = max(1, query.units)
        return [
            (lattice.centre + lattice.step * total / known, error)
            for total, error in zip(first, query.errors_95, strict=True)
        ]
    return [_ratio(query, lattice, total, count) for total, count in zip(first, noised[1], strict=True)]


def _ratio(query: QueryPlan, lattice: Lattice, total: int, count: int) -> tuple[float, float]:
    offset = lattice.step * total / max(1, count)
    value = min(max(lattice.centre + offset, query.low), query.high)
    error = ratio_error(query, lattice, abs(value - lattice.centre), float(count))
    return value, error


def noisy_count(count: int, mechanism: DiscreteLaplace, *, step: float = 1.0) -> Estimate:
    """`step` times a noised aggregate: a count (step 1), a share of hits (step 1/N), a mean error."""
    (noised,) = add_noise([count], mechanism.scale)
    return Estimate(value=step * noised, error_95=step * quantile(mechanism.scale, 0.95))


def _counts(cells: IntVector, size: int) -> IntVector:
    return np.bincount(cells, minlength=size).astype(np.int64)


def _cells(query: QueryPlan, table: pa.Table) -> IntVector:
    """int64[N]: the index of each row's group, -1 where it has none."""
    if query.group_by is None:
        return np.zeros(table.num_rows, dtype=np.int64)
    column = table.column(query.group_by)
    if query.groups == BOOLEAN_VALUES and pa.types.is_boolean(column.type):
        column = pc.if_else(column, BOOLEAN_VALUES[1], BOOLEAN_VALUES[0])
    index = pc.index_in(column, value_set=pa.array(query.groups, pa.string()), skip_nulls=True)
    return np.asarray(pc.fill_null(index, -1).to_numpy(), dtype=np.int64)


def _lattice_values(column: pa.ChunkedArray, lattice: Lattice) -> tuple[IntVector, npt.NDArray[np.bool_]]:
    """(int64[N] within +-bound, bool[N] valid). A null, a NaN and an infinity are no values."""
    plain = np.asarray(pc.fill_null(pc.cast(column, pa.float64(), safe=False), np.nan).to_numpy(), dtype=np.float64)
    valid = np.isfinite(plain)
    with np.errstate(over="ignore"):
        steps = np.rint((np.where(valid, plain, lattice.centre) - lattice.centre) / lattice.step)
    return np.clip(steps, -lattice.bound, lattice.bound).astype(np.int64), valid
