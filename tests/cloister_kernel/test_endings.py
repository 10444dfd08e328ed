"""Why a kernel ended, in words, and how they travel."""

from __future__ import annotations

from typing import get_args

import pytest

from cloister_data.kernels import EndingKind
from cloister_kernel.endings import MAX_TEXT, Periods, ending, exit_parts, in_words, read_exit

PERIODS = Periods(idle=86_400, lease=43_200, room=600)


@pytest.mark.parametrize(
    ("code", "memory", "kind", "text"),
    [
        (-9, 2048, "memory", "It was killed because it needed more than its 2048 MiB of memory."),
        (137, 2048, "memory", "It was killed because it needed more than its 2048 MiB of memory."),
        (-9, 0, "memory", "It was killed because it needed more memory than it may have."),
        (-9, None, "signal", "It ended by signal 9 (killed)."),
        (-11, None, "signal", "It ended by signal 11 (segmentation fault)."),
        (139, None, "signal", "It ended by signal 11 (segmentation fault)."),
        # What was killed was a child of the kernel, which went on and ended otherwise.
        (3, 2048, "exited", "It ended by itself with status 3."),
        (0, None, "exited", "It ended by itself with status 0."),
        (255, None, "exited", "It ended by itself with status 255."),
    ],
)
def test_a_kernel_that_ended_by_itself(code: int, memory: int | None, kind: str, text: str) -> None:
    found = ending(code, None, PERIODS, memory)
    assert (found.kind, found.text) == (kind, text)


def test_a_kernel_that_the_service_ended() -> None:
    causes = [kind for kind in get_args(EndingKind) if kind not in ("memory", "signal", "exited")]
    texts = [ending(-9, cause, PERIODS, 512).text for cause in causes]
    assert len(set(texts)) == len(causes)
    assert ending(-9, "idle", PERIODS).text == "It was shut down because it had been idle for 24 hours."
    assert "attached to it for 12 hours" in ending(-9, "lease", PERIODS).text


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        *(
            (3600, "1 hour"),
            (86_400, "24 hours"),
            (600, "10 minutes"),
            (90, "1 minute 30 seconds"),
            (85_800, "23 hours 50 minutes"),
            (1, "1 second"),
        ),
        (0.2, "no time"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_an_exit_frame_of_either_form_is_read() -> None:
    assert read_exit(exit_parts(-9, "It was killed.")) == (-9, "It was killed.")
    assert read_exit((b"0",)) == (0, "")


def test_a_hostile_reason_is_one_bounded_printable_line() -> None:
    code, text = read_exit((b"1", b"a\x1b[2J\r\nb\xff" + "é\u202e".encode() * 100_000))
    assert code == 1
    assert text.startswith("a[2Jb")
    assert len(text) <= MAX_TEXT
    assert text.isprintable()
    assert len(read_exit((b"1", b"x" * 100_000))[1]) == MAX_TEXT


@pytest.mark.parametrize("parts", [(), (b"",), (b"x", b"why"), (b"1", b"why", b"more")])
def test_what_is_no_exit_frame(parts: tuple[bytes, ...]) -> None:
    with pytest.raises(ValueError, match=r"part|invalid literal"):
        read_exit(parts)
