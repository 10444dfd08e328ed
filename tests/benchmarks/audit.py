"""What the audit log costs, and how fast it is verified offline: `python -m tests.benchmarks.audit --json`.

The exported log is of two hundred users who ask ten kinds of statistics and train now and then; its evidence is of
simulated hardware. A charge's transactions with the log and the guard's books are timed beside the same ones without.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister import logexport
from cloister.receipts import ReceiptFile
from cloister_attest.binding import report_data
from cloister_attest.channel import make_server_identity
from cloister_attest.collect import simulated_hardware
from cloister_attest.evidence import Evidence, EvidenceRecord
from cloister_budget import merkle
from cloister_budget.database import Database, open_database
from cloister_budget.entries import (
    AccountLimit,
    ChargedSource,
    ChargeReserved,
    ChargeSettled,
    Entry,
    GuardStarted,
    LeafBody,
    LimitsSet,
    PolicySet,
    PopulationLoss,
    PopulationOpened,
    Released,
    Uploaded,
    in_leaves,
)
from cloister_budget.loss import rdp_vector
from cloister_budget.orders import freeze
from cloister_data.checkpoint import Checkpoint, sign_checkpoint
from cloister_data.mechanism import DiscreteLaplace, DpSgd, Mechanism
from cloister_data.policy import Limit
from cloister_data.release import Receipt, ReceiptContent, SourceVersion
from tests.benchmarks.figures import Figure, arguments, seconds, show, spread
from tests.benchmarks.ledger import KINDS, Clients
from tests.fakes.postgres import running_postgres

ORIGIN = "cloister/benchmark"
USERS = 200
LIMIT = Limit(epsilon=1000, delta=1e-5)
ORDERS = freeze(LIMIT)
STATISTICS: list[Mechanism] = [DiscreteLaplace(sensitivity=1, scale=10_000 + each) for each in range(10)]
TRAINING = DpSgd(noise_multiplier=60, sample_rate=0.001, steps=1000)


def digest(*of: object) -> str:
    return hashlib.sha256(repr(of).encode()).hexdigest()


class Log:
    """A log as a guard leaves it, with its key and its evidence."""

    def __init__(self, folder: Path) -> None:
        self.key = Ed25519PrivateKey.generate()
        self.hardware = simulated_hardware(folder)
        identity = make_server_identity("benchmark")
        log_key = self.key.public_key().public_bytes_raw()
        empty = sign_checkpoint(Checkpoint(ORIGIN, 0, merkle.EMPTY_ROOT), self.key)
        bound = report_data(identity.spki, bytes(32), b"", empty.encode(), log_key)
        report, certificates = self.hardware.collect(bound)
        evidence = Evidence(
            platform="simulated", report=report, certificates=certificates, checkpoint=empty, log_key=log_key
        )
        self.record = EvidenceRecord(evidence=evidence, nonce=bytes(32), certificate=identity.certificate_der)
        self.began = int(time.time()) // 60 * 60

    def entries(self, count: int) -> Iterator[Entry]:
        key, people, data = "ab" * 32, digest("people"), digest("data")
        users = [digest("user", each) for each in range(USERS)]
        limits = [AccountLimit(account=digest("all"), scope="population", part=0, limit=LIMIT, members=())]
        limits += [
            AccountLimit(account=digest("of", user), scope="user", part=0, limit=LIMIT, members=(user,))
            for user in users
        ]
        pieces = list(in_leaves(limits))
        first: list[Entry] = [
            GuardStarted(
                evidence=self.record.evidence.digest(),
                platform="simulated",
                log_key=self.record.evidence.log_key.hex(),
                previous_key=None,
                certificate=hashlib.sha256(self.record.certificate).hexdigest(),
            ),
            PopulationOpened(
                population=people, owner=digest("owner"), owner_key=key, orders=ORDERS.finite, shares=ORDERS.shares,
                parts=1, statement=None,
            ),
            Uploaded(
                dataset=data, version=1, population=people, data_schema=digest("s"), units=1000, owner_key=key,
                keys="file",
            ),
            PolicySet(dataset=data, version=1, policy=digest("policy"), owner_key=key, limits=len(pieces)),
            *(LimitsSet(dataset=data, version=1, limits=piece) for piece in pieces),
        ]  # fmt: skip
        yield from first
        source = ChargedSource(
            dataset=data, version=1, data_schema=digest("s"), policy_version=1, policy=digest("policy"), part=None
        )
        for number in range((count - len(first)) // 2):
            user = users[number * 7 % USERS]
            training = number % 100 == 99
            mechanism = TRAINING if training else STATISTICS[number // USERS % len(STATISTICS)]
            charge = f"{number:032x}"
            accounts = (digest("all"), digest("of", user))
            loss = PopulationLoss(population=people, loss=rdp_vector(mechanism, ORDERS), accounts=accounts)
            steps = TRAINING.steps if training else None
            yield ChargeReserved(
                charge=charge, user=user, operation="train" if training else "count", request=digest("q", number),
                sandbox=None, sources=(source,), mechanism=mechanism, epsilon=0.0001, delta=1e-6, losses=(loss,),
                direct=0, steps=steps,
            )  # fmt: skip
            if number % 10 == 3:
                yield ChargeSettled(charge=charge, state="committed", steps=steps)
            else:
                yield Released(release=charge, charge=charge, receipt=digest("receipt", number), steps=steps)

    def export(self, directory: Path, count: int) -> None:
        """Write the log's export, as `cloister audit export` does."""
        directory.mkdir()
        tree = merkle.Growing()
        with (directory / "entries.jsonl").open("wb") as file:
            for index, entry in enumerate(self.entries(count)):
                payload = LeafBody(index=index, at=self.began + index // 1000 * 60, facts=entry).canonical()
                tree.add(merkle.leaf_hash(payload))
                file.write(payload + b"\n")
        (directory / "names.jsonl").write_bytes(b"")
        (directory / "evidence.jsonl").write_bytes(self.record.to_json() + b"\n")
        note = sign_checkpoint(Checkpoint(ORIGIN, tree.size, tree.root()), self.key)
        (directory / "checkpoint").write_text(note, "utf-8")

    def receipt(self, size: int) -> ReceiptFile:
        """A receipt whose entry is the last of a log of `size` entries."""
        source = SourceVersion(
            dataset="hosp/people", version=1, policy_version=1, population="hosp/people", division=None
        )
        content = ReceiptContent(
            release="0" * 32, charge="1" * 32, user="ann", request=digest("q"), sources=(source,), adjacency="zero-out",
            mechanism=STATISTICS[0], epsilon=0.1, delta=1e-6, evidence=self.record.evidence.digest(), simulated=True,
            issued=self.began + 60, witnesses=(),
        )  # fmt: skip
        released = Released(release="0" * 32, charge="1" * 32, receipt=content.digest(), steps=None)
        payload = LeafBody(index=size - 1, at=self.began, facts=released).canonical()
        # Of the others only the hashes of whole subtrees are needed, and any will do.
        known: dict[tuple[int, int], bytes] = {}

        def read(level: int, place: int) -> bytes:
            if (level, place) == (0, size - 1):
                return merkle.leaf_hash(payload)
            return known.setdefault((level, place), hashlib.sha256(b"%d/%d" % (level, place)).digest())

        inclusion = tuple(merkle.inclusion_proof(size - 1, size, read))
        root = merkle.root_of_inclusion(merkle.leaf_hash(payload), size - 1, size, inclusion)
        note = sign_checkpoint(Checkpoint(ORIGIN, size, root), self.key)
        receipt = Receipt(
            **dict(content), leaf=size - 1, entry=payload, inclusion=inclusion, checkpoint=note,
            log_key=self.record.evidence.log_key, witnessed=(), rollback="not prevented",
        )  # fmt: skip
        return ReceiptFile(receipt=receipt, evidence=self.record)


def offline(folder: Path, leaves: int, rounds: int) -> Iterator[Figure]:
    log = Log(folder)
    policy = log.hardware.trust()
    directory = folder / "export"
    log.export(directory, leaves)
    rates: list[float] = []
    found = None
    for _ in range(rounds):
        begun = time.perf_counter()
        found = logexport.verify(directory, policy)
        rates.append(found.checkpoint.size / (time.perf_counter() - begun))
    rate, low, high = spread(rates)
    yield Figure(
        f"full offline verification of {found.checkpoint.size if found else 0} entries", rate, "entries/s", 50_000,
        "higher", f"tree, balances, limits, evidence; quartiles {low:.0f}-{high:.0f}",
    )  # fmt: skip
    path = folder / "receipt.json"
    path.write_bytes(log.receipt(leaves - 1).to_json())
    times = [seconds(lambda: ReceiptFile.from_json(path.read_bytes()).verify(policy)) for _ in range(200)]
    middle, low, high = spread(times)
    yield Figure(
        "a receipt verifies", middle * 1e3, "ms", 20, "lower",
        f"file, hardware evidence, signatures, proof; quartiles {low * 1e3:.2f}-{high * 1e3:.2f}",
    )  # fmt: skip


class Unlogged(Clients):
    """The same charges without the log and the books."""

    def charge(self, client: int = 0) -> None:
        with self.database.write() as s:
            charge = self.ledger.reserve(s, self.wanted(client)).charge_id
        with self.database.write() as s:
            self.ledger.commit(s, charge)


def appending(fresh: Callable[[], str], kind: str, turns: int) -> Figure:
    """A charge's two transactions with the log, against those without, alternating."""
    with ExitStack() as stack:

        def opened() -> Database:
            database = open_database(fresh())
            stack.callback(database.close)
            return database

        logged, bare = Clients(opened(), 1), Unlogged(opened(), 1)
        for _ in range(100):
            logged.charge()
            bare.charge()
        samples: tuple[list[float], list[float]] = ([], [])
        for _ in range(turns):
            samples[0].append(seconds(logged.charge))
            samples[1].append(seconds(bare.charge))
    (ours, *ours_range), (without, *without_range) = spread(samples[0]), spread(samples[1])
    return Figure(
        f"{kind}: a charge with the log / without", ours / without, "x", 1.3, "lower",
        f"medians {ours * 1e3:.2f} ms ({ours_range[0] * 1e3:.2f}-{ours_range[1] * 1e3:.2f}) and "
        f"{without * 1e3:.2f} ms ({without_range[0] * 1e3:.2f}-{without_range[1] * 1e3:.2f})",
    )  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--leaves", type=int, default=1_000_000, help="entries of the exported log")
    parser.add_argument("--rounds", type=int, default=3, help="how often the export is verified")
    parser.add_argument("--turns", type=int, default=400, help="charges timed with and without the log")
    chosen = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="audit-")))
        files = iter(range(1000))
        makers: dict[str, Callable[[], str]] = {
            "sqlite": lambda: f"sqlite:///{folder / f'{next(files)}.db'}",
            "postgresql": stack.enter_context(running_postgres(durable=True)),
        }
        for kind in KINDS:
            show([appending(makers[kind], kind, chosen.turns)], chosen.json)
        show(offline(folder, chosen.leaves, chosen.rounds), chosen.json)


if __name__ == "__main__":
    main()
