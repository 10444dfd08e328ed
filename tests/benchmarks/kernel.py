"""A cloister's kernel beside a local one: `python -m tests.benchmarks.kernel --json`.

Both are driven through jupyter_client's KernelManager, alternating in the same run. The cloister's goes the whole way:
provisioner, verified session, TLS, guard, kernel service, and the kernel in a process of its own.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager

import cloister.session
from cloister_kernel.kernelspec import install_kernelspec
from tests.benchmarks.figures import Figure, arguments, seconds, show, spread
from tests.fakes.running import RunningCloister, running_cloister

USER = "ann"
REPLY_SECONDS = 120
POOL = 2
FILL_SECONDS = 8.0
"""What a pool gets to make ready the next kernel: a person doesn't start one right after the other, either."""
PRINTS = "for _ in range(1000): print('x' * 10_239)"
MANY_PRINTS = "for _ in range(10_000): print('x' * 1_023, flush=True)"
DISPLAY = "from IPython.display import display; display({'text/plain': 'x' * 10_485_760}, raw=True)"
TORCH = "import time; _t = time.perf_counter(); import torch; print(time.perf_counter() - _t)"


@dataclass
class Peer:
    """One kind of kernel, and what it took."""

    name: str
    specs: KernelSpecManager
    samples: dict[str, list[float]] = field(default_factory=dict)

    @contextlib.contextmanager
    def kernel(self) -> Iterator[BlockingKernelClient]:
        """A fresh kernel that has answered once; the time that this took is kept as `start`."""
        begun = time.perf_counter()
        manager = KernelManager(kernel_name=self.name, kernel_spec_manager=self.specs)
        manager.start_kernel()
        client = manager.client()
        client.start_channels()
        try:
            client.kernel_info(reply=True, timeout=REPLY_SECONDS)
            self.keep("start", time.perf_counter() - begun)
            client.wait_for_ready(timeout=REPLY_SECONDS)
            yield client
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)
            manager.context.destroy(linger=0)

    def keep(self, figure: str, sample: float) -> None:
        self.samples.setdefault(figure, []).append(sample)


def characters(client: BlockingKernelClient, code: str) -> int:
    """Run one cell to its idle status; returns how much text came out. Raises SystemExit where it failed."""
    count = 0

    def collect(message: dict[str, object]) -> None:
        nonlocal count
        content = message["content"]
        assert isinstance(content, dict)
        count += len(content.get("text") or content.get("data", {}).get("text/plain", ""))

    reply = client.execute_interactive(code, output_hook=collect, timeout=REPLY_SECONDS)
    if reply["content"]["status"] != "ok":
        raise SystemExit(f"{code!r} failed: {reply['content']}")
    return count


def compared(name: str, unit: str, goal: float | None, ours: list[float], local: list[float]) -> Figure:
    """The median of the ratios, turn by turn."""
    ratio, first, third = spread([one / other for one, other in zip(ours, local, strict=True)])
    (mine, *my_range), (peer, *its_range) = spread(ours), spread(local)
    scale = {"ms": 1e3, "s": 1.0}[unit]
    return Figure(
        name, ratio, "x", goal, "lower",
        f"quartiles {first:.2f}-{third:.2f}; median of {len(ours)}; {mine * scale:.3g} {unit} "
        f"({my_range[0] * scale:.3g}-{my_range[1] * scale:.3g}) and {peer * scale:.3g} {unit} "
        f"({its_range[0] * scale:.3g}-{its_range[1] * scale:.3g}), alternating",
    )  # fmt: skip


