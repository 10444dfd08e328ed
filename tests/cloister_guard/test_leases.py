"""What witnesses lend: keys that end, signatures that only go forward, and waiting for them."""

from __future__ import annotations

import asyncio

import pytest

from cloister_data.errors import StorageError, UnavailableError
from cloister_guard.datasets.keys import KeyRing, LentKey
from cloister_guard.leases import Leases

A, B = b"a" * 32, b"b" * 32
KEY = b"k" * 32


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def leases(clock: Clock) -> Leases:
    return Leases(10.0, clock)


def test_a_key_ends_with_its_lease_also_before_anybody_looks(leases: Leases, clock: Clock) -> None:
    with pytest.raises(UnavailableError):
        leases.key("clinic")
    assert leases.renew("clinic", A, 5, "line", KEY) is True
    assert leases.renew("clinic", A, 5, "line", KEY) is False
    clock.now = 9.9
    assert leases.key("clinic") == KEY
    clock.now = 10.0
    with pytest.raises(UnavailableError):
        leases.key("clinic")
    assert leases.expire() == ["clinic"]
    assert leases.expire() == []
    # A call without a key renews nothing.
    assert leases.renew("clinic", A, 6, "line 6", None) is False
    with pytest.raises(UnavailableError):
        leases.key("clinic")
    assert leases.renew("clinic", A, 6, "line 6", KEY) is True


def test_signatures_go_forward_and_belong_to_one_witness(leases: Leases) -> None:
    leases.renew("clinic", A, 5, "five", KEY)
    leases.renew("clinic", A, 3, "three", KEY)
    held = leases.of("clinic")
    assert held is not None
    assert (held.cosigned, held.line) == (5, "five")
    leases.renew("clinic", B, 2, "two", None)
    held = leases.of("clinic")
    assert held is not None
    assert (held.witness, held.cosigned, held.key) == (B, 2, None)
    leases.drop("clinic")
    assert leases.of("clinic") is None


def test_an_answer_waits_for_all_of_its_witnesses(leases: Leases) -> None:
    async def work() -> list[bool]:
        early = await leases.cosigned(["clinic", "lab"], 5, 0.05)
        waiting = asyncio.create_task(leases.cosigned(["clinic", "lab"], 5, 5))
        await asyncio.sleep(0)
        await asyncio.to_thread(leases.renew, "clinic", A, 5, "", None)
        await asyncio.sleep(0.05)
        half = waiting.done()
        await asyncio.to_thread(leases.renew, "lab", B, 9, "", None)
        return [early, half, await waiting, await leases.cosigned([], 5, 0.05)]

    assert asyncio.run(work()) == [False, False, True, True]


def test_what_is_made_from_several_owners_data_opens_with_all_of_their_keys_alone() -> None:
    lent: dict[str, bytes | None] = {"clinic": A, "lab": B, "open": None}
    machine = LentKey(b"m" * 32)
    ring = KeyRing(machine, lambda owner: lent[owner])
    for owners in (["clinic"], ["clinic", "lab"], ["open"], ["open", "clinic"], []):
        sealed = ring.wrap(b"secret", b"context", owners)
        assert ring.unwrap(sealed, b"context", owners[::-1]) == b"secret"
        for other in (["clinic"], ["clinic", "lab"], ["open"], ["open", "clinic"]):
            if set(other) != set(owners) and not ({*other, *owners} <= {"open"}):
                with pytest.raises(StorageError):
                    ring.unwrap(sealed, b"context", other)
        with pytest.raises(StorageError):
            ring.unwrap(sealed, b"another", owners)
    # Who has a witness needs nothing of the machine: its key file opens nothing of theirs.
    with pytest.raises(StorageError):
        machine.unwrap(ring.wrap(b"secret", b"context", ["clinic"]), b"context")
    assert ring.split_secret("open") is None
    assert ring.split_secret("clinic") != ring.split_secret("lab")
