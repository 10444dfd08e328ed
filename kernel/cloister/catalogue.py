"""What there is to work on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from cloister import rendering
from cloister.connection import current
from cloister.handle import DatasetHandle
from cloister_data.datasets import DatasetList, DatasetView
from cloister_data.errors import InvalidRequestError, NotFoundError

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}/[a-z0-9][a-z0-9._-]{0,62}")


class Catalogue(Sequence[DatasetHandle]):
    """The datasets that are open to you."""

    def __init__(self, views: Iterable[DatasetView]) -> None:
        self._views = tuple(views)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(view.name for view in self._views)

    @overload
    def __getitem__(self, index: int) -> DatasetHandle: ...
    @overload
    def __getitem__(self, index: slice) -> Catalogue: ...
    def __getitem__(self, index: int | slice) -> DatasetHandle | Catalogue:
        if isinstance(index, slice):
            return Catalogue(self._views[index])
        return DatasetHandle([self._views[index]])

    def __iter__(self) -> Iterator[DatasetHandle]:
        return (DatasetHandle([view]) for view in self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __repr__(self) -> str:
        return rendering.text_table(_HEADERS, self._rows()) if self else _EMPTY

    def _repr_html_(self) -> str:
        return rendering.html_table(_HEADERS, self._rows()) if self else f"<p>{_EMPTY}</p>"

    def _rows(self) -> list[list[str]]:
        return [
            [
                view.name,
                view.owner,
                str(view.units),
                str(len(view.data_schema.columns)),
                ", ".join(view.operations),
                f"{view.limit.epsilon:g}",
                f"{view.epsilon_cap:g}",
                view.data_schema.description,
            ]
            for view in self._views
        ]


_HEADERS = ("dataset", "owner", "people", "columns", "open for", "your limit (epsilon)", "one request", "about")
_EMPTY = "No dataset is open to you here. An owner's policy must name you."


def datasets() -> Catalogue:
    """The datasets that are open to you, as a table."""
    return Catalogue(current().call("GET", "/datasets", None, DatasetList).datasets)


def dataset(name: str) -> DatasetHandle:
    """An opaque handle to the dataset `owner/name`.

    Raises NotFoundError (also where you may not see it), InvalidRequestError for something that is no name.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequestError(
            f"{name!r} isn't a dataset's name.", next_step="Names are owner/name; cloister.datasets() lists them."
        )
    try:
        view = current().call("GET", f"/datasets/{name}", None, DatasetView)
    except NotFoundError as error:
        near = difflib.get_close_matches(name, datasets().names, n=1, cutoff=0.6)
        if near:
            raise NotFoundError(error.what, why=error.why, next_step=f"Did you mean {near[0]!r}?") from error
        raise
    return DatasetHandle([view])
