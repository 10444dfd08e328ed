"""The guard's configuration file: strict, and clear about what is wrong."""

import stat
import tempfile
from pathlib import Path

import pytest

from cloister_data.errors import ConfigurationError
from cloister_guard.config import load_config

GOOD = """
name = "hospital"
listen = "127.0.0.1:8443"
state_dir = "/var/lib/cloister"
runtime_dir = "/run/cloister"
platform = "simulated"
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cloister.toml"
    path.write_text(text)
    return path


def test_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD))
    assert (config.host, config.port) == ("127.0.0.1", 8443)
    assert config.database_url == "sqlite:////var/lib/cloister/cloister.db"
    assert config.control_socket == Path("/run/cloister/control.sock")
    assert config.homes == Path("/var/lib/cloister-homes")


def test_ipv6(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD.replace("127.0.0.1:8443", "[::1]:0")))
    assert (config.host, config.port) == ("::1", 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("platform", "platfrom"), "platfrom"),
        (('"simulated"', '"sgx"'), "platform"),
        (("/var/lib/cloister", "var/lib"), "absolute"),
        (("/run/cloister", "/var/lib/cloister/run"), "outside state_dir"),
        (("127.0.0.1:8443", "8443"), "listen"),
        (('name = "hospital"', 'name = "a\\nb"'), "name"),
        (("name =", "name"), "isn't TOML"),
        (('platform = "simulated"', 'platform = "simulated"\nworker_memory_mb = 1'), "worker_memory_mb"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    assert change[0] in GOOD
    with pytest.raises(ConfigurationError, match="configuration") as caught:
        load_config(write(tmp_path, GOOD.replace(*change)))
    assert says in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nowhere"):
        load_config(tmp_path / "nowhere.toml")


def test_a_long_runtime_directory_is_refused_before_a_socket_fails(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD)).model_copy(
        update={"state_dir": tmp_path / "state", "runtime_dir": tmp_path / ("x" * 80)}
    )
    with pytest.raises(ConfigurationError, match="too long"):
        config.make_directories()
    assert not (tmp_path / "state").exists()


def test_the_state_directory_is_closed_to_others(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD)).model_copy(
        update={"state_dir": tmp_path / "state", "runtime_dir": Path("/tmp") / tmp_path.name}
    )
    try:
        config.make_directories()
        assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
        assert config.runtime_dir.stat().st_mode & 0o777 == 0o711
    finally:
        for path in (config.runtime_dir / "g", config.runtime_dir):
            path.rmdir()


@pytest.mark.parametrize("key", ["state_dir", "runtime_dir", "homes_dir"])
def test_a_directory_that_everybody_uses_is_left_as_it_is(key: str, tmp_path: Path) -> None:
    shared = Path(tempfile.mkdtemp(prefix="clo-"))
    shared.chmod(0o1777)
    config = load_config(write(tmp_path, GOOD)).model_copy(
        update={"state_dir": tmp_path / "state", "runtime_dir": Path("/run/cloister-test"), key: shared}
    )
    try:
        with pytest.raises(ConfigurationError, match="open to every user"):
            config.make_directories()
        assert stat.S_IMODE(shared.stat().st_mode) == 0o1777
        assert list(shared.iterdir()) == []
    finally:
        shared.rmdir()
