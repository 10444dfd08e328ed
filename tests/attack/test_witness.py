"""An owner's witness: nothing leaves that it hasn't signed for, and no log that was set back gets the keys."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import cloister_guard.witness
from cloister.mirror import Mirror, MirrorState
from cloister.profile import Profile, read_wire
from cloister.receipts import fetch
from cloister.witness import keys_of
from cloister_budget.database import open_database
from cloister_budget.journal import Journal
from cloister_budget.log import AuditLog
from cloister_budget.receipts import ReceiptError, verify_receipt
from cloister_data.cosignature import witness_name
from cloister_data.datasets import DatasetList, SplitRef
from cloister_data.errors import (
    AttestationRefusedError,
    AuthenticationError,
    CloisterError,
    ConflictError,
    PolicyRefusedError,
    StorageError,
    UnavailableError,
)
from cloister_data.owner import public_bytes, sign_terms
from cloister_data.release import Release, ReleaseList
from cloister_data.statistics import QueryRequest, Question
from cloister_data.terms import OwnerTerms, OwnerView, TermsRequest
from cloister_data.witness import SignedCall, WitnessAnswer, WitnessCall, sign_call, unlock_digest
from cloister_guard.counts import Counts
from cloister_guard.identity import Caller
from cloister_guard.leases import Leases
from cloister_guard.owners import Owners
from cloister_guard.witness import WitnessDesk
from tests.cloister_guard.test_jobs import make_plan, network, send_model, submit, used, wait
from tests.fakes import witnesses
from tests.fakes.audited import begin, believe
from tests.fakes.data import PEOPLE, people
from tests.fakes.running import RunningCloister, make_policy, running_cloister
from tests.fakes.witnesses import Serving, until

OWNER, DATASET = "clinic", "clinic/people"
LEASE = "lease_seconds = 2.0\n"


class House:
    """A cloister with one dataset that its owner's witness guards, and one of an owner without."""

    def __init__(self, cloister_: RunningCloister) -> None:
        self.cloister = cloister_
        cloister_.add_user("ann", "scientist")
        witnesses.init(cloister_, OWNER)
        with self.witness():
            cloister_.upload(DATASET, people(600), PEOPLE, make_policy(DATASET, {"ann": 30.0}))

    @property
    def profile(self) -> Profile:
        """Of the owner; a cloister that was restarted has another address."""
        return self.cloister.session(OWNER).profile

    @contextlib.contextmanager
    def witness(self) -> Iterator[Serving]:
        with witnesses.serving(self.profile, owner=OWNER) as found:
            until(lambda: found.error or self.view().unlocked)
            yield found

    def view(self) -> OwnerView:
        return witnesses.view(self.cloister.session(OWNER))

    def ask(self, dataset: str = DATASET, request: str | None = None) -> Release:
        question = Question(source=SplitRef(dataset=dataset), operation="count")
        wanted = QueryRequest(request_id=request or secrets.token_hex(16), question=question, epsilon=0.1)
        return self.cloister.session("ann").transport.call("POST", "/queries", wanted, Release)

    def history(self) -> ReleaseList:
        return self.cloister.session("ann").transport.call("GET", "/releases", None, ReleaseList)

    def kinds(self) -> list[str]:
        with contextlib.closing(sqlite3.connect(self.cloister.state / "cloister.db", timeout=30)) as database:
            return [kind for (kind,) in database.execute('SELECT kind FROM leaves ORDER BY "index"')]


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with running_cloister(LEASE) as cloister_:
        yield House(cloister_)


