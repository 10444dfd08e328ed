"""The turn of an errand among a notebook's cells, and what a kernel's messages can do about it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable

from cloister.errands import METADATA, Outcome
from cloister_kernel import errands
from cloister_kernel.errands import Errands
from cloister_kernel.signing import DELIMITER

Parts = tuple[bytes, ...]


def message(kind: str, content: object, name: str = "1", parent: str = "", metadata: object = None) -> Parts:
    head = json.dumps({"msg_id": name, "msg_type": kind}).encode()
    above = json.dumps({"msg_id": parent} if parent else {}).encode()
    return (b"id", DELIMITER, b"", head, above, json.dumps(metadata or {}).encode(), json.dumps(content).encode())


def cell(code: str, name: str, **more: object) -> Parts:
    return message("execute_request", {"code": code, **more}, name)


def reply(parent: str, status: str = "ok") -> Parts:
    return message("execute_reply", {"status": status}, "r", parent)


def outcome(parts: Parts) -> Outcome:
    return Outcome.from_json(json.dumps(json.loads(parts[5])[METADATA]))


class Log:
    """A carry_out that writes down what it was told to do."""

    def __init__(self, wait: threading.Event | None = None) -> None:
        self.lines: list[str] = []
        self.shown: list[str] = []
        self.seen = asyncio.Event()
        self._wait = wait

    def __call__(self, line: str, show: Callable[[str], None], cancelled: threading.Event) -> Outcome:
        self.lines.append(line)
        show("half")
        if self._wait is not None:
            self._wait.wait(10)
        return Outcome(kind="put", told="done")

    async def show(self, _cell: bytes, text: str) -> None:
        self.shown.append(text)
        self.seen.set()


def test_a_kernels_messages_carry_nothing_out() -> None:
    async def scenario() -> None:
        log = Log()
        found = Errands(log, log.show)
        for each in (cell("%cloister put a", "9"), reply("9"), message("input_request", {"code": "%cloister put a"})):
            found.answered(each)
        await asyncio.sleep(0.05)
        assert log.lines == []
        passed = await found.in_turn(cell("%cloister put a", "1"))  # the control
        assert (log.lines, log.shown, outcome(passed).told) == (["%cloister put a"], ["half"], "done")
        assert passed[:5] == cell("%cloister put a", "1")[:5]

    asyncio.run(scenario())


def test_other_messages_pass_as_they_are() -> None:
    async def scenario() -> None:
        log = Log()
        found = Errands(log, log.show)
        huge = cell("%cloister put a", "4", user_expressions={"x": "y" * errands.MAX_REQUEST})
        others = [
            message("comm_msg", {"code": "%cloister put a"}),
            message("complete_request", {"code": "%cloister put a"}),
            cell("%cloister put a\n1", "2"),
            cell("%cloister status", "3"),
            huge,
            (b"id", DELIMITER, b"", b"[" * 10_000, b"", b"\xff", b"not json"),
        ]
        for each in others:
            assert await found.in_turn(each) == each
            found.answered(each)
        assert log.lines == []
        assert await Errands(None, log.show).in_turn(cell("%cloister put a", "5")) == cell("%cloister put a", "5")

    asyncio.run(scenario())


def test_an_errand_waits_for_the_cells_before_it() -> None:
    async def scenario() -> None:
        log = Log()
        found = Errands(log, log.show)
        for name in ("1", "2"):
            await found.in_turn(cell("x", name))
        waiting = asyncio.create_task(found.in_turn(cell("%cloister put a", "3")))
        found.answered(reply("1"))
        found.answered(reply("unknown"))
        await asyncio.sleep(0.05)
        assert (log.lines, waiting.done()) == ([], False)
        found.answered(reply("2"))
        assert outcome(await waiting).told == "done"
        # After a cell that failed nothing is moved, unless that cell says that failing is all right.
        for stops, moved in ((True, 1), (False, 2)):
            found.answered(reply("3"))
            await found.in_turn(cell("x", "4", stop_on_error=stops))
            waiting = asyncio.create_task(found.in_turn(cell("%cloister put a", "3")))
            await asyncio.sleep(0)
            found.answered(reply("4", "error"))
            assert (outcome(await waiting).problem is None) == (not stops)
            assert len(log.lines) == moved

    asyncio.run(scenario())


def test_an_interrupt_ends_the_wait_and_the_work() -> None:
    async def scenario() -> None:
        going_on = threading.Event()
        log = Log(going_on)
        found = Errands(log, log.show)
        assert found.cancel() is False
        await found.in_turn(cell("x", "1"))
        waiting = asyncio.create_task(found.in_turn(cell("%cloister put a", "2")))
        await asyncio.sleep(0)
        assert found.cancel() is False  # the kernel runs a cell: the interrupt is for it, too
        assert outcome(await waiting).interrupted
        assert log.lines == []
        for name in ("1", "2"):
            found.answered(reply(name))
        waiting = asyncio.create_task(found.in_turn(cell("%cloister put a", "3")))
        await log.seen.wait()
        assert found.cancel() is True
        going_on.set()
        await waiting
        assert found.cancel() is False

    asyncio.run(scenario())


def test_an_errand_that_stalls_or_fails_lets_the_notebook_go_on() -> None:
    async def scenario() -> None:
        never = threading.Event()
        log = Log(never)
        found = Errands(log, log.show)
        waiting = asyncio.create_task(found.in_turn(cell("%cloister get a", "1")))
        await log.seen.wait()
        found.cancel()
        assert outcome(await asyncio.wait_for(waiting, errands.PATIENCE_SECONDS + 5)).interrupted
        never.set()

        def fails(*_: object) -> Outcome:
            raise ValueError("of the laptop's own: /home/ann")

        problem = outcome(await Errands(fails, log.show).in_turn(cell("%cloister get a", "1"))).problem
        assert problem is not None
        assert "/home" not in problem.to_json().decode()

    asyncio.run(scenario())
