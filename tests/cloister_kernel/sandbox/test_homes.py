"""Homes: kept under the laptop's key and no other, bounded, the same for all kernels of a user, and hostile inside."""

from __future__ import annotations

import asyncio
import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from cloister_data.errors import CloisterError, UnavailableError
from cloister_kernel.sandbox import archive, homes
from tests.cloister_kernel.sandbox.scenes import KEY, MIB, OTHER_KEY, Stage, needs_root, play

pytestmark = needs_root

WRITE = """
import os, pathlib
home = pathlib.Path.home()
(home / "a" / "b").mkdir(parents=True)
(home / "a" / "b" / "notes.txt").write_text("kept")
os.link(home / "a" / "b" / "notes.txt", home / "hard")
os.symlink("/etc/passwd", home / "link")
(home / "line\\nbreak").write_text("1")
(home / os.fsdecode(b"no-utf8-\\xff")).write_text("2")
(home / "closed").write_text("3"); os.chmod(home / "closed", 0)
(home / "shut").mkdir(); (home / "shut" / "inside").write_text("4"); os.chmod(home / "shut", 0)
(home / "tool").write_text("#!/bin/sh"); os.chmod(home / "tool", 0o4755)
os.mkfifo(home / "pipe")
deep = home
for _ in range(200):
    deep = deep / "d"
    deep.mkdir()
(deep / "bottom").write_text("5")
(home / ".local").mkdir(); (home / "holes").touch(); os.truncate(home / "holes", 1 << 40)
for _ in range(100): os.link(home / "tool", home / f"tool{_}")
print("done")
"""
READ = """
import os, pathlib
home = pathlib.Path.home()
facts = [(home / "a/b/notes.txt").read_text(), os.stat(home / "hard").st_nlink, os.readlink(home / "link")]
facts += [(home / "line\\nbreak").read_text(), (home / os.fsdecode(b"no-utf8-\\xff")).read_text()]
facts += [os.stat(home / name).st_mode & 0o7777 for name in ("closed", "shut", "tool")]
os.chmod(home / "closed", 0o600); os.chmod(home / "shut", 0o700)
facts += [(home / "closed").read_text(), (home / "shut/inside").read_text()]
facts += [(home / "/".join(["d"] * 200) / "bottom").read_text(), (home / "holes").exists(), (home / "pipe").exists()]
facts += [os.stat(home / "tool").st_nlink, {os.lstat(path).st_uid for path in home.rglob("*")} == {os.getuid()}]
print(facts)
"""


async def refused(work: Any) -> str:
    """The kind of its CloisterError."""
    try:
        await work
    except CloisterError as error:
        return type(error).__name__
    return "taken"


async def a_life(stage: Stage) -> dict[str, Any]:
    found: dict[str, Any] = {}
    file = stage.spawner.homes._home("ann").file
    async with stage.kernel() as cell:
        await cell.run(WRITE)
        found["in memory"] = stage.spawner.homes._home("ann").path.is_dir()
    await stage.idle()
    found["left in memory"] = os.listdir(stage.runtime / "h")
    sealed = file.read_bytes()
    found["plain on disk"] = b"kept" in sealed
    found["megabytes"] = len(sealed) // MIB
    async with stage.kernel() as cell:
        found["read"] = await cell.run(READ)
        # Another key, while it is there and when it isn't; another user has another home.
        found["while there"] = await refused(stage.start(key=OTHER_KEY))
        async with stage.kernel("ben", OTHER_KEY) as other:
            found["ben's"] = await other.run("import os; print(os.listdir('.'))")
    await stage.idle()
    sealed = file.read_bytes()
    found["other key"] = await refused(stage.start(key=OTHER_KEY))
    found["after other key"] = file.read_bytes() == sealed
    ben = stage.spawner.homes._home("ben").file
    for name, content in {
        "altered": sealed[:5000] + bytes([sealed[5000] ^ 1]) + sealed[5001:],
        "cut": sealed[:-20],
        "another user's": ben.read_bytes(),
    }.items():
        file.write_bytes(content)
        found[name] = await refused(stage.start())
    file.write_bytes(sealed)
    # Without a key: a home that isn't kept, and the one that is stays.
    async with stage.kernel(key="") as cell:
        found["without a key"] = await cell.run("import os; print(os.listdir('.')); open('gone', 'w').close()")
    await stage.idle()
    found["kept"] = file.read_bytes() == sealed
    found["wiped in use"] = ""
    async with stage.kernel() as cell:
        found["wiped in use"] = await refused(stage.spawner.wipe("ann"))
    await stage.idle()
    await stage.spawner.wipe("ann")
    found["after wipe"] = file.exists()
    async with stage.kernel() as cell:
        found["new"] = await cell.run("import os; print(os.listdir('.'))")
    return found


