"""The stage: what all sandboxes of one service are shown, mounted once, in the service's own mount namespace."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from cloister_data.errors import ConfigurationError
from cloister_kernel.sandbox.layers import LayerError
from cloister_kernel.sandbox.mounter import Mounter
from cloister_kernel.sandbox.namespaces import enter_service_namespace
from cloister_kernel.sandbox.view import View, interpreter, package_sources, plan_view, stage_pieces

NAMESPACES = (
    "Allow user namespaces to this user (sysctl user.max_user_namespaces; on Ubuntu 24.04 the AppArmor profile in "
    "deploy/), or run the cloister as root."
)


def open_stage(directory: Path, python: str = sys.executable) -> tuple[View, Mounter]:
    """Enter a mount namespace of the service's own and set up the stage at `directory`, which exists.

    To be called before the process has a second thread. Raises LayerError, or ConfigurationError for a Python that
    can't be shown.
    """
    view = plan_view([*interpreter(python), *package_sources()], os.fspath(directory))
    try:
        enter_service_namespace()
    except OSError as error:
        raise LayerError("mount namespace", f"None can be made ({error.strerror}).", NAMESPACES) from error
    mounter = Mounter()
    try:
        mounter.stage(os.fspath(directory))
        stage_pieces(view)
        for piece in view.pieces:
            mounter.show(piece.path, piece.staged)
    except OSError as error:
        mounter.close()
        raise LayerError("mount namespace", f"The stage can't be set up ({error}).", NAMESPACES) from error
    return view, mounter


def find_bubblewrap() -> str:
    """Its path. Raises LayerError where it is missing or too old for what is asked of it."""
    mend = "Install it: apt-get install bubblewrap (0.8 or newer)."
    found = shutil.which("bwrap", path="/usr/local/bin:/usr/bin:/bin")
    if found is None:
        raise LayerError("bubblewrap", "It isn't installed.", mend)
    try:
        answer = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
        version = tuple(int(part) for part in answer.split()[-1].split(".")[:2])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise LayerError("bubblewrap", f"{found} doesn't run.", mend) from error
    if version < (0, 8):
        raise LayerError("bubblewrap", f"{found} is version {answer.split()[-1]}.", mend)
    return found


def as_configuration_error(error: LayerError) -> ConfigurationError:
    """What the admin reads."""
    return ConfigurationError(
        f"Kernels can't be confined on this machine: {error.layer}.",
        why=error.why,
        next_step=f"{error.mend} To try Cloister out without confinement: --unsafe-no-sandbox.",
    )
