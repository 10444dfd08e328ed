"""The demo on the terminal: its steps as they happen, and the summary at the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cloister.rendering import figure, share
from cloister.session import Session
from cloister_data.accounts import AccountList, AccountView
from cloister_data.release import ReleaseList


class Steps:
    """Prints each step when it is done, with its seconds; a spinner before that, where there is a terminal."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=quiet, highlight=False)

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        with self.console.status(what) if self.console.is_terminal else contextlib.nullcontext():
            yield
        self.done(what, time.monotonic() - started)

    def done(self, what: str, seconds: float) -> None:
        self.console.print(f"[green]\N{CHECK MARK}[/] {what} [dim]({seconds:.1f} s)[/]")


@dataclass(frozen=True)
class Summary:
    """What the demo came to."""

    url: str
    verdict: str
    simulated: bool
    accounts: tuple[AccountView, ...]
    accuracy: float | None
    accuracy_error: float | None
    trained_epsilon: float | None
    html: Path
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return {
            "url": self.url,
            "verdict": self.verdict,
            "simulated": self.simulated,
            "accounts": [account.model_dump(mode="json") for account in self.accounts],
            "accuracy": self.accuracy,
            "accuracy_error": self.accuracy_error,
            "trained_epsilon": self.trained_epsilon,
            "html": str(self.html),
            "seconds": round(self.seconds, 1),
        }


def collect(session: Session, html: Path, seconds: float) -> Summary:
    """The figures as the cloister has them now."""
    accounts = session.transport.call("GET", "/accounts", None, AccountList).accounts
    releases = session.transport.call("GET", "/releases", None, ReleaseList).releases
    found = [release.estimates[0] for release in releases if release.kind == "evaluation" and release.estimates]
    models = [release.receipt.epsilon for release in releases if release.kind == "model"]
    passed = sum(check.verdict == "pass" for check in session.verdict.checks)
    return Summary(
        url=session.url,
        verdict=f"verified, {passed} of {len(session.verdict.checks)} checks passed, none failed",
        simulated=session.verdict.simulated,
        accounts=tuple(account for account in accounts if account.scope == "user"),
        accuracy=found[-1].value if found else None,
        accuracy_error=found[-1].error_95 if found else None,
        trained_epsilon=models[-1] if models else None,
        html=html,
        seconds=seconds,
    )


def show(summary: Summary) -> None:
    """The summary for people, on standard output."""
    console = Console(highlight=False, soft_wrap=True)
    console.print()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("Verdict", summary.verdict + (" \N{EM DASH} SIMULATED hardware" if summary.simulated else ""))
    for account in summary.accounts:
        left = max(0.0, account.limit.epsilon - account.used)
        table.add_row(
            f"Budget at {account.population.split('/')[0]}",
            f"epsilon {figure(account.used)} of {figure(account.limit.epsilon)} used ({share(account.used_share)}), "
            f"{figure(left)} left",
        )
    if summary.accuracy is not None and summary.accuracy_error is not None and summary.trained_epsilon is not None:
        table.add_row(
            "Test accuracy",
            f"{summary.accuracy:.3f} \N{PLUS-MINUS SIGN} {summary.accuracy_error:.3f} "
            f"(noised; trained at epsilon {figure(summary.trained_epsilon)})",
        )
    table.add_row("Notebook", str(summary.html))
    table.add_row("Took", f"{summary.seconds:.0f} s")
    console.print(table)
    console.print("\nOpen the same in JupyterLab with: [bold]make lab[/]  (or: cloister demo --lab)")
