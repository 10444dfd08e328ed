"""One kernel, seen from its notebook: what reaches it, what it keeps over outages, and what it can't reach."""

from __future__ import annotations

import os
import threading
import time

import pytest
from jupyter_client.blocking.client import BlockingKernelClient

from cloister_kernel.provisioner import CloisterProvisioner
from cloister_kernel.uids import UID_FIRST, UID_LAST
from tests.fakes.kernel_client import Kernel, Make, run
from tests.fakes.kernel_relay import KernelRelay

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NOT CHECKED: kernels get uids of their own from root only")


def test_only_display_settings_travel(relay: KernelRelay, shared: Kernel) -> None:
    _, text = run(shared[1], "import os; print(sorted(os.environ.items()))")
    assert "leaked-if-seen" not in text
    assert "('COLUMNS', '77')" in text
    assert "CLOISTER_GUARD_SOCKET" in text
    launch = relay.launches[-1]
    assert set(launch.environment) <= {"COLUMNS", "LINES", "TZ", "LANG", "NO_COLOR"}
    assert "leaked-if-seen" not in launch.to_json().decode()
    # What Jupyter made up for its own side stays there, too.
    assert "connection" not in launch.to_json().decode()


def test_nothing_is_lost_or_doubled_over_outages(relay: KernelRelay, shared: Kernel) -> None:
    manager, client = shared
    before = relay.connections
    assert isinstance(manager.provisioner, CloisterProvisioner)
    outages = threading.Thread(target=_outages, args=(relay, manager.provisioner))
    outages.start()
    status, text = run(client, "import time\nfor i in range(300):\n    print(i)\n    time.sleep(0.005)", timeout=30)
    outages.join()
    assert status == "ok"
    assert text == "".join(f"{i}\n" for i in range(300))
    assert relay.connections >= before + 2


def _outages(relay: KernelRelay, provisioner: CloisterProvisioner) -> None:
    for seconds in (0.0, 0.5, 0.0):
        time.sleep(0.4)
        if seconds:
            with relay.black_hole():
                time.sleep(seconds)
                assert provisioner._bridge is not None
                assert not provisioner._bridge.connected
                assert provisioner._bridge.exit_code is None
        else:
            relay.cut()


def test_a_message_without_the_local_key_does_nothing(shared: Kernel) -> None:
    manager, client = shared
    forger = BlockingKernelClient()
    forger.load_connection_info(manager.get_connection_info() | {"key": b"not the key"})
    forger.start_channels()
    forger.execute("forged = True")
    # Asked without an error: after one, a kernel drops what is waiting, and the control's message could be among it.
    asked = "'forged' in globals()"
    assert run(client, asked)[1] == "False"
    # The positive control: the same client with the key is heard.
    forger.session.key = client.session.key
    forger.execute("forged = True")
    deadline = time.monotonic() + 5
    while (seen := run(client, asked)[1]) != "True" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert seen == "True"
    forger.stop_channels()


@needs_root
def test_a_kernel_has_its_own_uid_and_finds_closed_doors(relay: KernelRelay, shared: Kernel) -> None:
    _, client = shared
    secret = relay.directory / "state"
    secret.mkdir(mode=0o700)
    (secret / "data").write_text("rows")
    _, text = run(client, "import os; print(*os.getresuid(), *os.getresgid(), *os.getgroups())")
    numbers = {int(number) for number in text.split()}
    assert len(numbers) == 1
    assert UID_FIRST <= numbers.pop() <= UID_LAST
    # The control: this process may read the file, and the kernel may not.
    assert (secret / "data").read_text() == "rows"
    _, text = run(client, f"open({str(secret / 'data')!r}).read()")
    assert "Error" in text.splitlines()[-1]
    _, text = run(client, "print([line for line in open('/proc/self/status') if line.startswith(('CapEff', 'NoNew'))])")
    assert text == "['CapEff:\\t0000000000000000\\n', 'NoNewPrivs:\\t1\\n']\n"
    # It can't put anything in the place of its sockets, nor of the guard's.
    places = [str(next((relay.directory / name).iterdir())) for name in ("k", "g")]
    _, text = run(client, f"print([os.access(place, os.W_OK) for place in {places!r}])")
    assert text == "[False, False]\n"
    _, text = run(client, "open(os.environ['HOME'] + '/mine', 'w').write('x')")
    assert text == "1"


LEAVE = """
import os, socket, subprocess
for place in ("/tmp", "/dev/shm", os.environ["HOME"]):
    open(place + "/mine", "w").close()
listening = socket.socket(socket.AF_UNIX)
listening.bind("\\0mine")
listening.listen()
sleeper = subprocess.Popen(["sleep", "61234"])
"""
REACH = """
import os, socket
def connects():
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect("\\0mine")
    except OSError:
        return False
    return True
commands = b"".join(open(f"/proc/{pid}/cmdline", "rb").read() for pid in os.listdir("/proc") if pid.isdigit())
there = [os.path.exists(place + "/mine") for place in ("/tmp", "/dev/shm", os.environ["HOME"])]
print([*there[:2], connects(), b"61234" in commands, there[2]])
"""


@needs_root
def test_a_kernel_cant_reach_another_one(relay: KernelRelay, kernel: Make, shared: Kernel) -> None:
    _, client = shared
    run(client, LEAVE)
    assert run(client, REACH)[1] == "[True, True, True, True, True]\n"  # the control: it can reach itself
    with kernel() as (_, other):
        # Both are the same user's: one home, and two sandboxes.
        assert run(other, REACH)[1] == "[False, False, False, False, True]\n"
