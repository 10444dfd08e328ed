"""An appraisal with what this computer keeps of the processor makers' documents."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from cloister.profile import home
from cloister_attest.appraise import appraise
from cloister_attest.collateral.items import Item
from cloister_attest.collateral.store import CollateralStore
from cloister_attest.evidence import Evidence
from cloister_attest.policy import AttestationPolicy
from cloister_attest.result import AttestationResult


def collateral_store(directory: Path | None = None) -> CollateralStore:
    """Where `cloister attest fetch-collateral` keeps those documents, and every appraisal on this computer looks."""
    return CollateralStore(home() / "collateral" if directory is None else directory)


def judge(
    evidence: Evidence | bytes,
    policy: AttestationPolicy,
    *,
    certificate: bytes,
    nonce: bytes,
    at: int,
    store: CollateralStore | None = None,
) -> AttestationResult:
    """`cloister_attest.appraise.appraise`, with the collateral in `store`, or in this computer's own.

    Raises ConfigurationError where a file of that store is damaged.
    """
    if isinstance(evidence, bytes):
        # What can't be read fails every check of the appraisal.
        with suppress(ValidationError):
            evidence = Evidence.from_json(evidence)
    cached: tuple[Item, ...] = ()
    if isinstance(evidence, Evidence):
        kept = collateral_store() if store is None else store
        cached = kept.relevant(evidence.platform, evidence.report, evidence.certificates)
    return appraise(evidence, policy, certificate=certificate, nonce=nonce, at=at, cached=cached)