def test_a_home_is_kept_for_its_key_alone() -> None:
    found = play(a_life)
    assert found == {
        "in memory": True,
        "left in memory": [],
        "plain on disk": False,
        "megabytes": 0,
        "read": "['kept', 2, '/etc/passwd', '1', '2', 0, 0, 493, '3', '4', '5', False, False, 101, True]\n",
        "while there": "InvalidRequestError",
        "ben's": "[]\n",
        "other key": "InvalidRequestError",
        "after other key": True,
        "altered": "InvalidRequestError",
        "cut": "InvalidRequestError",
        "another user's": "InvalidRequestError",
        "without a key": "[]\n",
        "kept": True,
        "wiped in use": "InvalidRequestError",
        "after wipe": False,
        "new": "[]\n",
    }


FILL = """
try:
    with open("full", "wb", buffering=0) as file:
        while True: file.write(bytes(1 << 20))
except OSError as error:
    print(error.strerror, os.stat("full").st_size >> 20)
os.unlink("full")
count = 0
try:
    while True: open(f"n{count}", "w").close(); count += 1
except OSError as error:
    print(error.strerror, 4000 < count < 4200)
for number in range(count): os.unlink(f"n{number}")
"""
BUSY = """
import os, time
end = time.time() + 1.5
while time.time() < end:
    with open("busy", "wb") as file: file.write(bytes(1 << 20))
    os.rename("busy", "busier")
"""
PLANT = """
import os, pathlib, sys
for place in (f".local/lib/python3.{sys.version_info[1]}/site-packages", "."):
    pathlib.Path(place).mkdir(parents=True, exist_ok=True)
    for name in ("usercustomize.py", "sitecustomize.py", "tarfile.py", "json.py", "encodings.py"):
        pathlib.Path(place, name).write_text("open('/home/cloister/ran', 'w').close()")
    pathlib.Path(place, "x.pth").write_text("import usercustomize; open('/home/cloister/ran', 'w').close()")
"""


async def shared(stage: Stage) -> dict[str, Any]:
    found: dict[str, Any] = {}
    async with stage.kernel() as one, stage.kernel() as two:
        await one.run("import os; open('from-one', 'w').write('hello')")
        found["same"] = await two.run(
            "import os; print(open('from-one').read(), os.stat('from-one').st_uid == os.getuid())"
        )
        await two.run("open('from-one', 'a').write(' again')")
        found["both ways"] = await one.run("print(open('from-one').read(), os.getuid() == os.stat('from-one').st_uid)")
        found["two uids"] = (await one.run("print(os.getuid())")) != (await two.run("print(os.getuid())"))
        found["full"] = await one.run(FILL)
        await one.run(PLANT)
        # Saved while both run and one of them writes.
        file = stage.spawner.homes._home("ann").file
        writing = asyncio.create_task(one.run(BUSY))
        await stage.spawner.save()
        found["saved while running"] = file.exists()
        first = file.stat().st_mtime_ns
        await writing
        await stage.spawner.save()
        found["saved again"] = file.stat().st_mtime_ns != first
        first = file.stat().st_mtime_ns
        await stage.spawner.save()
        found["unchanged isn't"] = file.stat().st_mtime_ns == first
        # One byte for another, with the time of modification put back.
        await one.run(
            "t = os.stat('from-one'); open('from-one', 'r+').write('H'); os.utime('from-one', ns=(1, t.st_mtime_ns))"
        )
        await stage.spawner.save()
        found["a hidden change is"] = file.stat().st_mtime_ns != first
    await stage.idle()
    async with stage.kernel() as one:
        found["back"] = await one.run("import os; print(open('from-one').read(), os.path.exists('ran'))")
    return found


