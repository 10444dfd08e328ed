"""Fixtures that several packages' tests share."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Tests import shared helpers as `tests.fakes.NAME`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# A suite that was started in the background ignores interrupts, and so would every process that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

if TYPE_CHECKING:
    from tests.fakes.running import RunningCloister


@pytest.fixture(scope="session")
def shared_cloister() -> Iterator["RunningCloister"]:
    """One real cloister for all tests that only talk to it. Each test makes users and datasets of its own names."""
    from tests.fakes.running import running_cloister

    with running_cloister() as found:
        yield found
        assert found.stop() == 0
