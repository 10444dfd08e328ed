"""A notebook's side of a kernel, for tests."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import psutil
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

from tests.fakes.kernel_relay import KernelRelay

Kernel = tuple[KernelManager, BlockingKernelClient]
Make = Callable[..., contextlib.AbstractContextManager[Kernel]]


def run(
    client: BlockingKernelClient, code: str, timeout: float = 20, allow_stdin: bool | None = None
) -> tuple[str, str]:
    """The reply's status, and the text of everything that came out."""
    texts: list[str] = []

    def collect(message: dict[str, Any]) -> None:
        content = message["content"]
        if message["msg_type"] == "stream":
            texts.append(content["text"])
        elif message["msg_type"] in ("execute_result", "display_data"):
            texts.append(content["data"].get("text/html") or content["data"]["text/plain"])
        elif message["msg_type"] == "error":
            texts.append("\n".join(content["traceback"]))

    reply = client.execute_interactive(code, output_hook=collect, timeout=timeout, allow_stdin=allow_stdin)
    return reply["content"]["status"], "".join(texts)


def kernel_processes(relay: KernelRelay) -> list[psutil.Process]:
    """All that the kernel service has started: not the process that mounts for it, a fork of its own."""
    assert relay.service is not None
    service = psutil.Process(relay.service.pid)
    found = []
    for child in service.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.cmdline() != service.cmdline():
                found.append(child)
    return found


def processes(relay: KernelRelay) -> set[int]:
    return {process.pid for process in kernel_processes(relay)}


def gone(relay: KernelRelay, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while processes(relay):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
