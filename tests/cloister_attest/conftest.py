"""Says after a run how many cases of published evidence agree, whatever pytest captures."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.cloister_attest import evidence


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Counts what ran: a case agrees where its test passed, and nowhere else."""
    verdicts: dict[str, bool] = {}
    unread: Counter[str] = Counter()
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.getreports(outcome):
            for name, value in getattr(report, "user_properties", ()):
                if name == "evidence":
                    key = report.nodeid
                    verdicts[key] = verdicts.get(key, True) and outcome == "passed"
                elif name == "evidence-unread":
                    unread[str(value)] += 1
    if not verdicts:
        return
    terminalreporter.write_line(f"evidence: {len(verdicts)} cases, {sum(verdicts.values())} agree")
    for title, found in (("kinds passed over", evidence.passed_over()), ("fields that no parser knows", unread)):
        if found:
            listed = ", ".join(f"{name} {count}" for name, count in sorted(found.items()))
            terminalreporter.write_line(f"evidence: {title}: {listed}")
