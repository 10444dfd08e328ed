"""How an attack is written, run and judged. Standard library only: it is sent into a hostile kernel, and not imported.

An attack is a function of one argument, what the host has prepared (a dictionary). It returns its proof, a text, or it
raises what stopped it: OSError, or Stopped. Any other exception is a mistake in the attack, and says nothing about the
sandbox. Each runs in a forked child with a time limit, so that it may crash, hang or give up rights.
"""

from __future__ import annotations

import errno
import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MARK = "canary:"
"""Every secret that the host plants begins so; the rest is random. Who shows one has read it."""

Given = dict[str, Any]
Function = Callable[[Given], str]


class Stopped(Exception):
    """The attack didn't reach what it wanted."""


@dataclass(frozen=True)
class Attack:
    """`proof`: "canary", a planted secret; "seen", what the attack itself saw; "host", the host looks for the effect;
    "watch", the host looks whether everybody else was served meanwhile; "end", it looks when the kernel has ended.

    `needs` names what the machine must have, or the attack isn't tried. `bare`: it may be run without any sandbox.
    """

    name: str
    function: Function
    proof: str
    needs: str
    bare: bool
    forked: bool
    seconds: float


ATTACKS: dict[str, Attack] = {}


def attack(
    name: str,
    *,
    proof: str = "canary",
    needs: str = "",
    bare: bool = True,
    forked: bool = True,
    seconds: float = 20.0,
) -> Callable[[Function], Function]:
    """Register an attack under `name`, which begins with its theme and a colon."""

    def register(function: Function) -> Function:
        assert name not in ATTACKS, name
        ATTACKS[name] = Attack(name, function, proof, needs, bare, forked, seconds)
        return function

    return register


def find_mark(data: bytes, where: str, mark: str = MARK) -> str:
    """The planted secret in `data`. Raises Stopped where there is none."""
    found = re.search(re.escape(mark.encode()) + rb"[a-z0-9:-]*[0-9a-f]{16}", data)
    if found is None:
        raise Stopped(f"{where}: nothing planted is in it")
    return found.group().decode()


def first(attempts: list[Callable[[], str]]) -> str:
    """The first proof of several attempts. Raises Stopped with all their reasons."""
    reasons = []
    for attempt in attempts:
        try:
            return attempt()
        except (OSError, Stopped) as error:
            reasons.append(_reason(error))
    raise Stopped("; ".join(sorted(set(reasons))) or "there was nothing to try")


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return errno.errorcode.get(error.errno, str(error.errno))
    return str(error) or type(error).__name__


def _attempt(one: Attack, given: Given) -> dict[str, str]:
    try:
        return {"verdict": "open", "detail": one.function(given)[:400]}
    except (OSError, Stopped) as error:
        return {"verdict": "stopped", "detail": _reason(error)[:400]}
    except BaseException as error:
        where, frame = "", error.__traceback__
        while frame is not None:
            where, frame = f"{frame.tb_frame.f_code.co_name}:{frame.tb_lineno}", frame.tb_next
        return {"verdict": "broken", "detail": f"{type(error).__name__} in {where}: {error}"[:400]}


def _in_child(one: Attack, given: Given) -> dict[str, str]:
    """Run it in a forked child, which is killed when its time is over."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.write(writing, json.dumps(_attempt(one, given)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    told = b""
    deadline = time.monotonic() + one.seconds
    while (left := deadline - time.monotonic()) > 0 and select.select([reading], [], [], left)[0]:
        piece = os.read(reading, 65536)
        if not piece:
            break
        told += piece
    late = not told and time.monotonic() >= deadline
    if late:
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    _, status = os.waitpid(child, 0)
    if told:
        found: dict[str, str] = json.loads(told)
        return found
    if late:
        return {"verdict": "broken", "detail": f"it isn't over after {one.seconds:g} s"}
    if os.WIFSIGNALED(status):
        return {"verdict": "stopped", "detail": f"killed by {signal.Signals(os.WTERMSIG(status)).name}"}
    return {"verdict": "broken", "detail": f"the child ended silently ({status})"}


def run_theme(theme: str, given: Given) -> list[dict[str, str]]:
    """Run a theme's attacks, in the order of their registration."""
    results = []
    for one in ATTACKS.values():
        if one.name.split(":")[0] != theme or (given["bare"] and not one.bare):
            continue
        started = time.monotonic()
        if one.needs and not given["machine"].get(one.needs):
            found = {"verdict": "absent", "detail": f"this machine has no {one.needs}"}
        else:
            found = _in_child(one, given) if one.forked else _attempt(one, given)
        results.append({"name": one.name, "proof": one.proof, **found, "took": f"{time.monotonic() - started:.1f}"})
        sys.stdout.flush()
    return results
