"""What the ledger admits, and what a charge costs: `python -m tests.benchmarks.ledger --json`.

A charge is what the guard does for one statistic: one transaction that reserves it and appends a leaf, and one that
commits it and appends another. The bare transaction writes the same rows through the database's own driver, in the
same two transactions, with the same durability (SQLite synchronous=FULL, PostgreSQL fsync on), and decides nothing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister_budget.database import Database, open_database
from cloister_budget.entries import ChargeSettled
from cloister_budget.filter import admits, limit_budgets
from cloister_budget.journal import Journal
from cloister_budget.ledger import Ledger, Reservation
from cloister_budget.log import AuditLog
from cloister_budget.loss import rdp_vector, tight_epsilon
from cloister_budget.orders import freeze
from cloister_data.mechanism import DiscreteLaplace, DpSgd, Mechanism
from cloister_data.policy import Limit
from tests.benchmarks.bare import BareDatabase, bare_database
from tests.benchmarks.figures import Figure, arguments, seconds, show, spread
from tests.benchmarks.past import fill
from tests.fakes.audited import believe, publish, reserved_leaf
from tests.fakes.ledgers import POPULATION, laplace, policy, ready, reservation
from tests.fakes.postgres import running_postgres

KINDS = ("sqlite", "postgresql")


def admitted(limit: Limit, mechanism: Mechanism) -> int:
    """How many such charges the filter admits, one after the other."""
    orders = freeze(limit)
    budgets, charge = limit_budgets(limit, orders), rdp_vector(mechanism, orders)
    spent, none, count = (0,) * len(orders), (0,) * len(orders), 0
    while admits(budgets, spent, none, charge):
        spent, count = tuple(a + b for a, b in zip(spent, charge, strict=True)), count + 1
    return count


def admissions() -> Iterator[Figure]:
    run, limit = DpSgd(noise_multiplier=1, sample_rate=0.01, steps=1000), Limit(epsilon=8, delta=1e-5)
    summed = 1
    while (summed + 1) * tight_epsilon(run, limit.delta / (summed + 1)) <= limit.epsilon:
        summed += 1
    yield Figure(
        "runs admitted at (8, 1e-5)", admitted(limit, run), "runs", 12, "higher",
        f"DP-SGD sigma 1, q .01, T 1000; as a sum of (epsilon, delta): {summed}",
    )  # fmt: skip
    one = admitted(Limit(epsilon=0.2, delta=1e-5), DiscreteLaplace(sensitivity=1, scale=5))
    yield Figure("Laplace releases of 0.2 under limit 0.2", one, "releases", 1, "higher")


class Clients:
    """A ledger at work as the guard uses it, its books with it. Each client is a user with an account of their own."""

    def __init__(self, database: Database, count: int) -> None:
        self.database = database
        users = {f"user{number}": 500.0 for number in range(count)}
        self.ledger: Ledger = ready(database, 500.0, **users)
        self._statistic = laplace("0.0001")
        self._log = AuditLog(Ed25519PrivateKey.from_private_bytes(bytes(32)), "benchmark/log", time.time)
        self._journal: Journal | None = Journal(self._log, believe)
        with database.write() as s:
            self._published = publish(s, self._journal, POPULATION, policy(500.0, **users))

    def restart(self) -> None:
        """As a guard that starts anew over a log that was filled by copying: without the books, which it breaks.

        The books hold nothing of a charge that is settled, so what they cost doesn't grow with the past.
        """
        self._log = AuditLog(Ed25519PrivateKey.from_private_bytes(bytes(32)), "benchmark/log", time.time)
        self._journal = None

    def wanted(self, client: int) -> Reservation:
        user = f"user{client}"
        return reservation([POPULATION, f"{POPULATION}:{user}"], self._statistic, user=user, epsilon=0.0001)

    def charge(self, client: int = 0) -> None:
        """Reserve and commit one statistic."""
        wanted = self.wanted(client)
        with self.database.write() as s:
            reserved = self.ledger.reserve(s, wanted)
            if self._journal is None:
                self._log.append(s, "charge-reserved", {"charge": reserved.charge_id, "request": wanted.request_digest})
            else:
                leaf = reserved_leaf(s, self._journal, self._published, wanted, reserved)
                self._journal.append(s, leaf)
        settled = ChargeSettled(charge=reserved.charge_id, state="committed", steps=None)
        with self.database.write() as s:
            self.ledger.commit(s, reserved.charge_id)
            if self._journal is None:
                self._log.append(s, settled.kind, settled)
            else:
                self._journal.append(s, settled)


def growth(fresh: Callable[[], str], kind: str, past: int, turns: int) -> Figure:
    """The cost of a charge beside `past` earlier ones, against that beside 1000, alternating."""
    sizes = (1000, past)
    with ExitStack() as stack:
        clients = []
        for size in sizes:
            database = open_database(fresh())
            stack.callback(database.close)
            found = Clients(database, 1)
            found.charge()
            fill(database, size)
            found.restart()
            clients.append(found)
        samples: tuple[list[float], list[float]] = ([], [])
        for client in clients:
            for _ in range(100):
                client.charge()
        for _ in range(turns):
            for client, taken in zip(clients, samples, strict=True):
                taken.append(seconds(client.charge))
    (few, *few_range), (many, *many_range) = spread(samples[0]), spread(samples[1])
    return Figure(
        f"{kind}: cost at {past} past charges / at 1000", many / few, "x", 1.2, "lower",
        f"medians {many * 1e3:.2f} ms ({many_range[0] * 1e3:.2f}-{many_range[1] * 1e3:.2f}) and "
        f"{few * 1e3:.2f} ms ({few_range[0] * 1e3:.2f}-{few_range[1] * 1e3:.2f}); "
        f"means {sum(samples[1]) / turns * 1e3:.2f} and {sum(samples[0]) / turns * 1e3:.2f} ms",
    )  # fmt: skip


def per_second(charge: Callable[[int], None], clients: int, lasting: float) -> float:
    """Charges per second of so many clients at once."""
    done = [0] * clients
    end = time.perf_counter() + lasting

    def work(client: int) -> None:
        while time.perf_counter() < end:
            charge(client)
            done[client] += 1

    with ThreadPoolExecutor(clients) as pool:
        taken = seconds(lambda: list(pool.map(work, range(clients))))
    return sum(done) / taken


def throughput(fresh: Callable[[], str], kind: str, clients: int, rounds: int, lasting: float) -> Iterator[Figure]:
    """Charges per second beside the bare transactions', alternating."""
    with ExitStack() as stack:
        url = fresh()
        database = open_database(url)
        stack.callback(database.close)
        ours = Clients(database, clients)
        ours.charge()
        bare: BareDatabase = stack.enter_context(bare_database(url, POPULATION, clients))
        per_second(ours.charge, clients, lasting / 2)
        per_second(bare.charge, clients, lasting / 2)
        rates = [(per_second(ours.charge, clients, lasting), per_second(bare.charge, clients, lasting))
                 for _ in range(rounds)]  # fmt: skip
    rate, low, high = spread([mine for mine, _ in rates])
    peer = spread([other for _, other in rates])[0]
    label = f"{kind}, {clients} client{'s' if clients > 1 else ''}"
    yield Figure(f"{label}: charges per second", rate, "1/s", None, "higher", f"quartiles {low:.0f}-{high:.0f}")
    cost, least, most = spread([other / mine for mine, other in rates])
    yield Figure(
        f"{label}: cost / bare transaction's", cost, "x", 3, "lower",
        f"quartiles {least:.2f}-{most:.2f}; bare: {peer:.0f} per second",
    )  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--past", type=int, default=1_000_000, help="past charges of the large ledger")
    parser.add_argument("--turns", type=int, default=400, help="charges timed on each ledger")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of throughput")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long a round of throughput lasts")
    parser.add_argument("--only", choices=("admissions", "throughput", "growth"), help="a part of the figures")
    chosen = parser.parse_args()

    def wanted(part: str) -> bool:
        return chosen.only in (None, part)

    if wanted("admissions"):
        show(admissions(), chosen.json)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ledger-")))
        files = iter(range(1000))
        makers: dict[str, Callable[[], str]] = {
            "sqlite": lambda: f"sqlite:///{folder / f'{next(files)}.db'}",
            "postgresql": stack.enter_context(running_postgres(durable=True)),
        }
        for kind in KINDS:
            if wanted("throughput"):
                for clients in (1, 32):
                    show(throughput(makers[kind], kind, clients, chosen.rounds, chosen.seconds), chosen.json)
            if wanted("growth"):
                show([growth(makers[kind], kind, chosen.past, chosen.turns)], chosen.json)


if __name__ == "__main__":
    main()
