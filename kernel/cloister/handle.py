"""An opaque handle: the name of a dataset, or of a part of several. The rows are elsewhere and stay there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Literal, NoReturn, overload

from cloister import rendering
from cloister.accounts import Budget, fetch_budget
from cloister.checks import FREE, check_number, check_whole
from cloister.columns import COLUMN_HEADERS, column_rows, part_list
from cloister.connection import current
from cloister.job import Job
from cloister.question import ColumnHandle, Cost, GroupHandle, Question
from cloister.releases import Release
from cloister.training import Recipe, Rehearsal
from cloister_data import statistics as ask
from cloister_data.datasets import DatasetView, SplitRef
from cloister_data.errors import CloisterError, InvalidRequestError
from cloister_data.schema import BOOLEAN_VALUES, BooleanColumn, Schema

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

Side = Literal["all", "train", "test"]
SIDES: tuple[Side, Side] = ("train", "test")
MAX_SOURCES = 16
MAX_MOCK_ROWS = 1_000_000


class DatasetHandle:
    """A name to ask about, to train on and to evaluate on. There is nothing behind it to dig out.

    Made by `cloister.dataset`, `split`, `part` and `cloister.concat`.
    """

    def __init__(
        self, views: Sequence[DatasetView], side: Side = "all", test: float = 0.2, division: str | None = None
    ) -> None:
        self._views = tuple(views)
        self._side: Side = side
        self._test = test
        self._division = division

    @property
    def name(self) -> str:
        return " + ".join(view.name for view in self._views)

    @property
    def views(self) -> tuple[DatasetView, ...]:
        """What the owners publish: schema, units, policy; one for each dataset in the handle."""
        return self._views

    @property
    def schema(self) -> Schema:
        return self._views[0].data_schema

    @property
    def columns(self) -> tuple[str, ...]:
        """The names that may be asked about."""
        return tuple(column.name for column in self.schema.columns if column.name != self.schema.privacy_unit)

    @property
    def side(self) -> str:
        """Of a split: all, train or test."""
        # Not `Side`: of an object with a property annotated by a Literal, jedi (0.20) completes nothing at all.
        return self._side

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts into which the owner has divided the people, such as their sites; none where they aren't divided.

        A request to one part costs the people of the others nothing: see `part`. Of a part's own handle: that part.
        """
        if self._division is not None:
            return (self._division,)
        return tuple(part for part in self.schema.parts if all(part in view.data_schema.parts for view in self._views))

    @property
    def units(self) -> int:
        """The public number of privacy units in the datasets, or in this part of them, before any split."""
        if self._division is None:
            return sum(view.units for view in self._views)
        return sum(view.part_units[self._division] for view in self._views)

    @property
    def sources(self) -> tuple[SplitRef, ...]:
        return tuple(
            SplitRef(dataset=view.name, division=self._division, part=self._side, test=self._test)
            for view in self._views
        )

    @property
    def budget(self) -> Budget:
        """The accounts that requests to this handle charge, as they are now."""
        return fetch_budget(frozenset(view.population for view in self._views), part=self._division)

    def mock(self, rows: int = 100, seed: int = 0) -> pd.DataFrame:
        """Made-up rows from the public schema alone: right names, types and bounds, and nothing of the data. Free."""
        import pandas as pd

        from cloister_data.mock import mock_rows

        found = pd.DataFrame(mock_rows(self.schema, check_whole("rows", rows, MAX_MOCK_ROWS), seed))
        if self._division is not None:
            column = self.schema.column(str(self.schema.partition))
            boolean = isinstance(column, BooleanColumn)
            found[str(self.schema.partition)] = self._division == BOOLEAN_VALUES[1] if boolean else self._division
        return found

    def split(self, test: float = 0.2) -> tuple[DatasetHandle, DatasetHandle]:
        """(train, test). A keyed hash fixed at upload which unit is where: the same `test` splits the same way."""
        if self._side != "all":
            raise InvalidRequestError(
                f"This handle is the {self._side} part of a split already.",
                why="A part of a split can't be split again.",
                next_step="Split the whole dataset: cloister.dataset(NAME).split(test=...).",
            )
        fraction = check_number("test", test, 1.0)
        if fraction >= 1:
            raise InvalidRequestError("test must be below 1.", next_step="For example test=0.2.")
        train, test_set = (DatasetHandle(self._views, side, fraction, self._division) for side in SIDES)
        return train, test_set

    def part(self, name: str) -> DatasetHandle:
        """One part of the people, by a name among `parts`. A request to it charges the accounts of this part alone.

        Everybody is in one part, for good: so questions to every part cost nobody more than a question to one. The part
        of a joined handle is that part of each of its datasets.
        """
        if self._division is not None:
            raise InvalidRequestError(
                f"This handle is the part {self._division!r} already.",
                next_step=f"Take the part of the whole: cloister.dataset({self._views[0].name!r}).part(NAME). {FREE}",
            )
        if name not in self.parts:
            raise InvalidRequestError(
                f"{self.name} has no part {name!r}.",
                why=f"Its parts are {', '.join(map(repr, self.parts))}."
                if self.parts
                else "Its owner hasn't divided the people into parts.",
                next_step=(f"Name one of them. {FREE}" if self.parts else f"Use the handle as it is. {FREE}"),
            )
        return DatasetHandle(self._views, self._side, self._test, name)

    def __getitem__(self, name: str) -> ColumnHandle:
        return ColumnHandle(self._single, self.schema, name)

    def __iter__(self) -> NoReturn:
        raise InvalidRequestError(
            "A handle has no rows to go through: they never leave the cloister.",
            next_step="handle.columns lists the columns, handle.mock() makes rows up, "
            'handle["column"].mean(epsilon=...) asks.',
        )

    def __len__(self) -> NoReturn:
        raise InvalidRequestError(
            "A handle has no length.", next_step="handle.units is the public number of people in the whole datasets."
        )

    def __bool__(self) -> bool:
        return True

    def groupby(self, by: str) -> GroupHandle:
        """Questions for each declared category of the column `by`; a group without people is answered too."""
        return GroupHandle(self._single, self.schema, by)

    @overload
    def count(self, epsilon: float) -> Release: ...
    @overload
    def count(self, epsilon: None = None) -> Question: ...
    def count(self, epsilon: float | None = None) -> Release | Question:
        """How many units there are. Without epsilon: a Question, which costs nothing."""
        question = Question(ask.Question(source=self._single(), operation="count"))
        return question if epsilon is None else question.ask(epsilon)

    def train(
        self,
        model: nn.Module,
        *,
        features: Sequence[str],
        target: str,
        loss: str = "cross_entropy",
        optimizer: str = "adam",
        lr: float = 1e-3,
        epochs: int = 10,
        batch_size: int = 64,
        max_grad_norm: float = 1.0,
        epsilon: float | None = None,
        noise_multiplier: float | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> Job:
        """Train `model` (a torch.nn.Module) here with DP-SGD; the job runs in the cloister and survives this kernel.

        Features arrive as float32 in the order asked: numbers and dates scaled to [-1, 1] by their declared bounds,
        booleans as -1 and 1, categories one-hot. Give either `epsilon` or `noise_multiplier`; the whole cost is known
        and reserved before the first step, and what a cancelled job didn't run comes back.

        Args:
            loss: cross_entropy, binary_cross_entropy, mse, l1 or huber.
            optimizer: sgd, adam or adamw.
            batch_size: the EXPECTED size of a batch: each unit is in it with probability batch_size / units.
            max_grad_norm: C, to which each unit's gradient is clipped.
            noise_multiplier: sigma: the noise's standard deviation is sigma times C.

        Raises:
            InvalidRequestError, UnsupportedModelError, PolicyRefusedError, BudgetRefusedError: nothing was charged.
        """
        recipe = Recipe.checked(
            self.schema,
            self.sources,
            model,
            features=features,
            target=target,
            loss=loss,
            optimizer=optimizer,
            lr=lr,
            epochs=epochs,
            batch_size=batch_size,
            max_grad_norm=max_grad_norm,
            epsilon=epsilon,
            noise_multiplier=noise_multiplier,
            momentum=momentum,
            weight_decay=weight_decay,
            betas=betas,
        )
        return recipe.train(current())

    def rehearse(
        self,
        model: nn.Module,
        *,
        features: Sequence[str],
        target: str,
        loss: str = "cross_entropy",
        optimizer: str = "adam",
        lr: float = 1e-3,
        epochs: int = 10,
        batch_size: int = 64,
        max_grad_norm: float = 1.0,
        epsilon: float | None = None,
        noise_multiplier: float | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> Rehearsal:
        """`train` with the same arguments on mock rows: every mistake shows, nothing is charged. It tells the cost."""
        recipe = Recipe.checked(
            self.schema,
            self.sources,
            model,
            features=features,
            target=target,
            loss=loss,
            optimizer=optimizer,
            lr=lr,
            epochs=epochs,
            batch_size=batch_size,
            max_grad_norm=max_grad_norm,
            epsilon=epsilon,
            noise_multiplier=noise_multiplier,
            momentum=momentum,
            weight_decay=weight_decay,
            betas=betas,
        )
        return recipe.rehearse(current())

    def training_cost(
        self,
        model: nn.Module,
        *,
        features: Sequence[str],
        target: str,
        loss: str = "cross_entropy",
        epochs: int = 10,
        batch_size: int = 64,
        epsilon: float | None = None,
        noise_multiplier: float | None = None,
    ) -> Cost:
        """What `train` would cost, from public sizes alone; the model isn't run. Spends nothing."""
        recipe = Recipe.checked(
            self.schema,
            self.sources,
            model,
            features=features,
            target=target,
            loss=loss,
            epochs=epochs,
            batch_size=batch_size,
            epsilon=epsilon,
            noise_multiplier=noise_multiplier,
        )
        return recipe.cost(current())

    def evaluate(
        self,
        model: nn.Module,
        *,
        target: str,
        metric: str = "accuracy",
        epsilon: float,
        features: Sequence[str] | None = None,
    ) -> Release:
        """A metric of `model` on the rows of this handle, from one noised aggregate.

        `features` may be left out for a model that `Job.result` gave: it remembers them.
        """
        from cloister.training import evaluate

        return evaluate(current(), self.schema, self.sources, model, features, target, metric, epsilon)

    def _single(self) -> SplitRef:
        if len(self._views) > 1:
            raise InvalidRequestError(
                "A statistic is about one dataset, and this handle joins several.",
                next_step=f"Ask each by itself, for example cloister.dataset({self._views[0].name!r}). "
                "Nothing was charged.",
            )
        return self.sources[0]

    def __repr__(self) -> str:
        lines = [f"<DatasetHandle {self._title()}: opaque, the rows stay in the cloister>"]
        lines += [f"  {key}: {rendering.one_line(value)}" for key, value in self._facts()]
        table = rendering.text_table(COLUMN_HEADERS, column_rows(self.schema))
        budget = self._budget_or_reason()
        return "\n".join([*lines, "", table, "", budget if isinstance(budget, str) else repr(budget)])

    def _repr_html_(self) -> str:
        facts = rendering.html_table(("", ""), [[key, value] for key, value in self._facts()])
        table = rendering.html_table(COLUMN_HEADERS, column_rows(self.schema))
        budget = self._budget_or_reason()
        shown = f"<p>{escape(budget)}</p>" if isinstance(budget, str) else budget._repr_html_()
        details = f"<details open><summary>{len(self.columns)} columns</summary>{table}</details>"
        return rendering.html_box(f"{self._title()} (opaque: the rows stay in the cloister)", facts + details + shown)

    @property
    def _rows(self) -> tuple[Side, float, str | None]:
        """Which rows of each dataset."""
        return self._side, self._test, self._division

    def _title(self) -> str:
        part = "" if self._division is None else f", part {self._division}"
        return f"{self.name}{part}" + ("" if self._side == "all" else f", {self._side} part (test={self._test:g})")

    def _facts(self) -> list[tuple[str, str]]:
        facts = []
        for view in self._views:
            prefix = f"{view.name}: " if len(self._views) > 1 else ""
            expires = "no end" if view.expires is None else f"until {rendering.day(view.expires)}"
            facts += [
                (f"{prefix}owner", f"{view.owner}, version {view.version}, {view.units} people ({view.population})"),
                *([(f"{prefix}parts", part_list(view))] if view.part_units else []),
                (
                    f"{prefix}policy",
                    f"{', '.join(view.operations)}; one request at most epsilon {view.epsilon_cap:g}; {expires}",
                ),
            ]
            prevented = "prevented by the owner's witness" if view.witness else "not prevented"
            facts.append((f"{prefix}rollback", prevented + (". LOCKED: it is silent" if view.locked else "")))
            if view.simulated:
                facts.append((f"{prefix}hardware", "SIMULATED: not for real data"))
        if self.schema.description:
            facts.append(("about", self.schema.description))
        return facts

    def _budget_or_reason(self) -> Budget | str:
        """A repr must not fail where the cloister can't be reached."""
        try:
            return self.budget
        except CloisterError as error:
            return f"Budget unknown at the moment: {error.what}"


def concat(handles: Iterable[DatasetHandle]) -> DatasetHandle:
    """Several owners' data as one handle to train and evaluate on. Every owner's accounts are charged the full loss.

    The datasets must have the same columns, and be about different people; a part joins parts of the same name. Raises
    InvalidRequestError.
    """
    parts = list(handles)
    if not parts or not all(isinstance(each, DatasetHandle) for each in parts):
        raise InvalidRequestError(
            "concat takes a list of dataset handles.",
            next_step="For example cloister.concat([hospital_a, hospital_b]).",
        )
    first = parts[0]
    views = [view for each in parts for view in each.views]
    names = [view.name for view in views]
    if len(set(names)) != len(names):
        raise InvalidRequestError("A dataset is in there twice.", next_step="Name each dataset once.")
    if len(views) > MAX_SOURCES:
        raise InvalidRequestError(f"At most {MAX_SOURCES} datasets can be joined, not {len(views)}.")
    if any(each._rows != first._rows for each in parts):
        raise InvalidRequestError(
            "The handles are different parts.",
            why=f"They are {', '.join(each._title() for each in parts)}.",
            next_step="Join train parts with train parts, split with the same test=..., and parts of the same name.",
        )
    for each in parts[1:]:
        if each.schema.columns != first.schema.columns:
            raise InvalidRequestError(
                f"{each.name} and {first.name} don't have the same schema.",
                why=_difference(first.schema, each.schema),
                next_step="Only datasets with the same declared columns can be used as one.",
            )
    return DatasetHandle(views, *first._rows)


def _difference(first: Schema, second: Schema) -> str:
    for mine, other in zip(first.columns, second.columns, strict=False):
        if mine != other:
            return f"They differ first at the columns {mine.name!r} and {other.name!r}."
    return f"They have {len(first.columns)} and {len(second.columns)} columns."
