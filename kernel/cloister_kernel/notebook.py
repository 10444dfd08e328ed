"""The notebook kernel: ipykernel on sockets that the spawner has bound and listens on already.

The connection file's port numbers are the numbers of those descriptors. So the kernel never binds a name of its own,
and nothing that it could put in a socket's place is ever connected to.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import zmq
from ipykernel.kernelapp import IPKernelApp

import cloister.magics


class NotebookApp(IPKernelApp):
    """ipykernel's application with inherited sockets and without a heartbeat: the spawner watches the process."""

    name = "cloister-kernel"

    def _try_bind_socket(self, s: zmq.Socket[Any], port: int) -> int:
        s.setsockopt(zmq.USE_FD, port)
        s.bind(f"ipc://{self.ip}-{port}")
        return port

    def init_extensions(self) -> None:
        super().init_extensions()  # type: ignore[no-untyped-call]
        if self.shell is not None:
            cloister.magics.load(self.shell)

    def init_heartbeat(self) -> None:
        self.heartbeat = None


def main() -> None:
    # `-m` put the start directory in front; the shell puts "" there, for modules beside the notebook.
    if sys.path and sys.path[0] == os.getcwd():
        del sys.path[0]
    NotebookApp.launch_instance()


if __name__ == "__main__":
    main()
