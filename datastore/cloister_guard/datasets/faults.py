"""What is wrong with an upload, in words for its owner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cloister_data.errors import InvalidRequestError

SHOWN_ROWS = 5
SHOWN_FAULTS = 10


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with one column; `rows` are indexes from 0."""

    column: str
    message: str
    rows: npt.NDArray[np.int64]


def row_list(rows: Sequence[int] | npt.NDArray[np.int64]) -> str:
    """Rows counted from 1, the first few by number: "rows 3, 7 and 12 more"."""
    shown = ", ".join(str(int(row) + 1) for row in rows[:SHOWN_ROWS])
    more = len(rows) - SHOWN_ROWS
    return f"row{'s' if len(rows) > 1 else ''} {shown}{f' and {more} more' if more > 0 else ''}"


def refuse(faults: Sequence[Fault]) -> InvalidRequestError:
    """One error for all the faults of an upload."""
    lines = [f"{fault.column!r} {fault.message} in {row_list(fault.rows)}" for fault in faults[:SHOWN_FAULTS]]
    if len(faults) > SHOWN_FAULTS:
        lines.append(f"{len(faults) - SHOWN_FAULTS} more faults")
    return InvalidRequestError(
        f"The upload doesn't fit its schema: {'; '.join(lines)}.",
        why="Every value must lie inside what the schema declares, because the declared bounds decide the noise.",
        next_step="Nothing was stored. Correct the file or the declaration, and upload again.",
    )
