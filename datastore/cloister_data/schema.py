"""A dataset's public schema: what each column may hold, declared by the owner before anybody looks.

Bounds and categories are public and never derived from the rows. A value outside them is refused at upload.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cloister_data.base import Label, Text, Wire

MAX_COLUMNS = 4096
MAX_CATEGORIES = 4096
MAX_PARTS = 16
BOOLEAN_VALUES = ("false", "true")
"""What a boolean column's values are called where they name groups or parts."""


class _Column(Wire):
    name: Label
    description: Text = ""
    nullable: bool = False


class IntegerColumn(_Column):
    """Whole numbers in [low, high]."""

    type: Literal["integer"] = "integer"
    low: int = Field(ge=-(2**53), le=2**53)
    high: int = Field(ge=-(2**53), le=2**53)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError("low must be below high")
        return self


class RealColumn(_Column):
    """Real numbers in [low, high]."""

    type: Literal["real"] = "real"
    low: float = Field(ge=-1e15, le=1e15)
    high: float = Field(ge=-1e15, le=1e15)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError("low must be below high")
        return self


class CategoryColumn(_Column):
    """One of the declared values, compared as text."""

    type: Literal["category"] = "category"
    categories: tuple[Label, ...] = Field(min_length=2, max_length=MAX_CATEGORIES)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.categories)) != len(self.categories):
            raise ValueError("categories must differ")
        return self


class BooleanColumn(_Column):
    type: Literal["boolean"] = "boolean"


class DateColumn(_Column):
    """A calendar day in [low, high], ISO 8601."""

    type: Literal["date"] = "date"
    low: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    high: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        # Raises ValueError for what is no day.
        if datetime.date.fromisoformat(self.low) >= datetime.date.fromisoformat(self.high):
            raise ValueError("low must be before high")
        return self


class TextColumn(_Column):
    """UTF-8 text of at most max_bytes bytes."""

    type: Literal["text"] = "text"
    max_bytes: int = Field(ge=1, le=1 << 20)


class TensorColumn(_Column):
    """A dense array of fixed shape, values in [low, high]."""

    type: Literal["tensor"] = "tensor"
    shape: tuple[Annotated[int, Field(ge=1, le=1 << 16)], ...] = Field(min_length=1, max_length=4)
    dtype: Literal["uint8", "int16", "float32"]
    low: float = Field(ge=-1e15, le=1e15)
    high: float = Field(ge=-1e15, le=1e15)


Column = Annotated[
    IntegerColumn | RealColumn | CategoryColumn | BooleanColumn | DateColumn | TextColumn | TensorColumn,
    Field(discriminator="type"),
]


class Schema(Wire):
    """The columns in their order, and which of them names the privacy unit.

    `privacy_unit` is the column whose value says whose row it is; None says that each row is a unit of its own. The
    unit's column is never a feature, a target or a group.

    `partition` is a category or boolean column that divides the units for good, such as their site or country: a
    request about one part costs the units of the others nothing. Declaring it says in public how many units each part
    has, that nobody ever changes their part, and that which part somebody is in isn't protected.
    """

    description: Text = ""
    privacy_unit: Label | None = None
    partition: Label | None = None
    columns: tuple[Column, ...] = Field(min_length=1, max_length=MAX_COLUMNS)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [column.name for column in self.columns]
        if len(set(names)) != len(names):
            raise ValueError("two columns have the same name")
        if self.privacy_unit is not None and self.privacy_unit not in names:
            raise ValueError("privacy_unit names no column")
        if self.partition is not None:
            self._check_partition(self.column(self.partition))
        return self

    def _check_partition(self, column: Column | None) -> None:
        if self.privacy_unit is None:
            raise ValueError("a partition needs a privacy_unit: nobody may be in two parts")
        if column is None:
            raise ValueError("partition names no column")
        if column.name == self.privacy_unit or not isinstance(column, CategoryColumn | BooleanColumn):
            raise ValueError("the partition must be a category or boolean column")
        if column.nullable:
            raise ValueError("the partition must not be nullable: everybody is in a part")
        if isinstance(column, CategoryColumn) and len(column.categories) > MAX_PARTS:
            raise ValueError(f"a partition has at most {MAX_PARTS} parts")

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that the partition divides the units into, as declared; none without a partition."""
        column = None if self.partition is None else self.column(self.partition)
        if column is None:
            return ()
        return column.categories if isinstance(column, CategoryColumn) else BOOLEAN_VALUES

    def column(self, name: str) -> Column | None:
        return next((column for column in self.columns if column.name == name), None)