def test_kernels_share_a_home_that_is_bounded_and_saved_while_they_run() -> None:
    assert play(shared, home=16) == {
        "same": "hello True\n",
        "both ways": "hello again True\n",
        "two uids": True,
        "full": "No space left on device 15\nNo space left on device True\n",
        "saved while running": True,
        "saved again": True,
        "unchanged isn't": True,
        "a hidden change is": True,
        "back": "Hello again False\n",
    }


async def lingering(stage: Stage) -> dict[str, Any]:
    found: dict[str, Any] = {}
    homes.LINGER_SECONDS = 3600.0
    async with stage.kernel() as cell:
        await cell.run("open('here', 'w').write('1'); import socket; socket.socket(socket.AF_UNIX).bind('not-kept')")
    await stage.idle()
    found["in memory"] = len(os.listdir(stage.runtime / "h"))
    async with stage.kernel() as cell:
        found["as it was"] = await cell.run("import os; print(sorted(os.listdir('.')))")
    await stage.idle()
    found["another key"] = await refused(stage.start(key=OTHER_KEY))
    homes.LINGER_SECONDS = 0.0
    async with stage.kernel() as cell:
        found["from disk"] = await cell.run("import os; print(sorted(os.listdir('.')))")
    await stage.idle()
    found["in the end"] = len(os.listdir(stage.runtime / "h"))
    return found


def test_a_home_waits_in_memory_for_the_next_kernel_a_while() -> None:
    assert play(lingering) == {
        "in memory": 1,
        "as it was": "['here', 'not-kept']\n",
        "another key": "InvalidRequestError",
        "from disk": "['here']\n",
        "in the end": 0,
    }


async def failing(stage: Stage) -> dict[str, Any]:
    found: dict[str, Any] = {}
    logged: list[str] = []
    stage.spawner.homes._log = lambda text, **_: logged.append(text)
    file = stage.spawner.homes._home("ann").file
    async with stage.kernel() as cell:
        await cell.run("open('first', 'w').write('1')")
    await stage.idle()
    sealed = file.read_bytes()
    async with stage.kernel() as cell:
        await cell.run("open('second', 'w').write('2')")
        homes.HELPER_SECONDS, before = 0.001, homes.HELPER_SECONDS
        await stage.spawner.save()
        found["logged"] = list(logged)
        found["old one kept"] = file.read_bytes() == sealed
        found["no rest"] = sorted(path.name for path in file.parent.iterdir()) == [file.name]
    await stage.idle()
    found["stays in memory"] = len(os.listdir(stage.runtime / "h"))
    homes.HELPER_SECONDS = before
    # A wrong key opens nothing meanwhile, and a save during its attempt writes nothing.
    found["wrong key"] = await refused(stage.start(key=OTHER_KEY))
    await stage.spawner.save()
    found["then leaves it"] = len(os.listdir(stage.runtime / "h"))
    sealed = file.read_bytes()
    attempts = [refused(stage.start(key=OTHER_KEY)), *(stage.spawner.save() for _ in range(5))]
    found["race"] = (await asyncio.gather(*attempts))[0]
    found["not overwritten"] = file.read_bytes() == sealed
    async with stage.kernel() as cell:
        found["both"] = await cell.run("import os; print(sorted(os.listdir('.')))")
    return found


