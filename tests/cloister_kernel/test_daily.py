"""What a data scientist does all day, at a kernel in a cloister: each as at a local one."""

from __future__ import annotations

import base64
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient

from tests.fakes.kernel_client import Kernel, Make, run

Message = dict[str, Any]


@pytest.fixture
def client(shared: Kernel) -> Iterator[BlockingKernelClient]:
    """The module's kernel, with nothing of the last test on its channels."""
    yield shared[1]
    run(shared[1], "pass")


def outputs(client: BlockingKernelClient, code: str) -> list[Message]:
    """All that one cell published, but status and its own echo. Raises where it failed."""
    found: list[Message] = []
    reply = client.execute_interactive(code, output_hook=found.append, timeout=60)
    assert reply["content"]["status"] == "ok", reply["content"]
    return [message for message in found if message["msg_type"] not in ("status", "execute_input")]


def data(client: BlockingKernelClient, code: str) -> dict[str, Any]:
    (message,) = outputs(client, code)
    bundle: dict[str, Any] = message["content"]["data"]
    return bundle


def answer(client: BlockingKernelClient, request: str, channel: str = "shell") -> Message:
    get = client.get_shell_msg if channel == "shell" else client.get_control_msg
    while (message := get(timeout=30))["parent_header"].get("msg_id") != request:
        pass
    content: Message = message["content"]
    return content


def test_rich_outputs(client: BlockingKernelClient) -> None:
    run(client, "from IPython.display import HTML, SVG, JSON, Latex, Markdown, Image")
    assert data(client, "HTML('<b>x</b>')")["text/html"] == "<b>x</b>"
    assert "<svg" in data(client, "SVG('<svg xmlns=\"http://www.w3.org/2000/svg\"/>')")["image/svg+xml"]
    assert data(client, "Latex('$x^2$')")["text/latex"] == "$x^2$"
    assert data(client, "Markdown('*x*')")["text/markdown"] == "*x*"
    assert data(client, "JSON({'a': [1]})")["application/json"] == {"a": [1]}
    table = data(client, "import pandas as pd; pd.DataFrame({'a': range(100_000)})")
    assert "<table" in table["text/html"]
    assert "100000 rows" in table["text/html"]


def test_a_plot_inline(client: BlockingKernelClient) -> None:
    code = "%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.show()"
    pictures = [message for message in outputs(client, code) if message["msg_type"] == "display_data"]
    assert base64.b64decode(pictures[0]["content"]["data"]["image/png"]).startswith(b"\x89PNG")


def test_errors_and_standard_error(client: BlockingKernelClient) -> None:
    (message,) = outputs(client, "import sys; print('oh', file=sys.stderr)")
    assert message["content"] == {"name": "stderr", "text": "oh\n"}
    status, text = run(client, "def inner(): return {}['missing']\ninner()")
    assert status == "error"
    assert "KeyError" in text
    assert "inner" in text


def test_displays_that_change(client: BlockingKernelClient) -> None:
    shown = outputs(client, "handle = display('one', display_id='it'); handle.update('two')")
    assert [message["msg_type"] for message in shown] == ["display_data", "update_display_data"]
    assert [message["content"]["transient"] for message in shown] == [{"display_id": "it"}] * 2
    cleared = outputs(
        client, "from IPython.display import clear_output; print('a'); clear_output(wait=True); print('b')"
    )
    assert [message["msg_type"] for message in cleared] == ["stream", "clear_output", "stream"]
    assert cleared[1]["content"] == {"wait": True}


def test_widgets_with_buffers_both_ways(client: BlockingKernelClient) -> None:
    made = outputs(client, "import ipywidgets as w; picture = w.Image(value=bytes(range(256)) * 1000); picture")
    opened = next(message for message in made if message["content"].get("data", {}).get("buffer_paths"))
    assert bytes(opened["buffers"][0]) == bytes(range(256)) * 1000
    comm = run(client, "picture.model_id")[1].strip("'")
    state = {"method": "update", "state": {}, "buffer_paths": [["value"]]}
    message = client.session.msg("comm_msg", {"comm_id": comm, "data": state})
    client.session.send(client.shell_channel.socket, message, buffers=[memoryview(b"\x00\xff" * 200_000)])
    assert run(client, "len(picture.value), bytes(picture.value[:2])") == ("ok", "(400000, b'\\x00\\xff')")


