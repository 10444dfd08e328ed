"""The kernel for front ends that start a process and ignore provisioners (VS Code).

`python -m cloister_kernel.proxy --profile P -f FILE` binds the connection file's addresses, so it is the kernel as far
as the front end can tell. SIGINT interrupts the remote cell, SIGTERM ends the remote kernel, and the exit code is the
remote one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

from cloister_data.errors import CloisterError
from cloister_kernel.bridge import Bridge, LocalAddress
from cloister_kernel.courier import Courier
from cloister_kernel.remote import RemoteKernel


def serve(profile: str, connection_file: Path) -> int:
    """Run one remote kernel to its end. Raises CloisterError where it can't be started."""
    address = LocalAddress.from_connection_info(json.loads(connection_file.read_text(encoding="utf-8")))
    remote = RemoteKernel(profile)
    bridge = Bridge(address, remote.connect, carry_out=Courier(remote, Path.cwd()).carry_out)
    stop, interrupts = threading.Event(), threading.Semaphore(0)

    def on_interrupt(_number: int, _frame: FrameType | None) -> None:
        interrupts.release()

    def on_terminate(_number: int, _frame: FrameType | None) -> None:
        stop.set()
        interrupts.release()

    signal.signal(signal.SIGINT, on_interrupt)
    signal.signal(signal.SIGTERM, on_terminate)
    try:
        remote.start()
        bridge.start()
        while bridge.exit_code is None and not stop.is_set():
            if interrupts.acquire(timeout=0.2) and not stop.is_set() and not bridge.cancel_errand():
                with contextlib.suppress(CloisterError):
                    remote.interrupt()
    finally:
        if remote.view is not None and bridge.exit_code is None:
            bridge.asked_to_end = True
            with contextlib.suppress(CloisterError):
                remote.end()
        bridge.stop()
        remote.close()
    code = bridge.exit_code
    return 0 if code is None or stop.is_set() else code & 0xFF


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cloister_kernel.proxy", description=__doc__.split("\n")[0])
    parser.add_argument("--profile", required=True, help="the profile that cloister connect made")
    parser.add_argument("-f", dest="connection_file", type=Path, required=True, help="Jupyter's connection file")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    try:
        return serve(options.profile, options.connection_file)
    except (CloisterError, OSError, ValueError) as error:
        sys.stderr.write(f"cloister: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
