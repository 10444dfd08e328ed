"""One cloister in one place."""

import fcntl
import os
import tempfile
from pathlib import Path

import pytest

from cloister_data.errors import ConfigurationError
from cloister_guard.config import GuardConfig
from cloister_guard.serve import run


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
