"""The SDK's handles: whether there is anything behind them, and whether another name opens another door."""

from __future__ import annotations

import contextlib
import gc
import os
from typing import Any

from tests.attack.battery.files import read
from tests.attack.battery.registry import Given, Stopped, attack, find_mark, first


def _handle(name: str) -> Any:
    import cloister

    return cloister.dataset(name)


def _refused(act: Any) -> str:
    """What `act` gives, as text. Raises Stopped with the SDK's error."""
    from cloister_data.errors import CloisterError

    try:
        return repr(act())[:200]
    except CloisterError as error:
        raise Stopped(f"{error.code}") from None


@attack("handles: another user's, guessed and outlandish names", proof="seen", bare=False)
def names(given: Given) -> str:
    victim = given["victim"]["dataset"]
    owner, name = victim.split("/")
    tries = [
        victim,
        victim.upper(),
        f"{owner}/../{victim}",
        f"../{name}",
        "../../etc/passwd",
        f"{given['own_dataset']}/../{name}",
        f"{owner}%2f{name}",
        f"{victim}?x",
        f"{victim}#",
        f" {victim}",
        f"{victim}\n",
        "",
        "*/*",
        f"{owner}/*",
        "__class__/__dict__",
    ]

    def reach(text: str) -> str:
        found = _refused(lambda: _handle(text).views)
        return f"{text!r} opened: {found}"

    return first([lambda t=text: reach(t) for text in tries])  # type: ignore[misc]


@attack("handles: a handle whose private attributes are changed", proof="seen", bare=False)
def changed(given: Given) -> str:
    """A name is all that it is: with another one the guard is asked about another dataset, and refuses."""
    handle = _handle(given["own_dataset"])
    view = handle._views[0]
    forged = type(handle)((view.model_copy(update={"name": given["victim"]["dataset"]}),))
    return _refused(lambda: forged["value"].mean(epsilon=0.01))


@attack("handles: what __dict__, __reduce__, slots and referents hold", bare=False, seconds=20)
def dug_out(given: Given) -> str:
    """Everything that can be reached from a handle, a question and an answer, a quarter of a million objects deep."""
    handle = _handle(given["own_dataset"])
    answer = handle["value"].mean(epsilon=0.01)
    seen: set[int] = set()
    waiting: list[Any] = [handle, handle["value"], answer, handle.__reduce_ex__(2), vars(handle)]
    while waiting and len(seen) < 250_000:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, str | bytes):
            text = one.encode() if isinstance(one, str) else one
            if given["rows_mark"].encode() in text:
                return find_mark(text, "a handle's depths", given["rows_mark"])
        waiting += [found for found in gc.get_referents(one) if not isinstance(found, type(os))]
    raise Stopped(f"{len(seen)} objects hold no row")


@attack("handles: rows in the kernel's own memory", bare=False, seconds=20)
def own_memory(given: Given) -> str:
    """After an answer: every page that the process may read."""
    _handle(given["own_dataset"])["value"].mean(epsilon=0.01)
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    searched = 0
    for line in read("/proc/self/maps").splitlines():
        words = line.split()
        low, high = (int(word, 16) for word in words[0].split(b"-"))
        if words[1][:2] != b"rw" or high - low > 256 << 20:
            continue
        with contextlib.suppress(OSError, Stopped):
            page = os.pread(memory, high - low, low)
            searched += len(page)
            return find_mark(page, "memory", given["rows_mark"])
    raise Stopped(f"{searched >> 20} MiB hold no row")


@attack("handles: a mock that holds real rows", bare=False, seconds=20)
def mock(given: Given) -> str:
    """`mock()` is made from the schema alone (without pandas, which would cost more than it proves)."""
    from cloister_data.mock import mock_rows

    rows = mock_rows(_handle(given["own_dataset"]).schema, 200, 0)
    return find_mark(repr(rows).encode(), "the mock", given["rows_mark"])


@attack("handles: one person isolated by a question", proof="seen", bare=False)
def isolated(given: Given) -> str:
    """Parts that aren't declared, grouping by the unit, a price of nothing: the SDK and the guard refuse."""
    handle = _handle(given["own_dataset"])
    return first(
        [
            lambda: _refused(lambda: handle.groupby("unit")["value"].mean(epsilon=0.01)),
            lambda: _refused(lambda: handle["unit"].mean(epsilon=0.01)),
            lambda: _refused(lambda: handle.part("7")),
            lambda: _refused(lambda: handle["note"].mean(epsilon=0.01)),
            lambda: _refused(lambda: handle["value"].mean(epsilon=0)),
            lambda: _refused(lambda: handle["value"].mean(epsilon=-1)),
            lambda: _refused(lambda: handle["value"].mean(epsilon=float("nan"))),
            lambda: _refused(lambda: handle["value"].mean(epsilon=float("inf"))),
        ]
    )


@attack("handles: an answer without noise", proof="seen", bare=False)
def exact(given: Given) -> str:
    """The true mean is told to nobody, whatever epsilon is asked within the policy's cap."""
    answer = _handle(given["own_dataset"])["value"].mean(epsilon=0.01)
    if answer.value == given["true_mean"]:
        return "the exact mean"
    again = _handle(given["own_dataset"])["value"].mean(epsilon=0.01)
    if again.value == answer.value:
        return "the same noise twice"
    raise Stopped("noise, and other noise the second time")


@attack("handles: markup in what the SDK shows of a name", proof="seen", bare=False)
def markup(given: Given) -> str:
    """Its own output is the user's own affair; what the SDK adds must be escaped."""
    handle = _handle(given["own_dataset"])
    view = handle._views[0]
    forged = type(handle)((view.model_copy(update={"name": "<script>alert(1)</script>"}),))
    shown = forged._repr_html_()
    if "<script>" in shown:
        return "a script in _repr_html_"
    raise Stopped("escaped")
