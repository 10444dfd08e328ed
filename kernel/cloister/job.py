"""A training job: a handle to work that runs in the cloister, whatever happens to this kernel."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, overload

from cloister import rendering
from cloister.connection import Caller, current
from cloister.modules import copy_of, remember_features
from cloister.progress import ENDED, TextBar, Watcher, WidgetBar, make_bar, summary
from cloister.releases import Release
from cloister_data import release as wire
from cloister_data.datasets import joint_title
from cloister_data.errors import InvalidRequestError, JobFailedError, UnavailableError, UnreachableError
from cloister_data.training import JobList, JobView

if TYPE_CHECKING:
    from torch import nn

POLL_SECONDS = 0.5
PATIENCE_SECONDS = 60.0
"""How long `wait` bears a cloister that can't be reached."""


class Job:
    """One training. It goes on without this kernel; `cloister.jobs()` finds it again.

    Shown in a notebook it is a live progress bar, kept up to date from a background thread.
    """

    def __init__(
        self,
        caller: Caller,
        view: JobView,
        model: nn.Module | None = None,
        features: Sequence[str] | None = None,
    ) -> None:
        self._caller = caller
        self._view = view
        self._model = model
        self._features = tuple(features) if features is not None else None
        self._bar: WidgetBar | None = None
        self._lock = threading.Lock()
        self._watcher = Watcher(self._fetch, self._listen)

    @property
    def id(self) -> str:
        return self._view.job

    @property
    def state(self) -> str:
        """running, cancelling, done, cancelled or failed; asked anew while the job runs."""
        return self.refresh().state

    @property
    def view(self) -> JobView:
        """All that was known at the last look."""
        return self._view

    @property
    def epsilon(self) -> float:
        """The tight epsilon of the whole job, at `view.delta`."""
        return self._view.epsilon

    def refresh(self) -> JobView:
        """Ask for the job's state, unless it has ended."""
        if self._view.state not in ENDED:
            self._listen(self._fetch())
        return self._view

    def wait(self, timeout: float | None = None) -> Job:
        """Block until the job has ended, with a progress bar. Ctrl-C stops the waiting, not the job.

        Raises:
            JobFailedError: it failed. The steps that were marked stay spent.
            TimeoutError: `timeout` seconds are over; the job goes on.
            UnreachableError: the cloister can't be reached for a minute; the job may go on.
        """
        text = TextBar(self._view) if self._view.state not in ENDED and not self._show() else None
        started = reached = time.monotonic()
        try:
            while True:
                try:
                    view = self.refresh()
                    reached = time.monotonic()
                except (UnreachableError, UnavailableError):
                    if time.monotonic() - reached > PATIENCE_SECONDS:
                        raise
                    view = self._view
                if text is not None:
                    text.update(view)
                if view.state in ENDED:
                    break
                if timeout is not None and time.monotonic() - started >= timeout:
                    raise TimeoutError(f"The job {self.id[:8]} is still running after {timeout:g} seconds; it goes on.")
                time.sleep(POLL_SECONDS)
        finally:
            if text is not None:
                text.close()
        if view.state == "failed":
            raise JobFailedError(
                "The job failed.",
                why=f"{view.charged_steps} of {view.steps} steps had begun and stay spent. Why it failed isn't told: "
                "the reason could depend on the data.",
                next_step="Rehearse it: rehearse(...) shows every fault that doesn't come from the data.",
            )
        return self

    def cancel(self) -> Job:
        """Stop the job. Steps that have begun stay spent, the others come back."""
        self._listen(self._caller.call("DELETE", f"/jobs/{self.id}", None, JobView))
        return self

    def weights(self) -> bytes:
        """The trained weights as safetensors bytes; waits for the job."""
        self.wait()
        if self._view.state != "done":
            raise InvalidRequestError(
                f"The job has no result: it was {self._view.state}.",
                next_step="Train again; what it did not use of its budget came back.",
            )
        return self._caller.raw("GET", f"/jobs/{self.id}/result")

    def result(self, model: nn.Module | None = None) -> nn.Module:
        """A copy of the module that was sent, with the trained weights, set to eval(); waits for the job.

        After a restart of the kernel the module is gone: build it again and pass it as `model`.
        """
        from cloister.modeling import load_weights

        built = model if model is not None else self._model
        if built is None:
            raise InvalidRequestError(
                "The job's module isn't in this session.",
                why="Only its weights are kept in the cloister.",
                next_step="Build the module as before and pass it: job.result(model).",
            )
        trained = load_weights(copy_of(built), self.weights()).eval()
        if self._features is not None:
            remember_features(trained, self._features)
        return trained

    def release(self) -> Release:
        """The job's release: its charge and its receipt. Waits for the job."""
        self.wait()
        if self._view.release is None:
            raise InvalidRequestError(f"The job released nothing: it was {self._view.state}.")
        return Release(self._caller.call("GET", f"/releases/{self._view.release}", None, wire.Release))

    def _fetch(self) -> JobView:
        return self._caller.call("GET", f"/jobs/{self.id}", None, JobView)

    def _listen(self, view: JobView) -> None:
        with self._lock:
            if self._view.state in ENDED and view.state not in ENDED:
                return  # An answer that was overtaken.
            self._view = view
            if self._bar is not None:
                self._bar.update(view)

    def _widget(self) -> WidgetBar | None:
        with self._lock:
            if self._bar is None:
                self._bar = make_bar(self._view)
            bar = self._bar
        if bar is not None and self._view.state not in ENDED:
            self._watcher.start()
        return bar

    def _show(self) -> bool:
        """Show the live bar in this cell, unless it is on the page already. False where there is no notebook."""
        shown = self._bar is not None
        bar = self._widget()
        if bar is None:
            return False
        if not shown:
            from IPython.display import display

            display(self)  # type: ignore[no-untyped-call]
        return True

    def __repr__(self) -> str:
        names = joint_title(self._view.sources)
        return f"<Job {self.id[:8]} on {names}: {summary(self._view)}>"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """The live bar where the front end shows widgets, and the state as text everywhere else."""
        if self._view.state in ENDED and self._bar is None:
            return {"text/plain": repr(self)}
        bar = self._widget()
        return {"text/plain": repr(self), **(bar.mimebundle() if bar is not None else {})}


