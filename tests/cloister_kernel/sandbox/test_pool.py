"""Warm kernels: each is given to one user, once, as fresh as it was made."""

from __future__ import annotations

import asyncio
from typing import Any

from cloister_kernel import pool as pools
from cloister_kernel.pool import Pool
from cloister_kernel.sandbox import process
from cloister_kernel.spawner import Prepared
from tests.cloister_kernel.sandbox.scenes import Stage, needs_root, play

pytestmark = needs_root


async def full(pool: Pool, size: int) -> list[Prepared]:
    async with asyncio.timeout(60):
        while pool.warm < size:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return list(pool._ready)


async def lives(stage: Stage) -> dict[str, Any]:
    # What is imported is another test's matter; here it would cost time.
    process.SHIM = f"from cloister_kernel.sandbox import shim; shim.WARM = ('json.tool',); {process.SHIM}"
    pools.PAUSE_SECONDS = 0.05
    found: dict[str, Any] = {}
    logged: list[str] = []
    pool = Pool(stage.spawner, 2, lambda text, **_: logged.append(text))
    pool.open()
    first = await full(pool, 2)
    running = {each.kernel: stage.spawner._kernels[each.kernel] for each in first}
    found["untouched"] = [(kernel.user, kernel.holds_home) for kernel in running.values()]
    found["nobody's home"] = list((stage.runtime / "h").iterdir()) == []
    taken = [await pool.take() for _ in range(3)]
    found["each once"] = len({each.kernel for each in taken}) == len({each.uid for each in taken}) == 3
    found["warm, warm, cold"] = [each.warm for each in taken]
    found["the oldest first"] = taken[:2] == first
    cell = await stage.start(prepared=taken[0])
    found["is imported"] = await cell.run("import sys; print('json.tool' in sys.modules)")
    found["in a home"] = await cell.run("import os; print(os.getcwd(), os.environ['USER'], os.listdir('.'))")
    await cell.end()
    await stage.idle()
    refilled = await full(pool, 2)
    known = {each.kernel for each in (*first, *taken)}
    found["never back"] = not known & {each.kernel for each in refilled}
    found["fresh uids"] = len({each.uid for each in (*taken, *refilled)}) == 5
    # One that died while it waited is given to nobody.
    dead = stage.spawner._kernels[refilled[0].kernel].running
    dead.process.kill()
    await dead.process.wait()
    found["not a dead one"] = await pool.take() == refilled[1]
    found["buried"] = refilled[0].kernel not in stage.spawner._kernels
    await full(pool, 2)
    # Where none can be made the pool goes on trying, and who asks is told why.
    shim, process.SHIM = process.SHIM, "raise SystemExit(3)"
    for _ in range(2):
        await stage.spawner.discard(await pool.take())
    while "no warm kernel" not in logged:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    process.SHIM = shim
    await pool.close()
    found["none is left"] = [
        key for key in stage.spawner._kernels if key not in {each.kernel for each in (*taken, *refilled)}
    ]
    return found


def test_each_is_given_once_and_never_again() -> None:
    assert play(lives) == {
        "untouched": [[None, False], [None, False]],
        "nobody's home": True,
        "each once": True,
        "warm, warm, cold": [True, True, False],
        "the oldest first": True,
        "is imported": "True\n",
        "in a home": "/home/cloister ann []\n",
        "never back": True,
        "fresh uids": True,
        "not a dead one": True,
        "buried": True,
        "none is left": [],
    }


async def imports(stage: Stage) -> str:
    cell = await stage.start(prepared=await stage.spawner.prepare(warm=True))
    text = await cell.run(
        "import sys; print([name in sys.modules for name in ('torch', 'pandas', 'cloister', 'sqlalchemy')])"
    )
    # What was imported before there was a notebook shows its plots in it all the same.
    text += await cell.run("import matplotlib.pyplot as plt; _ = plt.plot([1, 2])")
    await cell.end()
    return text


def test_a_warm_kernel_has_the_usual_imports_done_and_shows_plots() -> None:
    assert play(imports) == "[True, True, True, False]\n<Figure size 640x480 with 1 Axes>"
