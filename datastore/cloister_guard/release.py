"""The one way out of the guard: every answer and every error passes here, in shapes that don't depend on rows.

An answer is recorded before it leaves: its charge is settled, its leaf appended and its receipt signed in one
transaction. An error leaves as a problem that is built from public facts, or as one constant.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass

import anyio.to_thread
import structlog
from pydantic import ValidationError
from sqlalchemy.orm import Session

from cloister_budget.database import Database
from cloister_budget.entries import Released
from cloister_budget.journal import Journal
from cloister_budget.ledger import Ledger
from cloister_budget.tables import ReleaseRow
from cloister_data.errors import (
    CloisterError,
    InternalError,
    InvalidRequestError,
    Problem,
    StorageError,
    UnavailableError,
)
from cloister_data.mechanism import Mechanism
from cloister_data.release import Receipt, ReceiptContent, Release, SourceVersion, Witnessed, rollback_of
from cloister_data.statistics import Estimate
from cloister_guard.datasets.keys import KeyRing
from cloister_guard.datasets.store import StoredFile
from cloister_guard.evidence import EvidenceDesk
from cloister_guard.leases import Leases
from cloister_guard.owners import Owners, owners_of

logger = structlog.get_logger()


@dataclass(frozen=True)
class Answer:
    """What is about to leave: noised numbers, or the encrypted file of noised weights, and what paid for it."""

    charge: str
    user: str
    request_digest: str
    kind: str
    title: str
    sources: tuple[SourceVersion, ...]
    mechanism: Mechanism
    epsilon: float
    delta: float
    estimates: tuple[Estimate, ...] = ()
    weights: StoredFile | None = None


WITNESS_SECONDS = 10.0
"""For so long an answer waits for its owners' witnesses to sign, at most; then whoever asked is told to fetch it later.

