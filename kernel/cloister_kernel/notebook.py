"""The notebook kernel: ipykernel on sockets that the spawner has bound and listens on already.

The connection file's port numbers are the numbers of those descriptors. So the kernel never binds a name of its own,
and nothing that it could put in a socket's place is ever connected to.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import zmq
from ipykernel.kernelapp import IPKernelApp

PACKAGES = ".cloister/packages"
"""Where `%cloister pip install` puts packages, below the home."""


class NotebookApp(IPKernelApp):
    """ipykernel's application with inherited sockets and without a heartbeat: the spawner watches the process."""

    name = "cloister-kernel"

    def _try_bind_socket(self, s: zmq.Socket[Any], port: int) -> int:
        s.setsockopt(zmq.USE_FD, port)
        s.bind(f"ipc://{self.ip}-{port}")
        return port

    def init_heartbeat(self) -> None:
        self.heartbeat = None


def run_for_user(connection_file: str, wait_for_user: Callable[[], dict[str, str]]) -> NoReturn:
    """Be a kernel, complete but for its user: `wait_for_user` gives the environment once there is one."""
    app: Any = NotebookApp.instance()
    app.initialize(["-f", connection_file])
    os.environ.update(wait_for_user())
    os.chdir(os.environ["HOME"])
    # Last, so that nothing in it can take the place of a package of the image.
    sys.path.append(os.path.join(os.environ["HOME"], PACKAGES))
    app.start()
    sys.exit(0)


def main() -> NoReturn:
    """A kernel without a sandbox: `python -m cloister_kernel.notebook -f FILE`, in its home."""
    # `-m` put the start directory in front; the shell puts "" there, for modules beside the notebook.
    if sys.path and sys.path[0] == os.getcwd():
        del sys.path[0]
    run_for_user(sys.argv[2], dict)


if __name__ == "__main__":
    main()
