"""Whether the guards that wrote the audit log were proven machines: each start's evidence, appraised again.

Whoever has the database can write a start with a log key of their own, and sign for whatever they like after it. What
they can't make is hardware evidence that binds that key.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError
from sqlalchemy.orm import Session

from cloister_attest.appraise import appraise
from cloister_attest.collateral.store import FETCH
from cloister_attest.evidence import EvidenceRecord
from cloister_attest.policy import AttestationPolicy
from cloister_attest.result import AttestationResult
from cloister_budget.entries import COARSE_SECONDS
from cloister_budget.replay import Start
from cloister_budget.tables import EvidenceRow
from cloister_data.crypt import write_durably
from cloister_data.errors import ConfigurationError, StorageError


class Vouching:
    """Called by the journal for each start that it reads. `policy` is what a machine that wrote this log must prove."""

    def __init__(self, policy: AttestationPolicy, refused: Path) -> None:
        """`refused` is where the record of this guard's own start is put, if it doesn't convince."""
        self._policy = policy
        self._refused = refused

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
        verdict = self._verdict(record, start.at)
        if not verdict.ok:
            raise _forged(start, f"Failed checks: {', '.join(check.name for check in verdict.failed)}.")

    def require(self, record: EvidenceRecord, leaf_at: int) -> None:
        """That this guard's own start, whose leaf has the coarse time `leaf_at`, will be believed later.

        Raises ConfigurationError, which names the failed checks and what to fetch, and leaves the record for that.
        """
        verdict = self._verdict(record, leaf_at)
        if verdict.ok:
            return
        with suppress(StorageError):
            write_durably(self._refused, lambda file: file.write(record.to_json()))
        raise ConfigurationError(
            "This machine's own evidence doesn't satisfy the trust file that says who may write its audit log.",
            why="Failed checks: " + "; ".join(f"{check.name}: {check.reason}" for check in verdict.failed) + ".",
            next_step="Nothing was written. Where the maker's collateral is missing or has expired, fetch it, and name "
            f"the directory as collateral_dir: {FETCH} {self._refused} --to DIRECTORY. Otherwise this isn't "
            "the machine or the image that the trust file demands.",
        )

    def _verdict(self, record: EvidenceRecord, leaf_at: int) -> AttestationResult:
        # A leaf's time is rounded down, and the evidence is from just before it.
        at = leaf_at + COARSE_SECONDS
        return appraise(record.evidence, self._policy, certificate=record.certificate, nonce=record.nonce, at=at)


def _forged(start: Start, why: str) -> StorageError:
    return StorageError(
        f"The start at entry {start.index} of the audit log wasn't by a proven machine.",
        why=why,
        next_step="Nothing was done. Somebody has written to the database; put back a backup, and ask the owners.",
    )
