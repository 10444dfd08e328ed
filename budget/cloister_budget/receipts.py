"""A receipt, verified offline: its entry is in a signed log, and was made for what the receipt says. Pure."""

from __future__ import annotations

from typing import ClassVar

from pydantic import ValidationError

from cloister_budget import merkle
from cloister_budget.entries import LeafBody, Released
from cloister_data.checkpoint import Checkpoint, CheckpointError, verify_checkpoint
from cloister_data.cosignature import verify_cosignature, witness_name
from cloister_data.errors import CloisterError
from cloister_data.release import Receipt, ReceiptContent, rollback_of

_CONTENT = tuple(ReceiptContent.model_fields)


class ReceiptError(CloisterError):
    """The receipt doesn't hold."""

    code: ClassVar[str] = "receipt-refused"


def content_of(receipt: Receipt) -> ReceiptContent:
    """What the receipt says, without its proof."""
    return ReceiptContent.model_validate({name: getattr(receipt, name) for name in _CONTENT})


def verify_receipt(receipt: Receipt, log_key: bytes) -> Checkpoint:
    """The checkpoint that covers the release, once everything in the receipt holds under the log's key (32 bytes).

    Whoever asks must know from the cloister's evidence that the key is its log's. Raises ReceiptError.
    """
    if receipt.log_key != log_key:
        raise _refused("It was signed by another log key than the one that the cloister's evidence binds.")
    try:
        checkpoint = verify_checkpoint(receipt.checkpoint, log_key)
    except CheckpointError as error:
        raise _refused(f"{str(error)[:1].upper()}{str(error)[1:]}.") from error
    try:
        entry = LeafBody.from_json(receipt.entry)
    except ValidationError as error:
        raise _refused("The audit log's entry in it can't be read.") from error
    facts = entry.facts
    if not isinstance(facts, Released) or entry.index != receipt.leaf:
        raise _refused("The audit log's entry in it is another one.")
    if (facts.release, facts.charge, facts.receipt) != (
        receipt.release, receipt.charge, content_of(receipt).digest(),
    ):  # fmt: skip
        raise _refused("It says something else than what the audit log's entry was made for.")
    try:
        merkle.verify_inclusion(
            merkle.leaf_hash(receipt.entry), receipt.leaf, checkpoint.size, receipt.inclusion, checkpoint.root
        )
    except merkle.LogVerificationError as error:
        raise _refused(f"{error.what} {error.why}".strip()) from error
    _verify_witnesses(receipt, checkpoint.origin)
    return checkpoint


def _verify_witnesses(receipt: Receipt, origin: str) -> None:
    """That what it says of a rollback follows from signatures of the witnesses that its entry was made with."""
    keys = {each.owner: each.key for each in receipt.witnesses}
    for each in receipt.witnessed:
        try:
            if each.owner not in keys:
                raise CheckpointError("a witness signed whom its release doesn't name")
            seen = Checkpoint(origin, each.size, each.root)
            verify_cosignature(seen, each.cosignature, witness_name(each.owner), keys[each.owner])
            merkle.verify_inclusion(merkle.leaf_hash(receipt.entry), receipt.leaf, each.size, each.inclusion, each.root)
        except CheckpointError as error:
            raise _refused(f"{str(error)[:1].upper()}{str(error)[1:]}.") from error
        except merkle.LogVerificationError as error:
            raise _refused(f"What a witness signed for doesn't hold its entry: {error.what}") from error
    if receipt.rollback != rollback_of(receipt.sources, receipt.witnessed):
        raise _refused("It says of a rollback what its witnesses' signatures don't.")


def _refused(why: str) -> ReceiptError:
    return ReceiptError(
        "The receipt doesn't hold.",
        why=why,
        next_step="Don't rely on it. Fetch it again: cloister audit receipt. Where that fails too, ask the operator.",
    )
