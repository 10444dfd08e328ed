"""The evidence on the wire: what a client asks for, and what the machine shows."""

from __future__ import annotations

import secrets
from typing import Annotated, Self

from pydantic import Field, ValidationError
from pydantic_core import PydanticCustomError

from cloister_attest.collateral.items import Items
from cloister_attest.reference_values import MAX_ENVELOPE
from cloister_data.base import Wire, canonical_json
from cloister_data.policy import Platform

NONCE_BYTES = 32
LOG_KEY_BYTES = 32
MAX_REPORT = 64 << 10
MAX_CERTIFICATE = 16 << 10
MAX_CERTIFICATES = 8
MAX_CHECKPOINT = 8 << 10
MAX_GPU = 1 << 20
MAX_EVIDENCE_JSON = 8 << 20
"""Bytes that a client reads of an answer to an AttestRequest before it gives up."""


MAX_PARTS = 32 << 10
"""Commas in evidence, whose texts hold more of them than its few fields need."""


class Sparse(Wire):
    """A message of few parts from whoever nobody has proven yet.

    pydantic keeps a report of each fault: eight megabytes of empty items would take gigabytes of memory.
    """

    @classmethod
    def from_json(cls, data: bytes | str) -> Self:
        parts = data.count(",") if isinstance(data, str) else data.count(b",")
        if parts > MAX_PARTS:
            fault = PydanticCustomError("too_many_parts", "It has more than {most} parts", {"most": MAX_PARTS})
            raise ValidationError.from_exception_data(cls.__name__, [{"type": fault, "input": None}])
        return super().from_json(data)


class AttestRequest(Wire):
    """`POST /.well-known/attest`: evidence over a fresh nonce of 32 random bytes."""

    nonce: bytes = Field(min_length=NONCE_BYTES, max_length=NONCE_BYTES)

    @classmethod
    def fresh(cls) -> Self:
        return cls(nonce=secrets.token_bytes(NONCE_BYTES))


class Evidence(Sparse):
    """What a machine shows to be believed.

    Attributes:
        report: the platform's signed report or quote, as the hardware made it. Its 64 bytes of report data are
            `cloister_attest.binding.report_data` of the channel's key, the client's nonce and the fields below.
        certificates: DER, the report's signer first, its root last.
        checkpoint: the audit log's signed checkpoint (C2SP tlog-checkpoint) at the moment of the request.
        log_key: the Ed25519 key (32 bytes) that signs the checkpoints.
        gpu: the confidential GPU's own evidence, or None where the machine has none.
        collateral: what the processor's maker publishes about it, as far as the machine has it at hand. Evidence that
            is kept must hold it, to be judged again when the maker has published something else.
        reference_values: what the image's publisher signed, or None where the operator gave the guard none.

    Report data bind neither of the last two: each is signed by whom it comes from.
    """

    platform: Platform
    report: bytes = Field(min_length=1, max_length=MAX_REPORT)
    certificates: tuple[Annotated[bytes, Field(min_length=1, max_length=MAX_CERTIFICATE)], ...] = Field(
        max_length=MAX_CERTIFICATES
    )
    checkpoint: str = Field(max_length=MAX_CHECKPOINT)
    log_key: bytes = Field(min_length=LOG_KEY_BYTES, max_length=LOG_KEY_BYTES)
    gpu: Annotated[bytes, Field(max_length=MAX_GPU)] | None = None
    collateral: Items = ()
    reference_values: Annotated[bytes, Field(max_length=MAX_ENVELOPE)] | None = None

    def canonical(self) -> bytes:
        """What the digest of a start's evidence covers: a field that is empty isn't there, as before there was it."""
        empty = {name for name in ("collateral", "reference_values") if not getattr(self, name)}
        return canonical_json(self.model_dump(mode="json", exclude=empty))


class EvidenceRecord(Sparse):
    """The evidence of one start of a guard, with all that an appraisal needs: whoever keeps it can make it again.

    `nonce` (32 bytes) is the guard's own; `certificate` is the TLS certificate (DER) that the evidence is bound to. The
    digest of `evidence` is in the `guard-started` entry of the audit log and in every receipt of that start.
    """

    evidence: Evidence
    nonce: bytes = Field(min_length=NONCE_BYTES, max_length=NONCE_BYTES)
    certificate: bytes = Field(min_length=1, max_length=MAX_CERTIFICATE)
