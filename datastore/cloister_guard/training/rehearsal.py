"""The same training on mock rows: free, and it finds every mistake before it costs."""

from __future__ import annotations

import resource
import sys
import time

from cloister_guard.encoding import Floats, Targets
from cloister_guard.training.facts import RehearsalFigures
from cloister_guard.training.loop import Engine, numerics
from cloister_guard.training.planning import Prepared


def rehearse(prepared: Prepared, mock_features: Floats, mock_targets: Targets, steps: int = 20) -> RehearsalFigures:
    """Run `steps` steps (at most the plan's) on as many mock rows as the plan has units; expected time of all steps.

    The rows come from the schema alone, so nothing that is measured here is private. The weights are thrown away.
    """
    facts = prepared.known
    steps = max(1, min(steps, facts.steps))
    # Any noise multiplier does: neither time nor memory depends on it, and nothing of the result is kept.
    engine = Engine(prepared, mock_features, mock_targets, noise_multiplier=1.0, steps=steps + 1)
    with numerics():
        engine.step()  # the first step pays for torch's warm-up
        started = time.perf_counter()
        for _ in range(steps):
            engine.step()
        seconds = (time.perf_counter() - started) / steps * facts.steps
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return RehearsalFigures(steps_run=steps, seconds=seconds, memory_bytes=peak, notes=facts.notes)
