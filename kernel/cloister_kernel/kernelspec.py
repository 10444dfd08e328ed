"""The kernelspec by which Jupyter offers a cloister's kernel."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from jupyter_core.paths import jupyter_data_dir

from cloister_data.errors import ConfigurationError, InvalidRequestError, StorageError

PROVISIONER = "cloister-provisioner"
_PROFILE = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


def kernelspec(profile: str, display_name: str) -> dict[str, Any]:
    """One kernelspec, two ways in: the provisioner, and `argv` for front ends that ignore provisioners (VS Code)."""
    return {
        "display_name": display_name,
        "language": "python",
        "interrupt_mode": "signal",
        "argv": [sys.executable, "-m", "cloister_kernel.proxy", "--profile", profile, "-f", "{connection_file}"],
        "env": {},
        "metadata": {
            "debugger": False,
            "kernel_provisioner": {"provisioner_name": PROVISIONER, "config": {"profile": profile}},
        },
    }


def kernel_name(profile: str) -> str:
    """The kernel's name for Jupyter: `cloister-` and the profile's."""
    if not _PROFILE.fullmatch(profile):
        raise InvalidRequestError(
            f"{profile[:80]!r} can't be a profile's name.",
            next_step="Use lower-case letters, digits, dots, dashes and underscores.",
        )
    return f"cloister-{profile}"


def install_kernelspec(profile: str, display_name: str | None = None, directory: Path | None = None) -> Path:
    """Write the kernelspec of `profile`; returns its directory.

    `directory` is one of Jupyter's data directories (it gets `kernels/NAME` in it); None stands for the user's own.
    Raises InvalidRequestError for a name that can't be one, StorageError where it can't be written.
    """
    name = kernel_name(profile)
    if not sys.executable:
        raise ConfigurationError("This Python doesn't know where it is installed.")
    target = Path(directory if directory is not None else jupyter_data_dir()) / "kernels" / name
    document = json.dumps(kernelspec(profile, display_name or f"Cloister: {profile}"), indent=1)
    try:
        target.mkdir(parents=True, exist_ok=True)
        unfinished = target / "kernel.json.new"
        unfinished.write_text(document, encoding="utf-8")
        unfinished.replace(target / "kernel.json")
    except OSError as error:
        raise StorageError(f"The kernelspec can't be written to {target}.", why=str(error)) from error
    return target
