"""In a kernel: install wheels that the laptop has put into its home. There is no network here."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import site
import subprocess
import sys
from collections.abc import Sequence

from cloister_data.errors import CloisterError, ConfigurationError


def install(names: Sequence[str], wheels: str) -> None:
    """Install `names` for the user from the directory `wheels` of the home. Raises CloisterError."""
    if importlib.util.find_spec("pip") is None:
        raise ConfigurationError("This kernel has no pip.", next_step="Ask the operator to install it in the image.")
    home = os.path.expanduser("~")
    # Where Python doesn't look at the user's packages by itself, pip's --user refuses; --prefix puts them there, too.
    where = ["--user"] if site.ENABLE_USER_SITE else ["--prefix", site.getuserbase()]
    command = [
        *(sys.executable, "-m", "pip", "install", "--no-index", "--find-links", os.path.join(home, wheels)),
        *("--no-input", "--disable-pip-version-check", "--no-warn-script-location", "--no-cache-dir", *where),
        *("--", *(os.path.join(home, name) if name.startswith(wheels) else name for name in names)),
    ]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=home, text=True
    ) as process:
        for line in process.stdout or ():
            sys.stdout.write(line)
    if process.returncode != 0:
        raise CloisterError("pip didn't install the packages.", why="Its own words are above.")
    importlib.invalidate_caches()


def clear(wheels: str) -> None:
    """Delete the wheels again."""
    shutil.rmtree(os.path.join(os.path.expanduser("~"), wheels), ignore_errors=True)
