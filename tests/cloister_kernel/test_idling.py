"""What counts as idle, when it is warned about, and when it ends a kernel."""

from __future__ import annotations

import json

import pytest

from cloister_kernel.activity import MAX_CELLS, Activity
from cloister_kernel.idling import IdleRule
from cloister_kernel.signing import DELIMITER

DAY = IdleRule(86_400)


@pytest.mark.parametrize(
    ("idle", "warned", "step"),
    [
        (0, None, "keep"),
        (85_799, None, "keep"),
        (85_800, None, "warn"),
        (86_399, 599, "keep"),
        (86_400, 600, "end"),
        # Never without a warning that long before, however late the look is.
        (200_000, None, "warn"),
        (200_000, 599, "keep"),
        # The warning was for an earlier rest.
        (85_800, 100_000, "warn"),
        (85_000, 86_000, "keep"),
    ],
)
def test_a_day(idle: float, warned: float | None, step: str) -> None:
    assert DAY.step(idle, warned) == step


def test_the_notice_is_at_most_half_of_the_idle_time() -> None:
    assert IdleRule(60).notice == 30
    assert DAY.notice == 600
    assert "has been idle for 23 hours 50 minutes. In 10 minutes it is shut down" in DAY.warning()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def message(kind: str, parent: str = "", **content: object) -> tuple[bytes, ...]:
    header, above = {"msg_type": kind, "msg_id": f"id-{kind}"}, {"msg_id": parent} if parent else {}
    return (b"topic", DELIMITER, b"", *(json.dumps(part).encode() for part in (header, above, {}, content)))


def status(state: object, parent: str) -> tuple[bytes, ...]:
    return message("status", parent, execution_state=state)


def test_a_running_cell_is_no_rest() -> None:
    clock = Clock()
    seen = Activity(clock)
    clock.now = 10
    assert seen.idle == 10
    seen.asked(message("execute_request"))
    assert seen.idle == 0
    assert json.loads(seen.last_cell)["msg_id"] == "id-execute_request"
    seen.told(status("busy", "cell"))
    clock.now = 1000
    # What comes over control meanwhile ends, and the cell goes on.
    seen.told(status("busy", "control"))
    seen.told(status("idle", "control"))
    assert seen.idle == 0
    seen.told(status("idle", "cell"))
    clock.now = 1005
    assert seen.idle == 5
    seen.asked(message("kernel_info_request"))
    assert seen.idle == 0
    assert json.loads(seen.last_cell)["msg_id"] == "id-execute_request"


def test_output_alone_is_a_rest() -> None:
    clock = Clock()
    seen = Activity(clock)
    clock.now = 10
    seen.told(message("stream", "cell", text='"status"'))
    assert seen.idle == 10


def test_a_hostile_kernel_costs_no_memory() -> None:
    seen = Activity(Clock())
    for number in range(10 * MAX_CELLS):
        seen.told(status("busy", str(number)))
    for hostile in (
        *(status(state, "x") for state in (None, 1, [], {"a": "b"}, "busy" * 10_000)),
        (b"topic", DELIMITER, b"", b'{"msg_type":"status"' + b"[" * 60_000, b"[]", b"1", b'"status"'),
        (b"topic", DELIMITER, b"", b'"status"', b"x" * 100_000),
        (b"status",),
        (),
    ):
        seen.told(hostile)
        seen.asked(hostile)
    assert len(seen._running) == MAX_CELLS