def test_interact(client: BlockingKernelClient) -> None:
    run(client, "import ipywidgets as w; called = []")
    made = outputs(client, "def double(x): called.append(x); print(2 * x)\nplay = w.interact(double, x=(0, 10))")
    assert any("application/vnd.jupyter.widget-view+json" in message["content"].get("data", {}) for message in made)
    comm = run(client, "play.widget.children[0].model_id")[1].strip("'")
    state = {"method": "update", "state": {"value": 7}, "buffer_paths": []}
    client.shell_channel.send(client.session.msg("comm_msg", {"comm_id": comm, "data": state}))
    assert run(client, "called") == ("ok", "[5, 7]")


def test_progress_bars(client: BlockingKernelClient) -> None:
    _, text = run(client, "from tqdm import tqdm\nfor _ in tqdm(range(50)): pass")
    assert "50/50" in text
    bars = outputs(client, "from tqdm.notebook import tqdm as bar\nfor _ in bar(range(50)): pass")
    states = [
        message["content"]["data"]["state"]
        for message in bars
        if message["msg_type"] == "comm_msg" and message["content"]["data"]["method"] == "update"
    ]
    assert {"value": 50.0} in states or any(state.get("value") == 50 for state in states)


def test_completion_inspection_and_history(client: BlockingKernelClient) -> None:
    run(client, "import collections; a_long_name = 1")
    assert "a_long_name" in client.complete("a_long_n", reply=True, timeout=60)["content"]["matches"]
    found = client.inspect("collections.OrderedDict", reply=True, timeout=60)["content"]
    assert found["found"]
    assert "Dictionary" in found["data"]["text/plain"]
    complete = {code: answer(client, client.is_complete(code))["status"] for code in ("1", "for x in y:", "1 +* 2")}
    assert complete == {"1": "complete", "for x in y:": "incomplete", "1 +* 2": "invalid"}
    history = client.history(hist_access_type="tail", n=3, reply=True, timeout=60)["content"]["history"]
    assert "a_long_name = 1" in str(history)


def test_questions(client: BlockingKernelClient) -> None:
    for ask, secret in (("input", False), ("__import__('getpass').getpass", True)):
        request = client.execute(f"told = {ask}('name? ')", allow_stdin=True)
        asked = client.get_stdin_msg(timeout=30)["content"]
        assert asked == {"prompt": "name? ", "password": secret}
        client.input("ann")
        assert answer(client, request)["status"] == "ok"
        assert run(client, "told") == ("ok", "'ann'")


STUBBORN = """
import time
for attempt in (1, 2):
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        if attempt == 2:
            raise
        print('once', flush=True)
"""


@pytest.mark.parametrize(
    ("code", "interrupts"),
    [("import time; time.sleep(60)", 1), ("while True: pass", 1), (STUBBORN, 2)],
    ids=["sleep", "loop", "ignored once"],
)
def test_interrupts(shared: Kernel, client: BlockingKernelClient, code: str, interrupts: int) -> None:
    request = client.execute(code)
    time.sleep(0.3)
    for _ in range(interrupts):
        begun = time.monotonic()
        shared[0].interrupt_kernel()
        if interrupts > 1:
            time.sleep(0.3)
    assert answer(client, request)["ename"] == "KeyboardInterrupt"
    assert time.monotonic() - begun < 10
    client.kernel_info(reply=True, timeout=20)


def test_interrupts_reach_a_subprocess(shared: Kernel, client: BlockingKernelClient) -> None:
    request = client.execute("!sleep 60")
    time.sleep(0.5)
    begun = time.monotonic()
    shared[0].interrupt_kernel()
    answer(client, request)
    assert time.monotonic() - begun < 10
    client.kernel_info(reply=True, timeout=20)
    assert run(client, "!ps -eo args 2>/dev/null | grep -c '^sleep 60'")[1].strip() in ("0", "")


def test_the_debugger_is_not_offered(client: BlockingKernelClient) -> None:
    """debugpy talks TCP, which a confined kernel can't: JupyterLab then shows no debugger, and nothing waits for it."""
    told = client.kernel_info(reply=True, timeout=30)["content"]
    assert "kernel subshells" in told["supported_features"]  # the control: it lists what there is
    assert "debugger" not in told["supported_features"]


def test_many_lines_flushed_one_by_one_travel_together(client: BlockingKernelClient) -> None:
    shown = outputs(client, "for i in range(3000): print(i, flush=True)")
    assert "".join(message["content"]["text"] for message in shown) == "".join(f"{i}\n" for i in range(3000))
    assert len(shown) < 1000


def test_several_kernels_at_once(kernel: Make) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(kernel())[1] for _ in range(2)]
        for number, client in enumerate(clients):
            run(client, f"mine = {number}")
        assert [run(client, "mine")[1] for client in clients] == ["0", "1"]