def living(turns: int, peers: tuple[Peer, Peer]) -> Iterator[Figure]:
    """What a kernel that runs does: round trips and output."""
    with peers[0].kernel() as ours, peers[1].kernel() as local:
        clients = (ours, local)
        for name, code, expected, goal, count in (
            ("round trip of 1+1", "1+1", 1, 1.5, turns * 10),
            ("10 MB in 1,000 prints", PRINTS, 10_240_000, 1.5, turns),
            ("10 MB in 10,000 flushed prints", MANY_PRINTS, 10_240_000, 1.5, turns),
            ("10 MB in one display", DISPLAY, 10_485_760, 1.5, turns),
        ):
            samples: tuple[list[float], list[float]] = ([], [])
            lost = [0, 0]
            for turn in range(-2, count):
                for which in (0, 1) if turn % 2 else (1, 0):
                    begun = time.perf_counter()
                    came = characters(clients[which], code)
                    if turn >= 0:
                        samples[which].append(time.perf_counter() - begun)
                        lost[which] += expected - came
            if lost[0]:
                raise SystemExit(f"{name}: {lost[0]} characters didn't come from the cloister's kernel")
            figure = compared(f"{name} / local", "ms", goal, *samples)
            if lost[1]:
                figure = Figure(
                    **vars(figure) | {"detail": f"{figure.detail}; the local kernel lost {lost[1]} of them"}
                )
            yield figure


def starting(turns: int, peers: tuple[Peer, Peer], name: str, goal: float, pause: float = 0.0) -> Iterator[Figure]:
    """From the wish for a kernel to its first answer."""
    for peer in peers:
        peer.samples.clear()
    for turn in range(turns):
        for peer in peers if turn % 2 else reversed(peers):
            with peer.kernel():
                pass
        time.sleep(pause)
    yield compared(f"{name} / local", "s", goal, peers[0].samples["start"], peers[1].samples["start"])


def laptop_side(turns: int) -> Iterator[Figure]:
    """What of a start is the laptop's: the verified session, which a start opens anew."""
    samples = []
    for _ in range(turns):
        begun = time.perf_counter()
        cloister.session.open(USER).close()
        samples.append(time.perf_counter() - begun)
    middle, first, third = spread(samples)
    yield Figure(
        "of a start: the laptop's verified session", middle * 1e3, "ms", None, "lower",
        f"quartiles {first * 1e3:.1f}-{third * 1e3:.1f}; median of {turns}",
    )  # fmt: skip


def torch(turns: int, peer: Peer, pause: float) -> Iterator[Figure]:
    """`import torch` in a kernel from the pool, as the kernel itself sees it."""
    samples = []
    for _ in range(turns):
        time.sleep(pause)
        with peer.kernel() as client:
            samples.append(seconds(lambda client=client: characters(client, "import torch")))  # type: ignore[misc]
    middle, first, third = spread(samples)
    yield Figure(
        "import torch in a warm kernel", middle, "s", 0.1, "lower",
        f"quartiles {first:.3f}-{third:.3f}; median of {turns}",
    )  # fmt: skip


@contextlib.contextmanager
def cloister_with(pool: int) -> Iterator[tuple[RunningCloister, tuple[Peer, Peer]]]:
    """A cloister with so many kernels in reserve, its user's kernelspec, and the local peer."""
    with running_cloister(extra=f"kernel_pool = {pool}" if pool else "") as found:
        found.add_user(USER, "scientist")
        found.session(USER)
        data = found.base / "jupyter"
        install_kernelspec(USER, directory=data)
        specs = KernelSpecManager(kernel_dirs=[str(Path(data) / "kernels")], ensure_native_kernel=False)
        yield found, (Peer(f"cloister-{USER}", specs), Peer("python3", KernelSpecManager()))


def figures(turns: int, starts: int) -> Iterator[Figure]:
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    with cloister_with(0) as (_, peers):
        yield from living(turns, peers)
        yield from starting(starts, peers, "start to first reply, cold", 1.2)
        yield from laptop_side(turns)
    try:
        with cloister_with(POOL) as (_, peers):
            time.sleep(FILL_SECONDS)
            yield from starting(starts, peers, "start to first reply, warm pool", 0.2, FILL_SECONDS)
            yield from torch(starts, peers[0], FILL_SECONDS)
    except AssertionError as error:
        reason = next(line for line in reversed(str(error).splitlines()) if line.strip())
        sys.stderr.write(f"NOT MEASURED: kernels from a warm pool. The guard refuses kernel_pool: {reason}\n")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--turns", type=int, default=10, help="how often output is timed; round trips ten times")
    parser.add_argument("--starts", type=int, default=8, help="how many kernels are started for a figure")
    chosen = parser.parse_args()
    show(figures(chosen.turns, chosen.starts), chosen.json)


if __name__ == "__main__":
    main()
