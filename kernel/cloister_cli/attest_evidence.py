"""Evidence as the commands take it: a file, the name of a cloister that this computer knows, or an address."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from cloister import profile
from cloister.receipts import ReceiptFile
from cloister.unverified import show
from cloister_attest.evidence import MAX_EVIDENCE_JSON, Evidence, EvidenceRecord
from cloister_attest.outcome import EvidenceError
from cloister_attest.snp.abi import parse
from cloister_attest.snp.certificate_table import split_extended
from cloister_attest.tdx.abi import parse_quote
from cloister_data.errors import ConfigurationError
from cloister_data.policy import Platform


@dataclass(frozen=True)
class Shown:
    """A machine's report or quote, and the certificates (DER) that came with it. Nothing of it is proven."""

    platform: Platform
    report: bytes
    certificates: tuple[bytes, ...]


def read_shown(where: str) -> Shown:
    """The evidence in the file `where`, or that the cloister of that name or address shows now.

    Raises ConfigurationError where there is nothing or nothing that can be read; and what `cloister.unverified.show`
    raises.
    """
    if where.startswith("https://"):
        return _of(show(where))
    path = Path(where)
    try:
        return parse_shown(profile.read_bounded(path, limit=MAX_EVIDENCE_JSON), where)
    except FileNotFoundError:
        pass
    if where in profile.names():
        return _of(show(profile.load(where).url))
    raise ConfigurationError(
        f"There is no evidence {where!r}.",
        why="It is neither a file, nor a cloister that this computer knows, nor an address that begins with https://.",
        next_step="Name a report, a quote, an evidence record (JSON), a profile, or https://HOST[:PORT].",
    )


def parse_shown(content: bytes, name: str) -> Shown:
    """Evidence, an evidence record or a receipt (JSON), an SNP report with or without certificates, or a TDX quote.

    Raises ConfigurationError, which says `name`, for anything else.
    """
    if content.lstrip()[:1] == b"{":
        return _of(_evidence(content, name))
    try:
        parse_quote(content)
    except EvidenceError as no_quote:
        try:
            report, table = split_extended(content)
            collateral = table.collateral(parse(report).signing_key)
        except EvidenceError as no_report:
            raise ConfigurationError(
                f"{name} holds no evidence that can be read.",
                why=f"As an SNP report: {no_report}. As a TDX quote: {no_quote}.",
                next_step="Name a report, a quote, or an evidence record (JSON), as it was made.",
            ) from no_report
        chain = (collateral.leaf, collateral.intermediate, collateral.root)
        return Shown("sev-snp", report, tuple(der for der in chain if der is not None))
    return Shown("tdx", content, ())


def _evidence(content: bytes, name: str) -> Evidence:
    for read in (_plain, _record, _receipt):
        with suppress(ValidationError):
            return read(content)
    raise ConfigurationError(
        f"{name} is neither evidence, nor an evidence record, nor a receipt.",
        next_step="In an export of the audit log, each line of evidence.jsonl is an evidence record.",
    )


def _plain(content: bytes) -> Evidence:
    return Evidence.from_json(content)


def _record(content: bytes) -> Evidence:
    return EvidenceRecord.from_json(content).evidence


def _receipt(content: bytes) -> Evidence:
    return ReceiptFile.from_json(content).evidence.evidence


def _of(evidence: Evidence) -> Shown:
    return Shown(evidence.platform, evidence.report, evidence.certificates)
