"""What was paid for: noised numbers with their error, their cost and their receipt."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, overload

from cloister import receipts, rendering
from cloister.connection import current
from cloister_data import release as wire
from cloister_data.accounts import ChargeView
from cloister_data.errors import InvalidRequestError
from cloister_data.mechanism import DiscreteLaplace
from cloister_data.statistics import Estimate

if TYPE_CHECKING:
    import pandas as pd

NOISED = "noised for privacy"
BASE_ALPHA = 0.05
"""`Estimate.error_95` holds with probability 1 - BASE_ALPHA."""


class Release:
    """One answer that was paid for. Its numbers are noised; the error that the noise makes is public.

    Attributes:
        id, kind, title: which release, of what.
        charge: what it cost: `epsilon` at `delta`, and the accounts that paid.
        receipt: the proof, to be kept: sources, mechanism, log leaf, signed checkpoint.
    """

    def __init__(self, message: wire.Release) -> None:
        self._message = message

    @property
    def id(self) -> str:
        return self._message.release

    @property
    def kind(self) -> str:
        return self._message.kind

    @property
    def title(self) -> str:
        return self._message.title

    @property
    def charge(self) -> ChargeView:
        return self._message.charge

    @property
    def receipt(self) -> wire.Receipt:
        return self._message.receipt

    def save_receipt(self, path: str | Path) -> None:
        """Write the receipt, with the evidence behind it, to a file that `cloister audit verify` checks offline."""
        receipts.save(receipts.fetch(current(), self.receipt), Path(path))

    @property
    def epsilon(self) -> float:
        """The release's own tight epsilon, at `receipt.delta`."""
        return self._message.receipt.epsilon

    @property
    def value(self) -> float | dict[str, float]:
        """The noised number, or one for each group. Raises InvalidRequestError for a trained model."""
        return self._shaped([estimate.value for estimate in self._estimates()])

    @property
    def error(self) -> float | dict[str, float]:
        """By how much the noise moved each number, at most, with probability .95."""
        return self._shaped([estimate.error_95 for estimate in self._estimates()])

    def interval(self, alpha: float = BASE_ALPHA) -> tuple[float, float] | dict[str, tuple[float, float]]:
        """(low, high): where the number without noise lies, with probability 1 - alpha, for each group alone.

        It speaks of the noise only: what a sample says of the world beyond it comes on top. Quantiles of the discrete
        Laplace distribution; for means over a noised count (groups, nullable columns) alpha below .05 isn't offered.
        """
        factor = self._widening(alpha)
        pairs = [
            (estimate.value - factor * estimate.error_95, estimate.value + factor * estimate.error_95)
            for estimate in self._estimates()
        ]
        if self._grouped:
            return {str(each.group): pair for each, pair in zip(self._estimates(), pairs, strict=True)}
        return pairs[0]

    def to_pandas(self) -> pd.DataFrame:
        """One row for each number: value, and the ends of its 95% interval."""
        import pandas as pd

        estimates = self._estimates()
        return pd.DataFrame(
            {
                "value": [each.value for each in estimates],
                "low": [each.value - each.error_95 for each in estimates],
                "high": [each.value + each.error_95 for each in estimates],
            },
            index=pd.Index([each.group or self.title for each in estimates], name="group"),
        )

    def __float__(self) -> float:
        value = self.value
        if isinstance(value, dict):
            raise InvalidRequestError("This release holds a number for each group.", next_step="Use .value[GROUP].")
        return value

    @property
    def _grouped(self) -> bool:
        estimates = self._message.estimates
        return len(estimates) > 1 or any(each.group is not None for each in estimates)

    def _estimates(self) -> tuple[Estimate, ...]:
        if not self._message.estimates:
            raise InvalidRequestError(
                f"This release is a {self.kind}: it holds no numbers.",
                next_step="Take the job that made it from cloister.jobs(), then job.result().",
            )
        return self._message.estimates

    def _shaped(self, numbers: list[float]) -> float | dict[str, float]:
        if self._grouped:
            return {str(each.group): number for each, number in zip(self._estimates(), numbers, strict=True)}
        return numbers[0]

    def _widening(self, alpha: float) -> float:
        """What `error_95` is multiplied by for another confidence."""
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1:
            raise InvalidRequestError(
                f"alpha must be between 0 and 1, not {alpha!r}.", next_step="alpha=0.05 gives a 95% interval."
            )
        if alpha == BASE_ALPHA:
            return 1.0
        mechanism = self.receipt.mechanism
        if isinstance(mechanism, DiscreteLaplace):
            base = laplace_quantile(mechanism.scale, BASE_ALPHA)
            return laplace_quantile(mechanism.scale, alpha) / base if base else 1.0
        if alpha < BASE_ALPHA:
            raise InvalidRequestError(
                "No interval above 95% is known for this release.",
                why="Its numbers are ratios of two noised numbers, whose error is bounded at 95%.",
                next_step="Use alpha=0.05 or more.",
            )
        # The bound is convex in the noise's size: scaling it down keeps it a bound.
        return math.log(2 / alpha) / math.log(2 / BASE_ALPHA)

    def __repr__(self) -> str:
        cost = f"epsilon {rendering.figure(self.epsilon)} at delta {self.receipt.delta:g}"
        if not self._message.estimates:
            return f"<Release: {rendering.one_line(self.title)}; {cost}>"
        if not self._grouped:
            estimate = self._message.estimates[0]
            return (
                f"<Release: {rendering.one_line(self.title)} = {_number(estimate.value, estimate.error_95)} "
                f"\N{PLUS-MINUS SIGN} {rendering.figure(estimate.error_95)} (95%), {NOISED}; {cost}>"
            )
        table = rendering.text_table(["group", "value", "\N{PLUS-MINUS SIGN} (95%)"], self._rows())
        return f"Release: {rendering.one_line(self.title)}, {NOISED}; {cost}\n{table}"

    def _repr_html_(self) -> str:
        cost = f"epsilon {rendering.figure(self.epsilon)} at delta {self.receipt.delta:g}"
        simulated = " SIMULATED hardware." if self.receipt.simulated else ""
        note = f"<p><small>{NOISED}; cost {cost}; rollback {self.receipt.rollback}.{simulated}</small></p>"
        if not self._message.estimates:
            return rendering.html_box(self.title, note)
        table = rendering.html_table(["group", "value", "\N{PLUS-MINUS SIGN} (95%)"], self._rows())
        return rendering.html_box(self.title, table + note)

    def _rows(self) -> list[list[str]]:
        return [
            [each.group or "all", _number(each.value, each.error_95), rendering.figure(each.error_95)]
            for each in self._message.estimates
        ]


