"""Whether the guards that wrote the audit log were proven machines: each start's evidence, appraised again.

Whoever has the database can write a start with a log key of their own, and sign for whatever they like after it. What
they can't make is hardware evidence that binds that key.
"""

from __future__ import annotations

import hashlib

from pydantic import ValidationError
from sqlalchemy.orm import Session

from cloister_attest.appraise import appraise
from cloister_attest.evidence import EvidenceRecord
from cloister_attest.policy import AttestationPolicy
from cloister_budget.entries import COARSE_SECONDS
from cloister_budget.replay import Start
from cloister_budget.tables import EvidenceRow
from cloister_data.errors import StorageError


class Vouching:
    """Called by the journal for each start that it reads. `policy` is what a machine that wrote this log must prove."""

    def __init__(self, policy: AttestationPolicy) -> None:
        self._policy = policy

    def __call__(self, session: Session, start: Start) -> None:
        """Raises StorageError where the start's evidence is missing, is another's, or doesn't convince."""
        row = session.get(EvidenceRow, start.facts.evidence)
        if row is None:
            raise _forged(start, "Its evidence is missing.")
        try:
            record = EvidenceRecord.from_json(row.record_json)
        except ValidationError as error:
            raise _forged(start, "Its evidence can't be read.") from error
        said = (start.facts.evidence, start.facts.log_key, start.facts.platform, start.facts.certificate)
        shown = (
            record.evidence.digest(),
            record.evidence.log_key.hex(),
            record.evidence.platform,
            hashlib.sha256(record.certificate).hexdigest(),
        )
        if said != shown:
            raise _forged(start, "It says something else than its evidence.")
        # A leaf's time is rounded down, and the evidence is from just before it.
        at = start.at + COARSE_SECONDS
        verdict = appraise(record.evidence, self._policy, certificate=record.certificate, nonce=record.nonce, at=at)
        if not verdict.ok:
            raise _forged(start, f"Failed checks: {', '.join(check.name for check in verdict.failed)}.")


def _forged(start: Start, why: str) -> StorageError:
    return StorageError(
        f"The start at entry {start.index} of the audit log wasn't by a proven machine.",
        why=why,
        next_step="Nothing was done. Somebody has written to the database; put back a backup, and ask the owners.",
    )
