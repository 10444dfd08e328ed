"""The kernel service's log."""

from __future__ import annotations

import contextlib
import sys


def log(event: str, **facts: str | int) -> None:
    """One line on standard error, which the guard or systemd collects: ids and codes, nothing that a kernel wrote."""
    line = " ".join([f"kernel-service: {event}", *(f"{name}={value}" for name, value in facts.items())])
    # Whoever collected it may be gone, as a terminal or a guard that was killed; the kernels go on.
    with contextlib.suppress(OSError):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