class History(Sequence[Release]):
    """Releases, oldest first. `withheld` more were paid, and wait for their data's owner."""

    def __init__(self, releases: Iterable[Release], withheld: int = 0) -> None:
        self._releases = tuple(releases)
        self.withheld = withheld

    @overload
    def __getitem__(self, index: int) -> Release: ...
    @overload
    def __getitem__(self, index: slice) -> History: ...
    def __getitem__(self, index: int | slice) -> Release | History:
        return History(self._releases[index]) if isinstance(index, slice) else self._releases[index]

    def __iter__(self) -> Iterator[Release]:
        return iter(self._releases)

    def __len__(self) -> int:
        return len(self._releases)

    def __repr__(self) -> str:
        shown = rendering.text_table(_HEADERS, self._rows()) if self else "Nothing was released to you yet."
        return f"{shown}\n{self._waiting()}" if self.withheld else shown

    def _repr_html_(self) -> str:
        waiting = f"<p><small>{self._waiting()}</small></p>" if self.withheld else ""
        if not self:
            return f"<p>Nothing was released to you yet.</p>{waiting}"
        return rendering.html_box("Releases", rendering.html_table(_HEADERS, self._rows()) + waiting)

    def _waiting(self) -> str:
        return f"{self.withheld} more are paid, and wait for the witness of their data's owner."

    def _rows(self) -> list[list[str]]:
        return [
            [
                str(at),
                datetime.fromtimestamp(each.receipt.issued, UTC).strftime("%Y-%m-%d %H:%M"),
                each.title,
                _summary(each),
                rendering.figure(each.epsilon),
            ]
            for at, each in enumerate(self._releases)
        ]


_HEADERS = ("", "when (UTC)", "what", "value (noised)", "epsilon")


def history() -> History:
    """Everything that you have paid for, fetched again free of charge."""
    found = current().call("GET", "/releases", None, wire.ReleaseList)
    return History((Release(message) for message in found.releases), found.withheld)


def laplace_quantile(scale: float, alpha: float) -> int:
    """The smallest t with P(|X| > t) <= alpha where P(X = k) ~ exp(-|k|/scale): P(|X| > t) = 2 r^(t+1) / (1 + r)."""
    rate = -math.expm1(-1 / scale)
    ratio = 1 - rate
    if 2 * ratio / (1 + ratio) <= alpha:
        return 0
    return max(0, math.ceil(scale * math.log(2 / ((1 + ratio) * alpha))) - 1)


def _number(value: float, error: float) -> str:
    """`value` with digits down to its error's second one."""
    if error <= 0 or not math.isfinite(error):
        return rendering.figure(value)
    digits = min(12, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{digits}f}"


def _summary(release: Release) -> str:
    estimates = release._message.estimates
    if not estimates:
        return "model"
    if len(estimates) > 1:
        return f"{len(estimates)} numbers"
    value, error = estimates[0].value, estimates[0].error_95
    return f"{_number(value, error)} \N{PLUS-MINUS SIGN} {rendering.figure(error)}"