def test_an_answer_leaves_with_its_witness_s_signature(house: House) -> None:
    with house.witness():
        release = house.ask()
        session = house.cloister.session("ann")
        receipt = release.receipt
        assert receipt.rollback == "prevented by witness"
        verify_receipt(receipt, receipt.log_key)
        assert fetch(session.transport, receipt).verify(session.profile.policy()).size > receipt.leaf
        (witnessed,) = receipt.witnessed
        assert witnessed.size > receipt.leaf
        assert f"— {witness_name(OWNER)} " in witnessed.cosignature
        # Given again, it is the same; and it took no long wait.
        assert house.history().releases[-1] == release
        begun = time.monotonic()
        for _ in range(3):
            house.ask()
        assert time.monotonic() - begun < 9
    for changed in (
        receipt.model_copy(update={"witnessed": ()}),
        receipt.model_copy(update={"witnesses": ()}),
        receipt.model_copy(update={"rollback": "not prevented"}),
        receipt.model_copy(update={"witnessed": (witnessed.model_copy(update={"owner": "other"}),)}),
        receipt.model_copy(update={"witnessed": (witnessed.model_copy(update={"root": bytes(32)}),)}),
        receipt.model_copy(update={"witnessed": (witnessed.model_copy(update={"size": witnessed.size + 1}),)}),
        receipt.model_copy(update={"witnessed": (witnessed.model_copy(update={"inclusion": ()}),)}),
    ):
        with pytest.raises(ReceiptError):
            verify_receipt(changed, receipt.log_key)


def test_silence_locks_the_data_and_an_owner_without_a_witness_is_not_held_up(house: House) -> None:
    house.cloister.upload("open/people", people(50), PEOPLE, make_policy("open/people", {"ann": 9.0}))
    with house.witness():
        before = len(house.history().releases)
    until(lambda: not house.view().unlocked)
    with pytest.raises(UnavailableError, match="locked"):
        house.ask()
    views = house.cloister.session("ann").transport.call("GET", "/datasets", None, DatasetList).datasets
    shown = {view.name: (view.witness, view.locked) for view in views}
    assert shown == {DATASET: (True, True), "open/people": (False, False)}
    free = house.ask("open/people")
    assert free.receipt.rollback == "not prevented"
    # What was paid waits behind the lock as well, and nothing of it lies in the database to be read.
    history = house.history()
    assert (len(history.releases), history.withheld) == (1, before)
    raw = b"".join(path.read_bytes() for path in house.cloister.state.glob("cloister.db*"))
    assert b"estimates" not in raw
    assert "locked" in house.kinds()
    with house.witness():
        assert len(house.history().releases) == before + 1
        house.ask()


