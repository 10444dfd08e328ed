"""The first Python in a sandbox: it closes the last layers, looks whether all hold, and becomes what it is for.

    python -c 'from cloister_kernel.sandbox.shim import main; main()' ORDER

ORDER is the service's word, as JSON: `uid`, `control` (the descriptor of a SOCK_SEQPACKET socket to the service),
`descriptors` (what else may be open), `readable` and `writable` (paths), and either `connection` (a Jupyter connection
file: a notebook kernel) or `program` (the name of a module with a `main`) with its `arguments`. Nothing of a user has
run before `main` ends, and nothing but the standard library is imported before the layers hold.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
from typing import Any, NoReturn

from cloister_kernel.process import die_with_parent
from cloister_kernel.sandbox import check, landlock
from cloister_kernel.sandbox import filter as calls
from cloister_kernel.sandbox.layers import LayerError

MAX_MESSAGE = 1 << 17
WARM = ("numpy", "pandas", "torch", "matplotlib.pyplot", "ipywidgets", "cloister")
"""What a warm kernel has imported before anybody gets it; only what is installed."""


def lock_down(order: dict[str, Any]) -> None:
    """Raises LayerError."""
    die_with_parent(9)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # an interrupt goes to the kernel and to what it started, not to bubblewrap
    inherited = {order["control"], *order["descriptors"]}
    check.before_filter(order["uid"], order["gid"], inherited, rootless=order["rootless"])
    landlock.restrict(order["readable"], order["writable"])
    calls.install()
    check.after_filter()


def main() -> NoReturn:
    order: dict[str, Any] = json.loads(sys.argv[1])
    del os.environ["PYTHONPATH"]  # it was for this process alone
    control = socket.socket(fileno=order["control"])
    try:
        lock_down(order)
    except LayerError as error:
        _refuse(control, error)
    except Exception as error:  # whatever it is, nothing may start
        _refuse(control, LayerError("lock-down", f"{type(error).__name__}: {error}.", check.REPORT))
    _say(control, {"state": "locked"})
    if "program" in order:
        control.close()
        _no_more_words()
        _run(order["program"], order["arguments"])
    _become_kernel(control, order)


def _run(name: str, arguments: list[str]) -> NoReturn:
    import importlib

    sys.exit(importlib.import_module(name).main(arguments))


def _become_kernel(control: socket.socket, order: dict[str, Any]) -> NoReturn:
    from cloister_kernel.notebook import run_for_user

    def wait_for_user() -> dict[str, str]:
        """Here a warm kernel waits. It belongs to nobody yet, and has no home and no guard."""
        if order["warm"]:
            _import(WARM)  # with a shell that is there already, or matplotlib wouldn't show its plots
        _say(control, {"state": "ready"})
        _no_more_words()
        message = control.recv(MAX_MESSAGE)
        control.close()
        if not message:
            os._exit(0)
        environment: dict[str, str] = json.loads(message)["environment"]
        return environment

    try:
        run_for_user(order["connection"], wait_for_user)
    except Exception:
        # Python's own way out would wait for sockets that nobody reads: a kernel that neither runs nor ends.
        os._exit(70)  # EX_SOFTWARE


def _no_more_words() -> None:
    """Standard error was open for the words of a failure; what a user's code says there would fill the disk."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 2)
    os.close(null)


def _import(names: tuple[str, ...]) -> None:
    import importlib
    import importlib.util

    for name in names:
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)


def _say(control: socket.socket, report: dict[str, str]) -> None:
    control.send(json.dumps(report).encode())


def _refuse(control: socket.socket, error: LayerError) -> NoReturn:
    _say(control, {"state": "refused", "layer": error.layer, "why": error.why[:2000], "mend": error.mend[:2000]})
    os._exit(71)  # EX_OSERR
