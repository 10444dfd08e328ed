"""The owner's statement that a new population's people are others than those of the owner's other populations.

Accounts belong to people, not to files: without this statement, the same people under another name would get a fresh
budget. Whoever signs it says so; the guard can't look whether it is true. Pure.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, Self

from pydantic import Field, model_validator

from cloister_data.base import DatasetName, Wire
from cloister_data.errors import InvalidRequestError

POPULATION_LABEL = b"cloister/population/v1\n"
"""What the owner signs is this label followed by the document's bytes."""

MAX_OTHERS = 1000
"""How many populations one statement names: an owner has at most one more."""


class PopulationStatement(Wire):
    """What the owner signs. `disjoint_from` are ALL of the owner's populations at that moment, sorted."""

    format: Literal[1] = 1
    population: DatasetName
    disjoint_from: tuple[DatasetName, ...] = Field(min_length=1, max_length=MAX_OTHERS)
    says: Literal["Nobody in this population is in any of the others."] = (
        "Nobody in this population is in any of the others."
    )

    @model_validator(mode="after")
    def _sorted(self) -> Self:
        if list(self.disjoint_from) != sorted(set(self.disjoint_from)) or self.population in self.disjoint_from:
            raise ValueError("the other populations must be sorted, each once, and without the new one")
        return self


class SignedStatement(Wire):
    """A statement's JSON bytes and the owner's Ed25519 signature (64 bytes) over `POPULATION_LABEL + document`."""

    document: bytes = Field(max_length=1 << 18)
    signature: bytes = Field(min_length=64, max_length=64)


def statement_about(population: str, known: Collection[str]) -> PopulationStatement:
    """The one statement that opens `population` beside the `known` ones, which are all of its owner's and at least one.

    The owner signs it, and the guard accepts no other. Raises InvalidRequestError where there are too many already.
    """
    if len(known) > MAX_OTHERS:
        raise InvalidRequestError(
            f"{population} would be one population too many.",
            why=f"An owner has at most {MAX_OTHERS + 1}.",
            next_step="Name one that is there, if these are its people: --population NAME.",
        )
    return PopulationStatement(population=population, disjoint_from=tuple(sorted(known)))
