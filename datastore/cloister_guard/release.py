"""The one way out of the guard: every answer and every error passes here, in shapes that don't depend on rows.

An answer is recorded before it leaves: its charge is settled, its leaf appended and its receipt signed in one
transaction. An error leaves as a problem that is built from public facts, or as one constant.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass

import structlog
from pydantic import ValidationError
from sqlalchemy.orm import Session

from cloister_budget.entries import Released
from cloister_budget.journal import Journal
from cloister_budget.ledger import Ledger
from cloister_budget.tables import ReleaseRow
from cloister_data.errors import CloisterError, InternalError, InvalidRequestError, Problem
from cloister_data.mechanism import Mechanism
from cloister_data.release import Receipt, ReceiptContent, Release, SourceVersion
from cloister_data.statistics import Estimate
from cloister_guard.datasets.store import StoredFile
from cloister_guard.evidence import EvidenceDesk

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


class ReleaseDesk:
    """Records releases and hands them out."""

    def __init__(self, ledger: Ledger, journal: Journal, evidence: EvidenceDesk) -> None:
        self._ledger = ledger
        self._journal = journal
        self._evidence = evidence

    def record(self, session: Session, answer: Answer) -> Release:
        """Settle the charge, append the leaf, sign the receipt; all in the caller's transaction.

        Nothing may be sent before that transaction has committed.
        """
        release_id = secrets.token_hex(16)
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
        )
        steps, _ = self._ledger.settled(session, answer.charge)
        leaf = self._journal.append(
            session, Released(release=release_id, charge=answer.charge, receipt=content.digest(), steps=steps)
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
                rollback="not prevented",
            ),
        )
        session.add(
            ReleaseRow(
                id=release_id,
                charge=answer.charge,
                user=answer.user,
                kind=answer.kind,
                body_json=release.model_dump_json(),
                file=answer.weights.file if answer.weights else None,
                wrapped_key=answer.weights.wrapped_key if answer.weights else None,
                created=content.issued,
            )
        )
        return release


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
