"""The guard's proof of itself: one TLS key per start, bound with a nonce and the log's head into hardware evidence.

With it go the collateral and the reference values that the operator supplies: a start is judged again later, at its own
time, with what its record holds.
"""

from __future__ import annotations

import hashlib
import secrets

import structlog

from cloister_attest.binding import report_data
from cloister_attest.channel import ServerIdentity, make_server_identity
from cloister_attest.collect import Attester
from cloister_attest.evidence import NONCE_BYTES, Evidence, EvidenceRecord
from cloister_budget.database import Database
from cloister_budget.entries import GuardStarted
from cloister_budget.journal import Journal
from cloister_budget.log import reader, size
from cloister_budget.merkle import consistency_proof
from cloister_budget.tables import EvidenceRow
from cloister_data.consistency import ConsistencyProof, ConsistencyRequest
from cloister_data.errors import ConfigurationError, UnavailableError
from cloister_guard.counts import Counts
from cloister_guard.restore import Copy, put_back, settle
from cloister_guard.staples import Staples
from cloister_guard.starts import Vouching

logger = structlog.get_logger()


class EvidenceDesk:
    """Answers nonces. Holds the TLS identity of this start."""

    def __init__(
        self,
        attester: Attester,
        staples: Staples,
        vouching: Vouching,
        database: Database,
        journal: Journal,
        counts: Counts,
        name: str,
    ) -> None:
        self._attester = attester
        self._staples = staples
        self._vouching = vouching
        self._database = database
        self._journal = journal
        self._counts = counts
        self._log = journal.log
        self.identity: ServerIdentity = make_server_identity(name)
        self.platform = attester.platform
        self.start_digest = ""

    @property
    def certificate_digest(self) -> str:
        """SHA-256 of the TLS certificate, hex."""
        return hashlib.sha256(self.identity.certificate_der).hexdigest()

    @property
    def simulated(self) -> bool:
        return self.platform == "simulated"

    def record_start(self, copy: Copy | None = None) -> None:
        """Collect evidence once and make its digest a leaf: receipts name it. What it takes to appraise it is kept.

        Where the database is a backup, `copy` is what it lacks; it is put back, and settled, in the same transaction.
        Raises ConfigurationError, and writes nothing, where the next guard wouldn't believe this start.
        """
        nonce = secrets.token_bytes(NONCE_BYTES)
        evidence = self._collect(nonce)
        self.start_digest = evidence.digest()
        record = EvidenceRecord(evidence=evidence, nonce=nonce, certificate=self.identity.certificate_der)
        with self._database.write() as session:
            if copy is not None:
                put_back(session, self._journal, copy)
            session.add(EvidenceRow(digest=self.start_digest, record_json=record.model_dump_json()))
            added = self._journal.append(
                session,
                GuardStarted(
                    evidence=self.start_digest,
                    platform=self.platform,
                    log_key=self._log.public_key.hex(),
                    previous_key=self._journal.last_key(session),
                    certificate=self.certificate_digest,
                ),
            )
            self._vouching.require(record, added.at)
            if copy is not None:
                settle(session, self._journal, copy)

    def answer(self, nonce: bytes) -> Evidence:
        """Fresh evidence for a 32-byte nonce of a client, over the log's newest checkpoint. Raises UnavailableError."""
        try:
            evidence = self._collect(nonce)
        except ConfigurationError as error:
            # Whoever asks isn't signed in: where the files lie is for the guard's own log.
            logger.error("no evidence could be made", what=error.what, why=error.why)
            raise UnavailableError(
                "This cloister can't show its evidence at the moment.",
                why="Something that its operator supplies can't be used.",
                next_step="Tell its operator: the guard's log says what.",
            ) from error
        self._counts.evidence()
        return evidence

    def _collect(self, nonce: bytes) -> Evidence:
        with self._database.read() as session:
            checkpoint = self._journal.checkpoint(session)
        bound = report_data(self.identity.spki, nonce, b"", checkpoint.encode(), self._log.public_key)
        report, certificates = self._attester.collect(bound)
        return Evidence(
            platform=self.platform,
            report=report,
            certificates=certificates,
            checkpoint=checkpoint,
            log_key=self._log.public_key,
            gpu=None,
            collateral=self._staples.collateral(self.platform, report, certificates),
            reference_values=self._staples.reference_values(),
        )

    def consistency(self, request: ConsistencyRequest) -> ConsistencyProof:
        """That a later state of the log, which evidence showed, extends an earlier one that a client saw."""
        with self._database.read() as session:
            if not request.first <= request.second <= size(session):
                return ConsistencyProof(hashes=())
            return ConsistencyProof(hashes=tuple(consistency_proof(request.first, request.second, reader(session))))
