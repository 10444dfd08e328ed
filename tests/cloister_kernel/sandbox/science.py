"""A data scientist's day in one process, started under both layers: prints a line of JSON for each thing that works."""

import asyncio
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.shared_memory import SharedMemory


def square(x: int) -> int:
    return x * x


def filtered() -> object:
    try:
        socket.socket(socket.AF_INET)
    except OSError as error:
        return error.strerror
    return "no filter"


def ruled() -> object:
    try:
        os.listdir("/")
    except OSError as error:
        return error.strerror
    return "no ruleset"


def numpy() -> object:
    import numpy as np

    return int((np.eye(200) @ np.ones((200, 200))).sum())


def pandas() -> object:
    import pandas as pd

    pd.DataFrame({"a": [1, 2, 3]}).to_parquet("x.parquet")
    return int(pd.read_parquet("x.parquet")["a"].sum())


def sklearn() -> object:
    import numpy as np
    from joblib import Parallel, delayed
    from sklearn.linear_model import LogisticRegression

    x = np.arange(20.0).reshape(-1, 1)
    LogisticRegression().fit(x, x[:, 0] > 9)
    return Parallel(n_jobs=2)(delayed(square)(i) for i in range(4))


def matplotlib() -> object:
    import matplotlib.pyplot as plt

    plt.plot([1, 2])
    plt.savefig("plot.png")
    return os.path.getsize("plot.png") > 1000


def torch() -> object:
    import torch as t
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(t.arange(40.0).reshape(20, 2))
    model = t.nn.Linear(2, 1)
    optimizer = t.optim.Adam(model.parameters())
    model(data.tensors[0]).sum().backward()
    optimizer.step()
    t.save(model.state_dict(), "model.pt")
    t.load("model.pt", weights_only=True)
    return sum(batch[0].sum().item() for batch in DataLoader(data, batch_size=5, num_workers=2))


def pools() -> object:
    results = []
    for method in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            results.append(pool.map(square, range(3)))
    with multiprocessing.Manager() as manager:
        results.append(list(manager.list([7])))
    return results


def shared_memory() -> object:
    memory = SharedMemory(create=True, size=64)
    memory.buf[0] = 5
    value = memory.buf[0]
    memory.close()
    memory.unlink()
    return value


def threads() -> object:
    with ThreadPoolExecutor(8) as pool:
        return sum(pool.map(square, range(5)))


def shell() -> object:
    script = "mkdir -p d && touch d/f && cp -a d e && tar czf d.tgz d && mv d.tgz g.tgz && ls e | sort && id -u"
    return subprocess.run(script, shell=True, capture_output=True, text=True, check=True).stdout.split()[0]


def pip() -> object:
    return subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=True).returncode


def sqlite() -> object:
    with sqlite3.connect("x.db") as database:
        database.execute("pragma journal_mode=wal")
        database.execute("create table t(a)")
        database.execute("insert into t values (3)")
        return database.execute("select a from t").fetchone()[0]


def event_loop() -> object:
    async def echo() -> bytes:
        process = await asyncio.create_subprocess_exec("echo", "hi", stdout=asyncio.subprocess.PIPE)
        return (await process.communicate())[0]

    return asyncio.run(echo()).decode()


def timers() -> object:
    heard: list[int] = []
    signal.signal(signal.SIGALRM, lambda number, _frame: heard.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    deadline = time.monotonic() + 10
    while not heard and time.monotonic() < deadline:
        time.sleep(0.001)
    return heard


def copies() -> object:
    os.makedirs("tree/a")
    shutil.copytree("tree", "tree2")
    return shutil.disk_usage(".").total > 0 and os.listdir("tree2")


WORK: dict[str, Callable[[], object]] = {
    work.__name__: work
    for work in (
        *(filtered, ruled, numpy, pandas, sklearn, matplotlib, torch, pools, shared_memory, threads, shell, pip),
        *(sqlite, event_loop, timers, copies),
    )
}


def main() -> None:
    for name, work in WORK.items():
        try:
            found = work()
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        print(json.dumps([name, found]), flush=True)


if __name__ == "__main__":
    main()