A witness that is silent for longer than its lease has locked the data.
"""


class ReleaseDesk:
    """Records releases and hands them out: where an owner has a witness, once the witness has signed for the entry."""

    def __init__(
        self,
        database: Database,
        ledger: Ledger,
        journal: Journal,
        evidence: EvidenceDesk,
        owners: Owners,
        leases: Leases,
        keys: KeyRing,
    ) -> None:
        self._database = database
        self._ledger = ledger
        self._journal = journal
        self._evidence = evidence
        self._owners = owners
        self._leases = leases
        self._keys = keys

    def record(self, session: Session, answer: Answer) -> Release:
        """Settle the charge, append the leaf, sign the receipt; all in the caller's transaction.

        Nothing may be sent before that transaction has committed, and `hand_out` lets it go. Raises UnavailableError
        where an owner has locked the data meanwhile.
        """
        release_id = secrets.token_hex(16)
        owners = owners_of([source.dataset for source in answer.sources])
        self._ledger.commit(session, answer.charge)
        charge = self._ledger.charge_view(session, answer.charge)
        content = ReceiptContent(
            release=release_id,
            charge=answer.charge,
            user=answer.user,
            request=answer.request_digest,
            sources=answer.sources,
            adjacency="zero-out",
            mechanism=answer.mechanism,
            epsilon=answer.epsilon,
            delta=answer.delta,
            evidence=self._evidence.start_digest,
            simulated=self._evidence.simulated,
            issued=int(time.time()),
            witnesses=self._owners.witnesses(owners),
        )
        steps, _ = self._ledger.settled(session, answer.charge)
        leaf = self._journal.append(
            session, Released(release=release_id, charge=answer.charge, receipt=content.digest(), steps=steps)
        )
        if self._owners.witnesses(owners) != content.witnesses:
            # Terms of another guard's, which this one has only now read.
            raise UnavailableError(
                "An owner named another witness while this was answered.",
                why="The one that the answer would name can't sign for it any more.",
                next_step="Ask the owner.",
            )
        proof = self._journal.log.prove(session, leaf.index)
        release = Release(
            release=release_id,
            kind=answer.kind,
            title=answer.title,
            estimates=answer.estimates,
            charge=charge,
            receipt=Receipt(
                **dict(content),
                leaf=leaf.index,
                entry=leaf.payload,
                inclusion=proof.inclusion,
                checkpoint=proof.checkpoint,
                log_key=self._journal.log.public_key,
                witnessed=(),
                rollback="not prevented",
            ),
        )
        session.add(
            ReleaseRow(
                id=release_id,
                charge=answer.charge,
                user=answer.user,
                kind=answer.kind,
                owners=owners,
                body=self._keys.wrap(release.to_json(), _context(release_id), owners),
                file=answer.weights.file if answer.weights else None,
                wrapped_key=answer.weights.wrapped_key if answer.weights else None,
                created=content.issued,
            )
        )
        return release

    async def hand_out(self, release: Release) -> Release:
        """The release as it may leave, with its witnesses' signatures in its receipt.

        Raises UnavailableError where a witness hasn't signed for it in time; it is paid, and can be fetched later.
        """
        if not self._waits(release):
            return release
        owners = [each.owner for each in release.receipt.witnesses]
        seconds = min(WITNESS_SECONDS, self._leases.seconds)
        if not await self._leases.cosigned(owners, release.receipt.leaf + 1, seconds):
            raise UnavailableError(
                "The answer is paid and recorded, and waits for its owner's witness.",
                why=f"Nobody at {' and '.join(owners)} has signed for the log with its entry yet.",
                next_step="Fetch it later, free: cloister.history(), or send the same request with the same id.",
            )

        def keep() -> Release:
            with self._database.write() as session:
                final = self._witnessed(session, release)
                row = session.get_one(ReleaseRow, release.release)
                row.body = self._keys.wrap(final.to_json(), _context(row.id), _owners(release))
            return final

        return await anyio.to_thread.run_sync(keep)

    def stored(self, row: ReleaseRow) -> Release:
        """A recorded release, to be handed out by `hand_out` or `ready`. Raises UnavailableError while it is locked.

        Raises StorageError where the row says something else than the release: whose it is, and whose data it is from.
        """
        release = Release.from_json(self._keys.unwrap(row.body, _context(row.id), row.owners))
        if (row.id, row.user, row.owners) != (release.release, release.receipt.user, _owners(release)):
            raise StorageError("A recorded answer isn't what the database says of it.")
        return release

    async def ready(self, row: ReleaseRow) -> Release | None:
        """A recorded release as it may leave now; None where it waits for a witness, or an owner has locked it."""
        try:
            # Up to 64 MiB of them are opened for one history: not in the event loop, which everybody waits for.
            release = await anyio.to_thread.run_sync(self.stored, row)
            owners = [each.owner for each in release.receipt.witnesses]
            if self._waits(release) and not self._leases.has_cosigned(owners, release.receipt.leaf + 1):
                return None
            return await self.hand_out(release)
        except UnavailableError:
            return None

    def _waits(self, release: Release) -> bool:
        return len(release.receipt.witnessed) < len(release.receipt.witnesses)

    def _witnessed(self, session: Session, release: Release) -> Release:
        """The release with what its witnesses, who have all signed for its entry, signed last."""
        found = []
        for each in release.receipt.witnesses:
            lease = self._leases.of(each.owner)
            if lease is None or lease.witness != each.key or lease.cosigned <= release.receipt.leaf:
                raise UnavailableError(
                    f"{each.owner} has another witness now than when this was answered.",
                    why="Only the one that the answer's entry names can sign for it.",
                    next_step="Ask the owner.",
                )
            found.append(
                Witnessed(
                    owner=each.owner,
                    size=lease.cosigned,
                    root=self._journal.prefix(session, lease.cosigned).root,
                    cosignature=lease.line,
                    inclusion=self._journal.log.prove(session, release.receipt.leaf, lease.cosigned).inclusion,
                )
            )
        receipt = release.receipt.model_copy(
            update={"witnessed": tuple(found), "rollback": rollback_of(release.receipt.sources, found)}
        )
        return release.model_copy(update={"receipt": receipt})


def _owners(release: Release) -> tuple[str, ...]:
    """Those of its data, for whom it is sealed: they are in it, where nobody edits them."""
    return owners_of([source.dataset for source in release.receipt.sources])


def _context(release: str) -> bytes:
    return f"release\n{release}".encode()


def problem(error: Exception) -> Problem:
    """What an error looks like outside. Only errors raised on purpose speak; every other one is the same constant."""
    if isinstance(error, CloisterError):
        return error.to_problem()
    if isinstance(error, ValidationError):
        return _invalid(error).to_problem()
    # The text of an unforeseen error may hold rows: its class is all that even the guard's own log gets.
    logger.error("unforeseen error", kind=type(error).__name__)
    return InternalError(
        "The cloister failed at this request.",
        why="The cause is in its own log.",
        next_step="Try again; if it happens again, tell the admin the time.",
    ).to_problem()


def _invalid(error: ValidationError) -> InvalidRequestError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return InvalidRequestError(
        f"The request can't be read{f' at {where[:200]!r}' if where else ''}.",
        why=f"{first['msg'][:500]}.",
        next_step="Nothing was charged. Correct it and send it again.",
    )
