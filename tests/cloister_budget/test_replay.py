"""A log that is read again: whatever the bytes, the fast way comes to what parsing every entry comes to."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cloister_budget.books import Books, BooksError
from cloister_budget.entries import ChargeSettled, Entry, GuardStarted, LeafBody, Login, Released
from cloister_budget.merkle import Growing, leaf_hash
from cloister_budget.replay import Replay
from cloister_data.mechanism import DiscreteLaplace
from tests.cloister_budget.test_books import TRAINING, limits, opened, policy, ref, reserved, uploaded

SMALL = DiscreteLaplace(sensitivity=1, scale=500)


def charge(number: int) -> str:
    return f"{number:032x}"


ENTRIES: list[Entry] = [
    GuardStarted(
        evidence=ref("e"), platform="simulated", log_key="aa" * 32, previous_key=None, certificate=ref("certificate")
    ),
    opened(), uploaded(), policy(), limits(),
    reserved(1, SMALL), Released(release="0" * 32, charge=charge(1), receipt=ref("r1"), steps=None),
    reserved(2, SMALL, request=ref("q2")), reserved(3, TRAINING), Login(user=ref("ann")),
    Released(release="1" * 32, charge=charge(2), receipt=ref("r2"), steps=None),
    ChargeSettled(charge=charge(3), state="committed", steps=30),
    reserved(4, SMALL, request=ref("q4")), ChargeSettled(charge=charge(4), state="released", steps=None),
    reserved(5, SMALL, request=ref("q5")), ChargeSettled(charge=charge(5), state="committed", steps=None),
]  # fmt: skip


def payloads(entries: list[Entry]) -> list[bytes]:
    return [LeafBody(index=n, at=60 * n, facts=entry).canonical() for n, entry in enumerate(entries)]


WHOLE = payloads(ENTRIES)


def parsed(log: list[bytes]) -> tuple[Books, bytes] | int:
    """(the books, the root) by parsing every entry; or the index of the first that doesn't hold."""
    books, tree = Books(), Growing()
    for index, payload in enumerate(log):
        try:
            leaf = LeafBody.from_json(payload)
            if leaf.canonical() != payload:
                return index
            books.apply(leaf)
        except (ValidationError, BooksError):
            return index
        tree.add(leaf_hash(payload))
    return books, tree.root()


def replayed(log: list[bytes]) -> tuple[Books, bytes] | int:
    replay = Replay()
    for index, payload in enumerate(log):
        try:
            replay.add(payload)
        except BooksError as error:
            if error.leaf != index:
                raise
            return index
    return replay.books, replay.tree.root()


def same(log: list[bytes]) -> None:
    fast, slow = replayed(log), parsed(log)
    if isinstance(fast, int) or isinstance(slow, int):
        assert fast == slow
        return
    assert fast[1] == slow[1]
    assert (fast[0].held, fast[0].open_charges) == (slow[0].held, slow[0].open_charges)


def test_a_whole_log_comes_to_the_same_balances_and_root() -> None:
    same(WHOLE)
    assert not isinstance(replayed(WHOLE), int)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_however_an_entry_is_altered_both_ways_agree(data: st.DataObject) -> None:
    log = list(WHOLE)
    number = data.draw(st.integers(0, len(log) - 1))
    payload = bytearray(log[number])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(payload) - 1))
        what = data.draw(st.sampled_from(["flip", "drop", "double", "digit"]))
        if what == "flip":
            payload[at] = data.draw(st.integers(0, 255))
        elif what == "drop":
            del payload[at]
        elif what == "double":
            payload[at:at] = payload[max(0, at - data.draw(st.integers(1, 80))) : at]
        else:
            payload[at] = ord(data.draw(st.sampled_from("0123456789abcdef")))
    log[number] = bytes(payload)
    same(log)


def test_what_only_looks_like_a_known_form_is_refused() -> None:
    last = WHOLE[-2]
    request = b'"request":"' + ref("q5").encode() + b'"'
    assert request in last
    forged = [
        last.replace(request, request + request),
        last.replace(request, request + b"," + request),
        last.replace(request, b""),
        last.replace(request, b'"request":""'),
        last.replace(b'"charge":"', b'"charge":"' + charge(9).encode() + b'","charge":"'),
        last.replace(b'"v":1', b'"v":1 '),
        last.replace(b'"at":', b'"at":0'),
        last + b"\n",
    ]
    for payload in forged:
        log = [*WHOLE[:-2], payload]
        assert replayed(log) == len(WHOLE) - 2 == parsed(log)
