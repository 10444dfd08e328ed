"""Makes the virtual environment and installs Cloister into it: pinned versions, and never a CUDA package.

python requirements/install.py VENV CONSTRAINTS          (`make setup` runs it; standard library only)
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

OLDEST, NEWEST = (3, 11), (3, 13)
REFUSED = ("nvidia-", "cuda-")
"""How the names of the packages begin that the GPU build of torch brings along: gigabytes that nothing here uses."""


def main(target: Path, constraints: Path) -> None:
    check_python()
    need_venv()
    need_bubblewrap()
    if not (target / "bin" / "python").exists():
        say(f"Making {target} ...")
        venv.create(target, with_pip=True, symlinks=True)
    pip = [os.fspath(target / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    wanted = ["-c", os.fspath(constraints), "-e", ".[dev]"]
    say("Resolving packages; nothing is installed before the list is checked ...")
    refuse_cuda(planned(pip, wanted))
    say("Installing ...")
    run([*pip, "install", *wanted], "The packages can't be installed.")


def check_python() -> None:
    found = sys.version_info[:2]
    if not OLDEST <= found <= NEWEST:
        stop(
            f"Python {found[0]}.{found[1]} can't run Cloister: it needs 3.{OLDEST[1]} to 3.{NEWEST[1]}.",
            "Name another one: make PYTHON=python3.11 ...",
        )


def need_venv() -> None:
    """Debian and Ubuntu ship venv apart. It is installed where that is permitted."""
    if importlib.util.find_spec("ensurepip") is not None:
        return
    package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    if os.geteuid() == 0 and shutil.which("apt-get"):
        say(f"Installing the system package {package} ...")
        if subprocess.call(["apt-get", "install", "-y", "--no-install-recommends", package]) == 0:
            return
    stop("Python's venv module isn't installed.", f"Install it: sudo apt-get install {package}")


def need_bubblewrap() -> None:
    """What kernels are confined with. Without it everything but kernels works, and those refuse to start."""
    if sys.platform != "linux" or shutil.which("bwrap"):
        return
    if os.geteuid() == 0 and shutil.which("apt-get"):
        say("Installing the system package bubblewrap, which confines kernels ...")
        install = ["apt-get", "install", "-y", "--no-install-recommends", "bubblewrap"]
        if subprocess.call(install) == 0:
            return
        # An image without package lists.
        if subprocess.call(["apt-get", "update"]) == 0 and subprocess.call(install) == 0:
            return
    say(
        "bubblewrap isn't installed: kernels can't be confined, and won't start.\n"
        "Next: sudo apt-get install bubblewrap   (or, to try Cloister out without: make demo UNSAFE=1)"
    )


def planned(pip: list[str], wanted: list[str]) -> list[str]:
    """The names of what pip would install."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        run(
            [*pip, "install", "--quiet", "--dry-run", "--report", os.fspath(report), *wanted],
            "The packages can't be resolved.",
        )
        document = json.loads(report.read_text("utf-8"))
    return [str(item["metadata"]["name"]).lower().replace("_", "-") for item in document["install"]]


def refuse_cuda(names: list[str]) -> None:
    found = sorted(name for name in names if name.startswith(REFUSED))
    if found:
        stop(
            f"pip would install CUDA packages ({', '.join(found[:4])}{' ...' if len(found) > 4 else ''}). "
            "Nothing was installed.",
            "Point pip at PyTorch's CPU wheels (PIP_EXTRA_INDEX_URL or pip's configuration), then run make again.",
        )


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def run(command: list[str], what: str) -> None:
    if subprocess.call(command) != 0:
        stop(what, "pip's message above says why; check the network and pip's configuration, then run make again.")


def stop(what: str, next_step: str) -> None:
    sys.exit(f"{what}\nNext: {next_step}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python requirements/install.py VENV CONSTRAINTS")
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except KeyboardInterrupt:
        sys.exit(130)