def test_a_save_that_fails_loses_nothing() -> None:
    assert play(failing) == {
        "logged": ["home not saved"],
        "old one kept": True,
        "no rest": True,
        "stays in memory": 1,
        "wrong key": "InvalidRequestError",
        "then leaves it": 0,
        "race": "InvalidRequestError",
        "not overwritten": True,
        "both": "['first', 'second']\n",
    }


CHAOS = """
import os, random, time
os.makedirs("t/a")
names = [f"t/x{i}" for i in range(30)] + [f"t/a/y{i}" for i in range(30)]
choose, end, done = random.Random(1), time.time() + 3, 0
def write(path):
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_NONBLOCK)
    os.write(descriptor, bytes(choose.randrange(100_000)))
    os.close(descriptor)
def swap(path):
    os.rename("t/a", "t/q")
    os.symlink("/usr", "t/a")
    os.unlink("t/a")
    os.rename("t/q", "t/a")
ways = [write, os.mkdir, os.mkfifo, os.unlink, os.rmdir, swap, lambda path: os.rename(path, choose.choice(names))]
ways += [lambda path: os.symlink(choose.choice(["/", "..", "/proc/self/fd", "nowhere"]), path)]
ways += [lambda path: os.path.islink(path) or os.chmod(path, choose.choice([0, 0o777, 0o4755]))]
while time.time() < end:
    try:
        choose.choice(ways)(choose.choice(names))
        done += 1
    except OSError:
        pass
print(done > 100)
"""
LIST = """
import subprocess
command = "chmod -R u+rwX .; find . -type f -o -type l | sort"
print(subprocess.run(["sh", "-c", command], capture_output=True, text=True).stdout)
"""


async def hostile(stage: Stage) -> dict[str, Any]:
    logged: list[str] = []
    stage.spawner.homes._log = lambda text, **_: logged.append(text)
    async with stage.kernel() as cell:
        changing = asyncio.create_task(cell.run(CHAOS))
        saves = 0
        while not changing.done():
            await stage.spawner.save()
            saves += 1
        found: dict[str, Any] = {"changed": await changing, "several": saves > 1}
        before = await cell.run(LIST)
    await stage.idle()
    async with stage.kernel() as cell:
        after = await cell.run(LIST)
    return found | {"same": after == before, "something": before.count("\n") > 3, "logged": logged}


def test_a_home_that_changes_while_it_is_saved_keeps_nothing_from_being_saved() -> None:
    assert play(hostile) == {"changed": "True\n", "several": True, "same": True, "something": True, "logged": []}


def test_an_archive_that_breaks_off_or_is_too_long_replaces_nothing(tmp_path: Path) -> None:
    file, key = tmp_path / "x.home", bytes(32)
    head = b"0" * 64 + b"\n"
    for stream, limit in ((head + b"half", 100), (head + bytes(200) + archive.COMPLETE, 100)):
        with pytest.raises(CloisterError):
            homes._keep(io.BytesIO(stream), file, key, "", limit)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(UnavailableError):
        homes._keep(io.BytesIO(b"short"), file, key, "", 100)
    homes._keep(io.BytesIO(head + bytes(50) + archive.COMPLETE), file, key, "", 100)  # the control
    assert file.exists()


def test_an_archive_stays_below_the_home_and_takes_set_id_bits_away(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as made:
        entry = tarfile.TarInfo("tool")
        entry.mode = 0o6777
        made.addfile(entry)
        made.addfile(tarfile.TarInfo("../outside"))
    stream.seek(0)
    with pytest.raises(tarfile.OutsideDestinationError):
        archive.restore(stream, str(home))
    assert (home / "tool").stat().st_mode & 0o7777 == 0o755
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_home_key_is_its_users_alone() -> None:
    assert homes._key("", "ann") is None
    assert len({homes._key(KEY, "ann"), homes._key(KEY, "ben"), homes._key(OTHER_KEY, "ann")}) == 3
