"""What an owner's witness adds to an answer on loopback: `python -m tests.benchmarks.witness --json`.

The same question to two datasets of the same rows in one cloister, alternating: one owner has a witness, one has none.
"""

from __future__ import annotations

import secrets

from cloister.transport import Transport
from cloister_data.datasets import SplitRef
from cloister_data.release import Release
from cloister_data.statistics import QueryRequest, Question
from tests.benchmarks.figures import Figure, arguments, seconds, show, spread
from tests.fakes import witnesses
from tests.fakes.data import PEOPLE, people
from tests.fakes.running import make_policy, running_cloister
from tests.fakes.witnesses import serving_process, until, view

WITNESSED, OPEN = "clinic/people", "open/people"


def ask(transport: Transport, dataset: str) -> Release:
    question = Question(source=SplitRef(dataset=dataset), operation="count")
    wanted = QueryRequest(request_id=secrets.token_hex(16), question=question, epsilon=0.01)
    return transport.call("POST", "/queries", wanted, Release)


def added(turns: int) -> Figure:
    """The median answer with a witness, less the one without, in milliseconds."""
    with running_cloister() as cloister_:
        cloister_.add_user("ann", "scientist")
        witnesses.init(cloister_, "clinic")
        owner = cloister_.session("clinic")
        with serving_process("--profile", "clinic", log=cloister_.base / "witness.log"):
            until(lambda: view(owner).unlocked)
            for dataset in (WITNESSED, OPEN):
                cloister_.upload(dataset, people(1000), PEOPLE, make_policy(dataset, {"ann": 50.0}))
            transport = cloister_.session("ann").transport
            for dataset in (WITNESSED, OPEN):
                ask(transport, dataset)
            samples: tuple[list[float], list[float]] = ([], [])
            for _ in range(turns):
                samples[0].append(seconds(lambda: ask(transport, WITNESSED)))
                samples[1].append(seconds(lambda: ask(transport, OPEN)))
    (with_it, *range_with), (without, *range_without) = spread(samples[0]), spread(samples[1])
    return Figure(
        "what a witness adds to an answer", (with_it - without) * 1e3, "ms", 50, "lower",
        f"medians {with_it * 1e3:.0f} ms ({range_with[0] * 1e3:.0f}-{range_with[1] * 1e3:.0f}) and "
        f"{without * 1e3:.0f} ms ({range_without[0] * 1e3:.0f}-{range_without[1] * 1e3:.0f})",
    )  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--turns", type=int, default=40, help="answers timed with and without a witness")
    chosen = parser.parse_args()
    show([added(chosen.turns)], chosen.json)


if __name__ == "__main__":
    main()
