"""What the simulated platform measures: the sources of the packages that the guard's side consists of."""

from __future__ import annotations

import hashlib
import importlib.util
import struct
from pathlib import Path

from cloister_data.errors import ConfigurationError

TRUSTED_PACKAGES = ("cloister_attest", "cloister_budget", "cloister_data", "cloister_guard", "cloister_kernel")
_LENGTHS = struct.Struct(">IQ")


def measure_trusted_packages() -> bytes:
    """SHA-384 (48 bytes) over the installed sources of `TRUSTED_PACKAGES`. Raises ConfigurationError."""
    return measure({name: _folder(name) for name in TRUSTED_PACKAGES})


def measure(folders: dict[str, Path]) -> bytes:
    """SHA-384 (48 bytes) over every file in `folders`, sorted by `package/path`.

    Each file adds the length of its name as u32 and of its content as u64, big-endian, then the name in UTF-8, then
    the content. Byte code is left out: Python writes it as it runs.
    """
    files: dict[str, Path] = {}
    for package, folder in folders.items():
        for path in folder.rglob("*"):
            inside = path.relative_to(folder)
            if "__pycache__" in inside.parts or path.suffix == ".pyc":
                continue
            if path.is_symlink():
                raise ConfigurationError(f"The installation can't be measured: {path} is a link.")
            if path.is_file():
                files[f"{package}/{inside.as_posix()}"] = path
    digest = hashlib.sha384()
    for name in sorted(files):
        encoded, content = name.encode(), files[name].read_bytes()
        digest.update(_LENGTHS.pack(len(encoded), len(content)))
        digest.update(encoded)
        digest.update(content)
    return digest.digest()


def _folder(package: str) -> Path:
    # Found, not imported: the verifier's layer knows nothing of the guard's.
    spec = importlib.util.find_spec(package)
    locations = list(spec.submodule_search_locations or ()) if spec else []
    if len(locations) != 1:
        raise ConfigurationError(
            f"The installation can't be measured: the package {package} is missing.",
            next_step="Install what a cloister runs: pip install 'cloister[guard]'.",
        )
    return Path(locations[0])
