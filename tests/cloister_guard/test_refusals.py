"""Refusals are rationed for each user; what is admitted never counts."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from cloister_data.base import Wire
from cloister_data.datasets import SplitRef
from cloister_data.errors import (
    BudgetRefusedError,
    CloisterError,
    NotFoundError,
    PolicyRefusedError,
    TooManyRequestsError,
)
from cloister_guard.identity import Caller
from cloister_guard.refusals import WINDOW_SECONDS, Refusals

ASKED = SplitRef(dataset="clinic/people")
ANN, BOB = Caller("ann", "scientist"), Caller("bob", "scientist")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def refuse(error: type[Exception] = PolicyRefusedError) -> None:
    raise error("No.")


async def noted(caller: Caller, request: Wire, error: CloisterError) -> None:
    """Nobody reads it here."""


async def admit() -> str:
    return "yes"


def outcome(work: Coroutine[Any, Any, object]) -> object:
    try:
        return asyncio.run(work)  # type: ignore[arg-type]
    except Exception as error:
        return type(error)


def test_the_next_refusal_after_the_limit_is_not_looked_at_until_a_minute_has_passed() -> None:
    clock = Clock()
    refusals = Refusals(3, noted, clock)
    errors: tuple[type[Exception], ...] = (PolicyRefusedError, BudgetRefusedError, PolicyRefusedError)
    for error in errors:
        clock.now += 1
        assert outcome(refusals.counted(ANN, ASKED, lambda error=error: refuse(error))) is error  # type: ignore[misc]
    looked_at: list[int] = []

    async def look() -> None:
        looked_at.append(1)

    assert outcome(refusals.counted(ANN, ASKED, look)) is TooManyRequestsError
    assert not looked_at
    assert outcome(refusals.counted(BOB, ASKED, admit)) == "yes"
    clock.now = 1 + WINDOW_SECONDS
    assert outcome(refusals.counted(ANN, ASKED, admit)) == "yes"
    assert outcome(refusals.counted(ANN, ASKED, refuse)) is PolicyRefusedError
    assert outcome(refusals.counted(ANN, ASKED, refuse)) is TooManyRequestsError


@pytest.mark.parametrize("work", [admit, lambda: refuse(NotFoundError)])
def test_answers_and_other_errors_do_not_count(work: Any) -> None:
    refusals = Refusals(2, noted, Clock())
    for _ in range(10):
        assert outcome(refusals.counted(ANN, ASKED, work)) in ("yes", NotFoundError)
