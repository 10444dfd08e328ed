"""Mistakes that the public schema shows, found before anything is sent. Pure; the guard checks everything again."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Sequence
from typing import NoReturn

from cloister_data.errors import InvalidRequestError
from cloister_data.schema import (
    BooleanColumn,
    CategoryColumn,
    Column,
    DateColumn,
    IntegerColumn,
    RealColumn,
    Schema,
    TensorColumn,
    TextColumn,
)

MAX_EPSILON = 1000.0
FREE = "Nothing was charged."

CLASS_LOSSES = ("cross_entropy", "binary_cross_entropy")
NUMBER_LOSSES = ("mse", "l1", "huber")
LOSSES = (*CLASS_LOSSES, *NUMBER_LOSSES)
OPTIMIZERS = ("sgd", "adam", "adamw")
METRICS = ("accuracy", "mse")
MAX_CLASSES = 4096


def check_epsilon(epsilon: object) -> float:
    """`epsilon` as a float in (0, 1000]. Raises InvalidRequestError."""
    if isinstance(epsilon, bool) or not isinstance(epsilon, numbers.Real):
        raise InvalidRequestError(
            f"epsilon must be a number, not {type(epsilon).__name__}.", next_step=f"For example epsilon=0.5. {FREE}"
        )
    value = float(epsilon)
    if not math.isfinite(value) or not 0 < value <= MAX_EPSILON:
        raise InvalidRequestError(
            f"epsilon must be above 0 and at most {MAX_EPSILON:g}, not {value}.",
            why="It bounds how much one person's data can change the answer.",
            next_step=f"Typical values are 0.1 to 2. {FREE}",
        )
    return value


def find_column(schema: Schema, name: object) -> Column:
    """The column called `name`, which may be asked about. Raises InvalidRequestError that names near misses."""
    if not isinstance(name, str):
        raise InvalidRequestError(
            f"A column's name is a string, not {type(name).__name__}.",
            why="A handle has no rows to pick from.",
            next_step=f'Write ds["{_choices(schema)[0] if _choices(schema) else "column"}"]. {FREE}',
        )
    column = schema.column(name)
    if column is None:
        near = difflib.get_close_matches(name, _choices(schema), n=3, cutoff=0.5)
        shown = ", ".join(repr(each) for each in _choices(schema)[:12])
        raise InvalidRequestError(
            f"There is no column {name!r}.",
            why=f"The schema declares {shown}{' and more' if len(_choices(schema)) > 12 else ''}.",
            next_step=(f"Did you mean {' or '.join(repr(each) for each in near)}? " if near else "") + FREE,
        )
    if name == schema.privacy_unit:
        raise InvalidRequestError(
            f"The column {name!r} can't be used.",
            why="It names the privacy unit: whose row it is.",
            next_step=f"Choose another column. {FREE}",
        )
    return column


def check_measured(column: Column, operation: str) -> None:
    """Raises InvalidRequestError where a sum or a mean has no meaning."""
    if operation == "count":
        return
    if not isinstance(column, IntegerColumn | RealColumn | BooleanColumn):
        raise InvalidRequestError(
            f"There is no {operation} of {column.name!r}: it is of type {column.type}.",
            next_step=f"Take an integer, real or boolean column, or count it. {FREE}",
        )


def check_group(column: Column) -> None:
    if not isinstance(column, CategoryColumn | BooleanColumn):
        raise InvalidRequestError(
            f"{column.name!r} can't be grouped by: it is of type {column.type}.",
            why="Groups must be public: they come from declared categories, never from the rows.",
            next_step=f"Group by a category or boolean column. {FREE}",
        )


def check_features(schema: Schema, features: object) -> tuple[str, ...]:
    """The features' names. Raises InvalidRequestError for none, doubles, and columns without an encoding."""
    if isinstance(features, str) or not isinstance(features, Sequence):
        raise InvalidRequestError(
            "features must be a list of column names.", next_step=f'For example features=["age", "weight"]. {FREE}'
        )
    names: list[str] = []
    for name in features:
        column = find_column(schema, name)
        if isinstance(column, TextColumn | TensorColumn):
            raise InvalidRequestError(
                f"{column.name!r} has no declared encoding as a feature: it is of type {column.type}.",
                why="Features must become numbers by the public schema alone.",
                next_step=f"Leave it out, or ask the owner to publish it as numbers or categories. {FREE}",
            )
        if column.name in names:
            raise InvalidRequestError(f"The feature {column.name!r} is named twice.", next_step=FREE)
        names.append(column.name)
    if not names:
        raise InvalidRequestError("No features were named.", next_step=f"Name at least one column. {FREE}")
    return tuple(names)


def feature_width(schema: Schema, features: Sequence[str]) -> int:
    """How many numbers one row becomes: one each, and one for every category of a category."""
    width = 0
    for name in features:
        column = find_column(schema, name)
        width += len(column.categories) if isinstance(column, CategoryColumn) else 1
    return width


def check_target(schema: Schema, target: object, features: Sequence[str], aim: str) -> str:
    """The target's name, once it fits the loss or metric `aim`. Raises InvalidRequestError."""
    column = find_column(schema, target)
    if column.name in features:
        raise InvalidRequestError(
            f"The target {column.name!r} is among the features.", next_step=f"Leave it out of the features. {FREE}"
        )
    if aim in NUMBER_LOSSES:
        if not isinstance(column, IntegerColumn | RealColumn | DateColumn):
            _refuse_target(column, aim, "numbers", "cross_entropy (metric: accuracy)")
        return column.name
    classes = _classes(column)
    if classes is None:
        _refuse_target(column, aim, "classes", "mse, l1 or huber")
    elif aim == "binary_cross_entropy" and classes != 2:
        raise InvalidRequestError(
            f"binary_cross_entropy can't predict {column.name!r}: it has {classes} classes.",
            next_step=f"Use cross_entropy, with a model of {classes} outputs. {FREE}",
        )
    return column.name


def check_choice(what: str, value: object, choices: Sequence[str]) -> str:
    if isinstance(value, str) and value in choices:
        return value
    raise InvalidRequestError(f"{what}={value!r} isn't known.", next_step=f"Choose one of {', '.join(choices)}. {FREE}")


def check_whole(what: str, value: object, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 1 <= int(value) <= most:
        raise InvalidRequestError(f"{what} must be a whole number from 1 to {most}, not {value!r}.", next_step=FREE)
    return int(value)


def check_number(what: str, value: object, most: float, *, zero: bool = False) -> float:
    """A finite number in (0, most], or [0, most] with `zero`."""
    good = not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(float(value))
    number = float(value) if good and isinstance(value, numbers.Real) else math.nan
    if not (number > 0 or (zero and number == 0)) or number > most:
        raise InvalidRequestError(
            f"{what} must be a number {'from' if zero else 'above'} 0 {'to' if zero else 'and at most'} {most:g}, "
            f"not {value!r}.",
            next_step=FREE,
        )
    return number


def _refuse_target(column: Column, aim: str, what: str, instead: str) -> NoReturn:
    raise InvalidRequestError(
        f"{aim} can't predict {column.name!r}: it is of type {column.type}.",
        why=f"{aim} is about {what}.",
        next_step=f"Use {instead}, or another target. {FREE}",
    )


def _classes(column: Column) -> int | None:
    match column:
        case CategoryColumn(categories=categories):
            return len(categories)
        case BooleanColumn():
            return 2
        case IntegerColumn(low=low, high=high) if high - low < MAX_CLASSES:
            return high - low + 1
    return None


def _choices(schema: Schema) -> list[str]:
    return [column.name for column in schema.columns if column.name != schema.privacy_unit]
