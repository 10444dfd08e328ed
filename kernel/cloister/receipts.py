"""Receipts as files: what was asked, what it cost, and a proof that holds without the cloister."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from cloister.connection import Caller
from cloister.judging import judge
from cloister.profile import read_bounded, write_private
from cloister_attest.evidence import EvidenceRecord, Sparse
from cloister_attest.policy import AttestationPolicy
from cloister_budget.receipts import ReceiptError, verify_receipt
from cloister_data.checkpoint import Checkpoint
from cloister_data.release import Receipt

MAX_RECEIPT = 8 << 20
"""Bytes of a receipt's file: the evidence of a machine with a GPU is the largest part."""

NEXT = "Don't rely on it; ask the operator and the data's owner."


class ReceiptFile(Sparse):
    """One receipt, and the evidence of the guard that wrote it: all that it takes to verify it offline."""

    format: Literal[1] = 1
    receipt: Receipt
    evidence: EvidenceRecord

    def verify(self, policy: AttestationPolicy) -> Checkpoint:
        """The log's checkpoint that covers the release, once everything holds.

        That is: the machine's evidence under the trust file, as of the release; the log key that the evidence binds;
        the checkpoint under that key; the release's entry in the log; and what the receipt says in that entry. Raises
        ReceiptError.
        """
        record, receipt = self.evidence, self.receipt
        if record.evidence.digest() != receipt.evidence:
            raise ReceiptError(
                "The receipt doesn't hold.", why="The evidence beside it is another guard's.", next_step=NEXT
            )
        verdict = judge(record.evidence, policy, certificate=record.certificate, nonce=record.nonce, at=receipt.issued)
        if not verdict.ok:
            failed = "; ".join(f"{check.name}: {check.reason}" for check in verdict.failed)
            raise ReceiptError(
                "The machine that wrote the receipt isn't proven.",
                why=f"Failed checks: {failed}.",
                next_step=f"Check that the trust file is this cloister's. {NEXT}",
            )
        if receipt.simulated != verdict.simulated:
            raise ReceiptError(
                "The receipt doesn't hold.", why="It hides that the hardware was simulated.", next_step=NEXT
            )
        return verify_receipt(receipt, record.evidence.log_key)


def fetch(caller: Caller, receipt: Receipt) -> ReceiptFile:
    """The receipt with the evidence that belongs to it."""
    record = caller.call("GET", f"/audit/evidence/{receipt.evidence}", None, EvidenceRecord)
    return ReceiptFile(receipt=receipt, evidence=record)


def save(file: ReceiptFile, path: Path) -> None:
    """Write the file for its owner alone: it names a user and what they asked about. Raises StorageError."""
    write_private(path, file.to_json())


def load(path: Path) -> ReceiptFile:
    """Raises ConfigurationError where it can't be read, ReceiptError where it is no receipt."""
    try:
        content = read_bounded(path, limit=MAX_RECEIPT)
    except FileNotFoundError as error:
        raise ReceiptError(f"There is no file {path}.", next_step="Check the path.") from error
    try:
        return ReceiptFile.from_json(content)
    except ValidationError as error:
        raise ReceiptError(
            f"{path} isn't a receipt.",
            why=f"{error.errors(include_url=False, include_input=False)[0]['msg']}.",
            next_step="cloister audit receipt RELEASE --out FILE writes one.",
        ) from error
