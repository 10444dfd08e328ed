"""One cloister in one place."""

import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cloister_data.errors import ConfigurationError
from cloister_guard.config import GuardConfig
from cloister_guard.serve import run
from tests.fakes.running import write_config


@pytest.mark.parametrize("held", ["state", "run"])
def test_a_second_guard_in_the_same_directories_is_refused_before_it_touches_them(held: str, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="clo-") as runtime:
        refused(tmp_path / "state", Path(runtime), held)


def refused(state: Path, runtime: Path, held: str) -> None:
    config = GuardConfig(
        name="twin",
        listen="127.0.0.1:0",
        state_dir=state,
        runtime_dir=runtime,
        platform="simulated",
    )
    config.make_directories()
    descriptor = os.open({"state": state, "run": runtime}[held], os.O_RDONLY)
    umask = os.umask(0o077)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(ConfigurationError, match="Another cloister runs in"):
            run(config, [])
    finally:
        os.umask(umask)
        os.close(descriptor)
    assert not (config.state_dir / "cloister.db").exists()
    assert not config.control_socket.exists()


UNWATCHED = """
import sys
from pathlib import Path
from cloister_guard.config import load_config
from cloister_guard.guard import Guard
from cloister_guard.serve import run

async def broken(self):
    raise RuntimeError("nobody looks after the leases")

Guard.watch = broken
run(load_config(Path(sys.argv[1])), ["sleep", "3"])
"""


def test_a_guard_that_no_longer_watches_its_leases_ends_with_an_error(tmp_path: Path) -> None:
    """With an owner's data open for ever, it must not go on; and whoever supervises it has to see a failure."""
    with tempfile.TemporaryDirectory(prefix="clo-") as runtime:
        config = write_config(tmp_path, Path(runtime))
        ended = subprocess.run(
            [sys.executable, "-c", UNWATCHED, str(config)], capture_output=True, text=True, timeout=60, check=False
        )
    assert ended.returncode != 0
    assert "nobody looks after the leases" in ended.stderr
    assert not (tmp_path / "state" / "ready.json").exists()