def test_an_answer_waits_for_the_signature_and_is_paid_once(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A witness that lends the key and signs for nothing new: the answer is recorded, and doesn't leave."""
    with house.witness():
        pass
    session = house.cloister.session(OWNER)
    keys = keys_of(house.profile)
    state = read_wire(keys.directory / "state.json", MirrorState)
    assert state is not None
    certificate = bytes.fromhex(session.certificate_digest)
    call = WitnessCall(owner=OWNER, size=state.size, cosignature=state.cosignature, unlock=keys.unlock, wait=0)
    lent = session.transport.call("POST", "/witness", sign_call(call, keys.signing, certificate), WitnessAnswer)
    assert lent.lease > 0
    request = secrets.token_hex(16)
    with pytest.raises(UnavailableError, match="witness"):
        house.ask(request=request)
    assert house.history().withheld > 0
    with house.witness():
        until(lambda: house.history().withheld == 0)
        charges = len([kind for kind in house.kinds() if kind == "charge-reserved"])
        again = house.ask(request=request)
        assert again.receipt.rollback == "prevented by witness"
        assert len([kind for kind in house.kinds() if kind == "charge-reserved"]) == charges


def test_no_edit_makes_weights_leave_that_no_witness_has_signed_for(house: House) -> None:
    """The rows of an earlier training, which was signed for, are made to name the weights of one that wasn't."""
    transport = house.cloister.session("ann").transport
    plan = make_plan(send_model(transport, network()), sources=({"dataset": DATASET, "part": "train"},), epsilon=0.5)
    with house.witness():
        first = wait(transport, submit(transport, plan).job)
        given = transport.raw("GET", f"/jobs/{first.job}/result", None, limit=1 << 20)
    # The key is lent on, and nothing new is signed for.
    keys = keys_of(house.profile)
    state = read_wire(keys.directory / "state.json", MirrorState)
    assert state is not None
    session = house.cloister.session(OWNER)
    call = WitnessCall(owner=OWNER, size=state.size, cosignature=state.cosignature, unlock=keys.unlock, wait=0)
    signed = sign_call(call, keys.signing, bytes.fromhex(session.certificate_digest))

    done = threading.Event()

    def lend() -> None:
        while not done.wait(0.3):
            session.transport.call("POST", "/witness", signed, WitnessAnswer)

    lending = threading.Thread(target=lend)
    lending.start()
    path = house.cloister.state / "cloister.db"
    change = (
        "UPDATE releases SET (file, wrapped_key) = (SELECT file, wrapped_key FROM releases WHERE id = ?) WHERE id = ?"
    )
    try:
        until(lambda: house.view().unlocked)
        second = wait(transport, submit(transport, plan).job)
        assert second.release is not None
        with pytest.raises(UnavailableError, match="witness"):
            transport.raw("GET", f"/jobs/{second.job}/result", None, limit=1 << 20)
        with contextlib.closing(sqlite3.connect(path, timeout=30)) as database:
            database.execute(change, (second.release, first.release))
            database.execute("UPDATE jobs SET release = ? WHERE id = ?", (first.release, second.job))
            database.commit()
        for job in (first.job, second.job):
            with pytest.raises(StorageError):
                transport.raw("GET", f"/jobs/{job}/result", None, limit=1 << 20)
    finally:
        done.set()
        lending.join()
    # The control: by its own rows, it leaves once it is signed for.
    with contextlib.closing(sqlite3.connect(path, timeout=30)) as database:
        database.execute("UPDATE jobs SET release = ? WHERE id = ?", (second.release, second.job))
        database.commit()
    with house.witness():
        until(lambda: house.history().withheld == 0)
        assert transport.raw("GET", f"/jobs/{second.job}/result", None, limit=1 << 20) != given


def test_no_edit_gives_an_answer_to_somebody_else(house: House) -> None:
    house.cloister.add_user("bob", "scientist")
    with house.witness():
        release = house.ask()
        with contextlib.closing(sqlite3.connect(house.cloister.state / "cloister.db", timeout=30)) as database:
            database.execute('UPDATE releases SET "user" = ? WHERE id = ?', ("bob", release.release))
            database.commit()
            with pytest.raises(StorageError):
                house.cloister.session("bob").transport.call("GET", f"/releases/{release.release}", None, Release)
            database.execute('UPDATE releases SET "user" = ? WHERE id = ?', ("ann", release.release))
            database.commit()
        assert house.history().releases[-1] == release


def test_nobody_else_is_the_witness(house: House) -> None:
    session = house.cloister.session(OWNER)
    keys = keys_of(house.profile)
    certificate = bytes.fromhex(session.certificate_digest)
    call = WitnessCall(owner=OWNER, size=0, cosignature="", unlock=b"k" * 32, wait=0)
    stranger = session.profile.owner_key()
    for signed in (
        sign_call(call, stranger, certificate),
        sign_call(call, keys.signing, bytes(32)),
        sign_call(call.model_copy(update={"owner": "open"}), keys.signing, certificate),
        sign_call(call, keys.signing, certificate).model_copy(
            update={"call": call.model_copy(update={"unlock": b"x" * 32}).to_json()}
        ),
    ):
        with pytest.raises(AuthenticationError):
            session.transport.call("POST", "/witness", signed, WitnessAnswer)
    # Nor, for an owner without one, whoever knows a signature that holds under a key that isn't one (of small order).
    for seconds in range(10):
        nobody = call.model_copy(update={"owner": "open", "unlock": None, "wait": seconds}).to_json()
        for point in ("01" + "00" * 31, "ec" + "ff" * 30 + "7f", "00" * 32, "00" * 31 + "80"):
            forged = SignedCall(call=nobody, signature=bytes.fromhex(point) + bytes(32))
            with pytest.raises(AuthenticationError):
                session.transport.call("POST", "/witness", forged, WitnessAnswer)
    # Nor does the witness itself open anything with another key than that of the owner's terms.
    with pytest.raises(ConflictError, match="another key"):
        session.transport.call("POST", "/witness", sign_call(call, keys.signing, certificate), WitnessAnswer)
    # The control.
    right = call.model_copy(update={"unlock": keys.unlock})
    assert session.transport.call("POST", "/witness", sign_call(right, keys.signing, certificate), WitnessAnswer).lease
    until(lambda: not house.view().unlocked)


def test_terms_are_signed_pinned_and_before_any_data(house: House) -> None:
    with pytest.raises(ConflictError, match="no witness"):
        witnesses.init(house.cloister, "open")
    session = house.cloister.session(OWNER)
    thief = Ed25519PrivateKey.generate()
    terms = OwnerTerms(origin=house.view().origin, owner=OWNER, version=2, witness=public_bytes(thief), unlock="0" * 64)
    for pinned, key in ((public_bytes(thief), thief), (public_bytes(session.profile.owner_key()), thief)):
        request = TermsRequest(owner_key=pinned, terms=sign_terms(terms, key))
        with pytest.raises(PolicyRefusedError):
            session.transport.call("PUT", "/owner", request, OwnerView)
    own = session.profile.owner_key()
    unlock = unlock_digest(keys_of(session.profile).unlock)
    for wrong in ({"version": 1, "unlock": unlock}, {"origin": "cloister/other", "unlock": unlock}, {"version": 2}):
        signed = sign_terms(terms.model_copy(update=wrong), own)
        with pytest.raises(PolicyRefusedError):
            session.transport.call("PUT", "/owner", TermsRequest(owner_key=public_bytes(own), terms=signed), OwnerView)


def test_a_job_ends_when_the_witness_falls_silent(house: House) -> None:
    transport = house.cloister.session("ann").transport
    before = used(transport)[f"{DATASET}:ann"][0]
    with house.witness():
        sources = ({"dataset": DATASET, "part": "train"},)
        plan = make_plan(send_model(transport, network()), sources=sources, epochs=9000, epsilon=8.0)
        job = submit(transport, plan).job
    ended = wait(transport, job)
    assert (ended.state, ended.code) == ("cancelled", "locked")
    assert 0 < used(transport)[f"{DATASET}:ann"][0] - before < 0.2
    # The witness is back: what was stopped stays spent, and the next one runs.
    with house.witness():
        assert house.ask().receipt.rollback == "prevented by witness"


def test_a_slow_witness_makes_answers_slow_and_no_more(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    extend = Mirror.extend

    def slowly(*given: object) -> object:
        time.sleep(0.6)
        return extend(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(Mirror, "extend", slowly)
    with house.witness():
        begun = time.monotonic()
        assert house.ask().receipt.rollback == "prevented by witness"
        assert time.monotonic() - begun > 0.6


def test_a_log_that_was_set_back_gets_no_key_and_the_owner_sees_both(house: House) -> None:
    cloister_ = house.cloister
    with house.witness():
        house.ask()
    assert cloister_.stop() == 0
    kept = cloister_.base / "kept"
    kept.mkdir()
    for path in cloister_.state.glob("cloister.db*"):
        shutil.copy(path, kept / path.name)
    cloister_.restart()
    with house.witness() as served:
        assert served.error is None
        house.ask()
        seen = house.view().cosigned
    assert cloister_.stop() == 0
    _put_back(kept, cloister_.state)
    # A whole old database, log and signature and all: the guard itself can't see it. A laptop without memory neither.
    shutil.rmtree(cloister_.base / "laptop" / "profiles" / "ann")
    for checkpoint in (cloister_.base / "laptop" / "profiles").glob("*/checkpoint.json"):
        checkpoint.unlink()
    cloister_.restart()
    with witnesses.serving(house.profile, owner=OWNER) as served:
        served.wait()
        assert isinstance(served.error, AttestationRefusedError | ConflictError)
        assert "signed for" in str(served.error)
        assert f"{seen}" in str(served.error)
    with pytest.raises(UnavailableError, match="locked"):
        house.ask()


def _put_back(kept: Path, state: Path) -> None:
    for path in state.glob("cloister.db*"):
        path.unlink()
    for path in kept.iterdir():
        shutil.copy(path, state / path.name)


class _Desk:
    """A witness's desk on a log of its own, in this process: terms change where a test says so."""

    def __init__(self, path: Path) -> None:
        self.database = open_database(f"sqlite:///{path / 'cloister.db'}")
        log = AuditLog(Ed25519PrivateKey.generate(), "cloister/desk")
        self.journal = Journal(log, believe)
        self.leases = Leases(10.0)
        self.owners = Owners(self.database, self.journal, self.leases)
        self.desk = WitnessDesk(self.database, self.journal, self.owners, self.leases, Counts(), bytes(32))
        self.keys = [Ed25519PrivateKey.generate() for _ in range(3)]
        self.unlock = b"k" * 32
        with self.database.write() as session:
            begin(session, self.journal)
        self.put(1)

    def put(self, version: int) -> None:
        owner, witness = self.keys[0], self.keys[version]
        terms = OwnerTerms(
            origin="cloister/desk", owner=OWNER, version=version, witness=public_bytes(witness),
            unlock=unlock_digest(self.unlock),
        )  # fmt: skip
        request = TermsRequest(owner_key=public_bytes(owner), terms=sign_terms(terms, owner))
        self.owners.set_terms(Caller(OWNER, "owner"), request)

    def call(self, version: int, wait: int = 0) -> SignedCall:
        call = WitnessCall(owner=OWNER, size=0, cosignature="", unlock=self.unlock, wait=wait)
        return sign_call(call, self.keys[version], bytes(32))


def test_a_witness_that_is_replaced_while_it_calls_opens_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = _Desk(tmp_path)
    verify = cloister_guard.witness.verify_call

    def meanwhile(*given: Any) -> WitnessCall:
        found = verify(*given)
        desk.put(2)
        return found

    monkeypatch.setattr(cloister_guard.witness, "verify_call", meanwhile)
    with pytest.raises(CloisterError):
        asyncio.run(desk.desk.answer(desk.call(1)))
    with pytest.raises(UnavailableError):
        desk.leases.key(OWNER)
    monkeypatch.setattr(cloister_guard.witness, "verify_call", verify)
    # The control: the new one does.
    assert asyncio.run(desk.desk.answer(desk.call(2))).lease > 0
    desk.database.close()


def test_one_owner_s_calls_do_not_take_up_the_guard(tmp_path: Path) -> None:
    desk = _Desk(tmp_path)

    async def flood() -> list[object]:
        calls = [desk.desk.answer(desk.call(1, wait=1)) for _ in range(30)]
        return await asyncio.gather(*calls, return_exceptions=True)

    found = asyncio.run(flood())
    assert sum(isinstance(each, UnavailableError) for each in found) >= 20
    assert asyncio.run(desk.desk.answer(desk.call(1))).lease > 0
    desk.database.close()


def test_terms_under_a_new_ref_of_the_owner_s_name_get_none_of_their_data() -> None:
    """Who has the database and the owner's password makes the name stand for somebody new, with a witness of theirs."""
    thief, unlock = Ed25519PrivateKey.generate(), b"t" * 32
    with running_cloister("lease_seconds = 30.0\n") as cloister_:
        house = House(cloister_)
        own = house.cloister.session(OWNER).profile.owner_key()

        def sql(statement: str, *values: Any) -> None:
            with contextlib.closing(sqlite3.connect(cloister_.state / "cloister.db", timeout=30)) as database:
                database.execute(statement, values)
                database.commit()

        assert cloister_.stop() == 0
        sql("DELETE FROM names WHERE kind = 'user' AND name = ?", OWNER)
        sql("DELETE FROM owners")
        sql("UPDATE populations SET name = 'hidden/' || name")
        cloister_.restart()
        session = cloister_.session(OWNER)
        terms = OwnerTerms(
            origin="cloister/test-cloister", owner=OWNER, version=1, witness=public_bytes(thief),
            unlock=unlock_digest(unlock),
        )  # fmt: skip
        request = TermsRequest(owner_key=public_bytes(thief), terms=sign_terms(terms, thief))
        session.transport.call("PUT", "/owner", request, OwnerView)
        sql("UPDATE populations SET name = substr(name, 8)")
        sql("UPDATE owners SET public_key = ?", public_bytes(own))
        call = WitnessCall(owner=OWNER, size=0, cosignature="", unlock=unlock, wait=0)
        signed = sign_call(call, thief, bytes.fromhex(session.certificate_digest))
        assert session.transport.call("POST", "/witness", signed, WitnessAnswer).lease > 0
        # The owner, who knows of nothing, publishes the next version: it isn't wrapped for the thief.
        with pytest.raises(StorageError, match="another owner"):
            cloister_.upload(DATASET, people(600), PEOPLE, None)
