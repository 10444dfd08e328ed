"""Wrapping keys in a file: only when simulated, only for its owner, only under the same context."""

from pathlib import Path

import pytest

from cloister_data.errors import ConfigurationError, StorageError
from cloister_guard.datasets.keys import FileKeyProvider

KEY = bytes(range(32))


def test_a_wrapped_key_opens_under_its_context_alone(tmp_path: Path) -> None:
    keys = FileKeyProvider(tmp_path / "key", platform="simulated")
    wrapped = keys.wrap(KEY, b"dataset a")
    assert KEY not in wrapped
    assert FileKeyProvider(tmp_path / "key", platform="simulated").unwrap(wrapped, b"dataset a") == KEY
    for other in (b"dataset b", b"", b"dataset a "):
        with pytest.raises(StorageError):
            keys.unwrap(wrapped, other)
    for damaged in (wrapped[:-1], wrapped[:5], b"", wrapped[:-1] + bytes([wrapped[-1] ^ 1])):
        with pytest.raises(StorageError):
            keys.unwrap(damaged, b"dataset a")


@pytest.mark.parametrize("platform", ["sev-snp", "tdx"])
def test_real_platforms_refuse_a_key_file(tmp_path: Path, platform: str) -> None:
    with pytest.raises(ConfigurationError, match="key file"):
        FileKeyProvider(tmp_path / "key", platform=platform)  # type: ignore[arg-type]
    assert not (tmp_path / "key").exists()


def test_the_file_is_private_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "key"
    FileKeyProvider(path, platform="simulated")
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match="0600"):
        FileKeyProvider(path, platform="simulated")
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(ConfigurationError, match="32 bytes"):
        FileKeyProvider(path, platform="simulated")
    link = tmp_path / "link"
    path.write_bytes(KEY)
    link.symlink_to(path)
    with pytest.raises(ConfigurationError):
        FileKeyProvider(link, platform="simulated")
