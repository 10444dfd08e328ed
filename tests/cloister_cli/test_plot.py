"""The plot of an account over time."""

from cloister_cli.plot import plot
from cloister_data.accounts import UsedAt


def test_a_share_that_grows_fills_columns_to_the_right() -> None:
    lines = plot([UsedAt(at=0, used_share=0.25), UsedAt(at=86_400, used_share=1.0)], width=30, height=4)
    assert len(lines) == 6
    assert [line[:7] for line in lines[:3]] == [" 100% |", "      |", "  50% |"]
    assert lines[0].removeprefix(" 100% |") == " " * 29 + "█"
    assert lines[3].removeprefix("      |") == "█" * 30
    assert lines[-1].split() == ["1970-01-01", "1970-01-02"]


def test_a_little_is_seen_and_nothing_is_said() -> None:
    assert "▁" in plot([UsedAt(at=0, used_share=0.001)], width=20)[-3]
    assert plot([]) == ["nothing is used yet"]
