"""The guard's end of the conversation with owners' witnesses: `cloister_data.witness`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections import Counter

import anyio.to_thread
from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from cloister_budget.database import Database
from cloister_budget.entries import Unlocked
from cloister_budget.journal import Journal
from cloister_budget.log import size
from cloister_budget.tables import EvidenceRow, Leaf
from cloister_data.checkpoint import CheckpointError
from cloister_data.cosignature import verify_cosignature, witness_name
from cloister_data.errors import AuthenticationError, ConflictError, UnavailableError
from cloister_data.witness import (
    MAX_ENTRIES,
    MAX_ENTRIES_BYTES,
    SignedCall,
    WitnessAnswer,
    WitnessCall,
    not_the_witness,
    unlock_digest,
    verify_call,
)
from cloister_guard.counts import Counts
from cloister_guard.leases import Leases
from cloister_guard.owners import Owners

CALLS_AT_ONCE = 4
"""Of one owner's witness, which makes one at a time; each waiting one costs a look at the database in a second."""

LOOK_SECONDS = 1.0
"""What another guard on the same database adds is noticed after so long."""


class WitnessDesk:
    """Takes witnesses' calls. `certificate` is the SHA-256 (32 bytes) of this guard's TLS certificate."""

    def __init__(
        self,
        database: Database,
        journal: Journal,
        owners: Owners,
        leases: Leases,
        counts: Counts,
        certificate: bytes,
    ) -> None:
        self._database = database
        self._journal = journal
        self._owners = owners
        self._leases = leases
        self._counts = counts
        self._certificate = certificate
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self._serving: Counter[str] = Counter()
        self._lock = threading.Lock()
        journal.on_growth(self._wake)

    async def answer(self, signed: SignedCall) -> WitnessAnswer:
        """One call. Raises AuthenticationError; ConflictError where the witness signed for another log than this."""
        event = asyncio.Event()
        entry = (asyncio.get_running_loop(), event)
        self._waiting.add(entry)
        call: WitnessCall | None = None
        try:
            call = await anyio.to_thread.run_sync(self._admit, signed)
            deadline = time.monotonic() + call.wait
            while (left := deadline - time.monotonic()) > 0 and not await anyio.to_thread.run_sync(self._grew, call):
                try:
                    async with asyncio.timeout(min(left, LOOK_SECONDS)):
                        await event.wait()
                except TimeoutError:
                    pass
                event.clear()
            return await anyio.to_thread.run_sync(self._tell, call)
        finally:
            self._waiting.discard(entry)
            if call is not None:
                self._done(call.owner)

    def _wake(self) -> None:
        # A loop that has ended waits for nothing.
        for loop, event in list(self._waiting):
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(event.set)

    def _admit(self, signed: SignedCall) -> WitnessCall:
        """The call, once it is the owner's witness's, and is about this log; its lease is taken."""
        try:
            owner = WitnessCall.from_json(signed.call).owner
            key = self._owners.witness(owner)
            if key is None:
                raise not_the_witness()
            call = verify_call(signed, key, self._certificate)
        except (ValidationError, AuthenticationError):
            self._counts.witness_call_refused()
            raise
        with self._lock:
            if self._serving[owner] >= CALLS_AT_ONCE:
                # One that its witness tries again after: calls whose connection broke are still waiting here.
                raise UnavailableError(
                    f"{CALLS_AT_ONCE} calls of this witness wait here already.", next_step="Call again in a while."
                )
            self._serving[owner] += 1
        try:
            self._take(call, key)
        except BaseException:
            self._done(owner)
            raise
        return call

    def _take(self, call: WitnessCall, key: bytes) -> None:
        """Take the lease, in a transaction: while it lasts, no other terms come into force."""
        opened = False
        try:
            with self._database.write() as session:
                self._check_log(session, call, key)
                ref = self._journal.ref(session, "user", call.owner)
                terms = self._journal.books(session).terms.get(ref)
                if terms is None or terms.witness != key.hex():
                    raise not_the_witness()
                if call.unlock is not None and unlock_digest(call.unlock) != terms.unlock:
                    raise ConflictError(
                        "The witness brought another key than that to the owner's data.",
                        why="It isn't the one that the owner's terms name, and would open nothing.",
                        next_step="Put unlock.key back from your copy of it.",
                    )
                opened = self._leases.renew(call.owner, key, call.size, call.cosignature, call.unlock)
                if opened:
                    self._journal.append(session, Unlocked(owner=ref, witness=key.hex(), size=call.size))
        except BaseException:
            if opened:
                self._leases.drop(call.owner)  # Nothing is open without its entry.
            raise

    def _done(self, owner: str) -> None:
        with self._lock:
            self._serving[owner] -= 1
            if not self._serving[owner]:
                del self._serving[owner]

    def _check_log(self, session: Session, call: WitnessCall, key: bytes) -> None:
        entries = size(session)
        if call.size > entries:
            raise _other_log(f"It has signed for {call.size} entries, and there are {entries}.")
        if call.size == 0 and not call.cosignature:
            return
        try:
            stated = self._journal.prefix(session, call.size)
            verify_cosignature(stated, call.cosignature, witness_name(call.owner), key)
        except CheckpointError as error:
            raise _other_log(f"Its signature isn't under the first {call.size} entries that are here.") from error

    def _grew(self, call: WitnessCall) -> bool:
        with self._database.read() as session:
            return size(session) > call.size

    def _tell(self, call: WitnessCall) -> WitnessAnswer:
        # One that may write: only then is the log sure to be the one that this guard knows.
        with self._database.write() as session:
            wanted = select(Leaf).where(Leaf.index >= call.size).order_by(Leaf.index).limit(MAX_ENTRIES)
            entries: list[bytes] = []
            evidence: list[bytes] = []
            held = 0
            for leaf in session.scalars(wanted.execution_options(yield_per=100)):
                record = _evidence_of(session, leaf)
                held += len(leaf.payload) + len(record or b"")
                if entries and held > MAX_ENTRIES_BYTES:
                    break
                entries.append(leaf.payload)
                evidence += [] if record is None else [record]
            stated = self._journal.prefix(session, call.size + len(entries))
        checkpoint = self._journal.log.sign(stated.size, stated.root)
        lease = self._leases.of(call.owner)
        open_for = 0.0 if lease is None or lease.key is None else max(0.0, lease.until - time.monotonic())
        return WitnessAnswer(entries=tuple(entries), evidence=tuple(evidence), checkpoint=checkpoint, lease=open_for)


def _evidence_of(session: Session, leaf: Leaf) -> bytes | None:
    """The evidence record of a guard's start; None of another entry."""
    if leaf.kind != "guard-started":
        return None
    row = session.get(EvidenceRow, json.loads(leaf.payload)["facts"]["evidence"])
    return b"" if row is None else row.record_json.encode()


def _other_log(why: str) -> ConflictError:
    return ConflictError(
        "The witness has signed for another log than this cloister's.",
        why=why,
        next_step="The log was set back or replaced. Ask the operator; nothing of the owner's was unlocked.",
    )
