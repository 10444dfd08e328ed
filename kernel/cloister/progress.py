"""A job's live progress: a widget where there is a notebook, text elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from html import escape
from typing import Any, Protocol

from cloister_data.training import JobView

UPDATES_PER_SECOND = 10
ENDED = ("done", "cancelled", "failed")


class Shown(Protocol):
    """Something that shows a job's state."""

    def update(self, view: JobView) -> None: ...


_STOPPED = {
    "suspended": " (its owner has suspended you or the data)",
    "locked": " (its owner's witness is silent, so the data are locked)",
}


def summary(view: JobView) -> str:
    """One line about a job."""
    done = f"{view.steps_done} of {view.steps} steps"
    paid = f"{view.charged_steps} steps charged"
    cost = f"epsilon {view.epsilon:.3g} at delta {view.delta:g}"
    match view.state:
        case "done":
            return f"done: {view.steps} steps, {cost}"
        case "cancelled":
            why = _STOPPED.get(view.code, "")
            return f"cancelled{why}: {paid} of {view.steps}; the others came back"
        case "failed":
            return f"failed ({view.code or 'no reason is told'}): {paid} of {view.steps}; the others came back"
        case "cancelling":
            return f"being cancelled after {done}"
    return f"running: {done}, {cost} in all"


class WidgetBar:
    """An ipywidgets progress bar. It may be updated from any thread; a front end gets at most 10 updates a second."""

    def __init__(self, view: JobView) -> None:
        import ipywidgets

        self._bar = ipywidgets.IntProgress(value=0, min=0, max=max(1, view.steps), layout={"width": "22em"})
        self._label = ipywidgets.HTML()
        self.widget = ipywidgets.HBox([self._bar, self._label])
        self._last = 0.0
        self.update(view)

    def update(self, view: JobView) -> None:
        now = time.monotonic()
        if view.state not in ENDED and now - self._last < 1 / UPDATES_PER_SECOND:
            return
        self._last = now
        self._bar.value = view.steps if view.state == "done" else view.steps_done
        self._bar.bar_style = {"done": "success", "failed": "danger", "cancelled": "warning"}.get(view.state, "info")
        self._label.value = escape(summary(view))

    def mimebundle(self) -> dict[str, Any]:
        return {"application/vnd.jupyter.widget-view+json": self._view()}

    def _view(self) -> dict[str, Any]:
        return {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}


def make_bar(view: JobView) -> WidgetBar | None:
    """A widget where a notebook can show one: in an IPython kernel that has ipywidgets. Else None."""
    try:
        from IPython.core.getipython import get_ipython
    except ImportError:
        return None
    shell = get_ipython()
    if shell is None or getattr(shell, "kernel", None) is None:
        return None
    try:
        return WidgetBar(view)
    except ImportError:
        return None


class TextBar:
    """tqdm on standard error, for scripts and terminals."""

    def __init__(self, view: JobView) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=view.steps, unit="step", desc=f"job {view.job[:8]}", initial=view.steps_done)

    def update(self, view: JobView) -> None:
        self._bar.n = view.steps if view.state == "done" else view.steps_done
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


class Watcher:
    """Polls a job from a background thread until it has ended, and tells who listens."""

    def __init__(self, fetch: Callable[[], JobView], listener: Callable[[JobView], None]) -> None:
        self._fetch = fetch
        self._listener = listener
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="cloister-job", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        pause = 0.2
        while True:
            try:
                view = self._fetch()
            except Exception:
                # The cloister may be away for a while; the watcher must outlive that. wait() tells the error.
                pause = min(10.0, 2 * pause)
            else:
                self._listener(view)
                if view.state in ENDED:
                    return
                pause = min(1.0, 1.3 * pause)
            time.sleep(pause)