class Jobs(Sequence[Job]):
    """Your jobs, oldest first."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._jobs = tuple(jobs)

    @overload
    def __getitem__(self, index: int) -> Job: ...
    @overload
    def __getitem__(self, index: slice) -> Jobs: ...
    def __getitem__(self, index: int | slice) -> Job | Jobs:
        return Jobs(self._jobs[index]) if isinstance(index, slice) else self._jobs[index]

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs)

    def __len__(self) -> int:
        return len(self._jobs)

    def __repr__(self) -> str:
        return rendering.text_table(_HEADERS, self._rows()) if self else "You have no jobs yet."

    def _repr_html_(self) -> str:
        return rendering.html_table(_HEADERS, self._rows()) if self else "<p>You have no jobs yet.</p>"

    def _rows(self) -> list[list[str]]:
        return [
            [
                str(at),
                job.id[:8],
                datetime.fromtimestamp(job.view.created, UTC).strftime("%Y-%m-%d %H:%M"),
                joint_title(job.view.sources),
                summary(job.view),
            ]
            for at, job in enumerate(self._jobs)
        ]


_HEADERS = ("", "job", "begun (UTC)", "on", "state")


def jobs() -> Jobs:
    """Your jobs; they survive this kernel. `cloister.jobs()[-1].result(model)` fetches a result, free."""
    caller = current()
    return Jobs(Job(caller, view) for view in caller.call("GET", "/jobs", None, JobList).jobs)
