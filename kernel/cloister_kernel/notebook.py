"""The notebook kernel: ipykernel on sockets that the spawner has bound and listens on already.

The connection file's port numbers are the numbers of those descriptors. So the kernel never binds a name of its own,
and nothing that it could put in a socket's place is ever connected to. Under the sandbox's system-call filter there are
no internet sockets either, so what ipykernel does over TCP on loopback goes over a Unix socket, or not at all.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import ipykernel.debugger
import zmq
from ipykernel.iostream import IOPubThread
from ipykernel.kernelapp import IPKernelApp
from zmq.eventloop.zmqstream import ZMQStream

import cloister.magics


class OutputThread(IOPubThread):
    """ipykernel's thread for output, that hears forked children (multiprocessing) over a Unix socket.

    libzmq makes it in a directory of mode 0700 in TMPDIR, and removes it when the kernel ends.
    """

    def _setup_pipe_in(self) -> None:
        self._pipe_uuid = os.urandom(16)
        pipe = self.socket.context.socket(zmq.PULL)
        pipe.linger = 0
        pipe.bind("ipc://*")
        self._pipe_address = pipe.getsockopt_string(zmq.LAST_ENDPOINT)
        self._pipe_in = ZMQStream(pipe, self.io_loop)
        self._pipe_in.on_recv(self._handle_pipe_msg)

    def _setup_pipe_out(self) -> tuple[zmq.Context[Any], zmq.Socket[Any]]:
        # A context of the child's own; it sends, and waits up to 3 s until that has left.
        context = zmq.Context()
        pipe = context.socket(zmq.PUSH)
        pipe.linger = 3000
        pipe.connect(self._pipe_address)
        return context, pipe


class NotebookApp(IPKernelApp):
    """ipykernel's application with inherited sockets and without a heartbeat: the spawner watches the process."""

    name = "cloister-kernel"

    def _try_bind_socket(self, s: zmq.Socket[Any], port: int) -> int:
        # By default ZeroMQ forgets, without a word, what comes faster than it is fetched. The kernel service fetches
        # everything and bounds it (`cloister_kernel.holdings`); what waits here is the kernel's own memory.
        s.set_hwm(0)
        s.setsockopt(zmq.USE_FD, port)
        s.bind(f"ipc://{self.ip}-{port}")
        return port

    def init_extensions(self) -> None:
        super().init_extensions()  # type: ignore[no-untyped-call]
        if self.shell is not None:
            cloister.magics.load(self.shell)

    def init_heartbeat(self) -> None:
        self.heartbeat = None

    def init_iopub(self, context: zmq.Context[Any]) -> None:
        # As ipykernel does it, but for the thread's class.
        self.iopub_socket = context.socket(zmq.XPUB)
        self.iopub_socket.linger = 1000
        self.iopub_port = self._try_bind_socket(self.iopub_socket, self.iopub_port)
        self.configure_tornado_logger()  # type: ignore[no-untyped-call]
        self.iopub_thread = OutputThread(self.iopub_socket, pipe=True, session=self.session)  # type: ignore[no-untyped-call]
        self.iopub_thread.start()  # type: ignore[no-untyped-call]
        self.iopub_socket = self.iopub_thread.background_socket


def internet_sockets() -> bool:
    """Whether this process can make one; the sandbox's filter refuses them."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()
    except OSError:
        return False
    return True


def run_for_user(connection_file: str, wait_for_user: Callable[[], dict[str, str]]) -> NoReturn:
    """Be a kernel, complete but for its user: `wait_for_user` gives the environment once there is one."""
    if not internet_sockets():
        # debugpy talks TCP. A kernel that offered it would leave every debugger waiting for an answer.
        ipykernel.debugger._is_debugpy_available = False
    app: Any = NotebookApp.instance()
    try:
        app.initialize(["-f", connection_file])
    except BaseException:
        traceback.print_exc()
        os._exit(70)  # EX_SOFTWARE; its threads would keep it from ending
    os.environ.update(wait_for_user())
    os.chdir(os.environ["HOME"])
    # The home has come since: what was looked for in it and not found may be there.
    importlib.invalidate_caches()
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
