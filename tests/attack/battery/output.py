"""What leaves the kernel on its Jupyter channels: lies about whose it is, too much of it, and what isn't a message.

None of this needs a sandbox to be stopped: each kernel has a relay of its own. The host looks at what arrived at
another kernel's client, and whether the relay still serves everybody.
"""

from __future__ import annotations

import json
from typing import Any

from tests.attack.battery.registry import Given, attack

DELIMITER = b"<IDS|MSG>"


def _kernel() -> Any:
    from IPython import get_ipython

    return get_ipython().kernel


def _send(kind: str, content: dict[str, Any], **options: Any) -> None:
    kernel = _kernel()
    kernel.session.send(kernel.iopub_socket, kind, content, **options)


@attack("output: messages that claim another session's request", proof="host", forked=False, bare=False)
def forged_parent(given: Given) -> str:
    victim = given["victim"]
    header = {
        "msg_id": victim["message"],
        "session": victim["session"],
        "msg_type": "execute_request",
        "username": victim["user"],
    }
    for kind, content in (
        ("stream", {"name": "stdout", "text": given["forged"]}),
        (
            "display_data",
            {"data": {"text/html": f"<script>{given['forged']}</script>"}, "metadata": {}, "transient": {}},
        ),
        ("status", {"execution_state": "dead"}),
        ("execute_input", {"code": given["forged"], "execution_count": 1}),
    ):
        _send(kind, content, parent={"header": header}, ident=f"kernel.{victim['kernel']}.{kind}".encode())
    return "four forged messages sent"


@attack("output: messages for another session's comm", proof="host", forked=False, bare=False)
def foreign_comm(given: Given) -> str:
    for kind in ("comm_open", "comm_msg", "comm_close"):
        content = {"comm_id": given["victim"]["comm"], "target_name": "jupyter.widget", "data": {"x": given["forged"]}}
        _send(kind, content)
    return "three sent"


@attack("output: messages of a hundred thousand parts", proof="watch", forked=False, bare=False)
def many_parts(given: Given) -> str:
    for count in (4097, 100_000):
        _send("display_data", {"data": {}, "metadata": {}}, buffers=[b""] * count)
    return "sent"


@attack("output: what isn't a message", proof="watch", forked=False, bare=False)
def malformed(given: Given) -> str:
    kernel = _kernel()
    for parts in (
        [b""],
        [b"x"],
        [DELIMITER],
        [DELIMITER, DELIMITER, DELIMITER],
        [DELIMITER, b"", b"", b"", b""],
        [b"topic", DELIMITER, b"", b"\xff\xfe", b"\x00", b"[", b"}"],
        [b"topic", DELIMITER, b"", b"[" * 100_000, b"{}", b"{}", b"{}"],
        [b"topic", DELIMITER, b"", json.dumps({"msg_type": ["list"]}).encode(), b"null", b"1", b'"'],
        [b"x" * 70_000, DELIMITER, b"", b"{}", b"{}", b"{}", b"{}", DELIMITER, b"buffer"],
        [bytes([number]) for number in range(256)],
    ):
        kernel.iopub_socket.send_multipart(parts)
    return "sent"


@attack("output: a huge message", proof="watch", forked=False, bare=False)
def huge(given: Given) -> str:
    _send("stream", {"name": "stdout", "text": "x" * given["limits"]["message"]})
    return f"{given['limits']['message'] >> 20} MiB"


@attack("output: a flood of small messages", proof="watch", forked=False, bare=False)
def flood(given: Given) -> str:
    for number in range(given["limits"]["messages"]):
        _send("stream", {"name": "stdout", "text": f"{number}\n"})
    return f"{given['limits']['messages']} messages"
