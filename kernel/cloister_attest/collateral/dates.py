"""When a piece of collateral was issued and how long it holds, as it says of itself. Nothing of it is proven."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509

from cloister_attest.certificates import quietly
from cloister_attest.collateral.items import Item
from cloister_attest.outcome import EvidenceError
from cloister_attest.snp.certificates import load_certificate
from cloister_attest.tdx.chain import load_pem
from cloister_attest.tdx.collateral import SignedDocument, parse_signed, parse_time

_MEMBERS = {"intel-tcb-info": "tcbInfo", "intel-qe-identity": "enclaveIdentity"}
_LISTS = ("amd-crl", "intel-root-crl", "intel-pck-crl")


@dataclass(frozen=True)
class Dates:
    """The time (UTC) in which a piece holds, both ends within it."""

    valid_from: datetime
    valid_until: datetime

    def include(self, at: int) -> bool:
        """Whether `at` (Unix seconds) is within it."""
        return self.valid_from.timestamp() <= at <= self.valid_until.timestamp()


@dataclass(frozen=True, order=True)
class Age:
    """What orders the pieces of one kind and name: Intel's tcbEvaluationDataNumber (0 elsewhere), then the issue."""

    evaluation: int
    issued: datetime


def dates_of(item: Item) -> Dates:
    """A certificate's validity, a list's two updates, a document's dates narrowed by its signers'.

    Raises EvidenceError where the content can't be read, and nothing else.
    """
    return read(item)[0]


def age_of(item: Item) -> Age:
    """Raises EvidenceError where the content can't be read, and nothing else."""
    return read(item)[1]


def read(item: Item) -> tuple[Dates, Age]:
    """Both of them. Raises EvidenceError where the content can't be read, and nothing else."""
    if item.kind in _MEMBERS:
        return _document(item)
    if item.kind in _LISTS:
        begins, ends = _updates(item.content)
    else:
        certificate = load_certificate(item.content, item.kind)
        begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return Dates(begins, ends), Age(0, begins)


def load_crl(der: bytes) -> x509.CertificateRevocationList:
    """A revocation list whose issuer and dates can be read. Raises EvidenceError."""
    try:
        with quietly():
            found = x509.load_der_x509_crl(der)
            _ = (found.issuer, found.last_update_utc, found.next_update_utc)
        return found
    except Exception as error:
        # cryptography raises several classes for malformed lists; each of them means the same here.
        raise EvidenceError("the revocation list can't be read") from error


def _updates(der: bytes) -> tuple[datetime, datetime]:
    found = load_crl(der)
    if found.next_update_utc is None:
        raise EvidenceError("the revocation list doesn't say until when it is the newest")
    return found.last_update_utc, found.next_update_utc


def _document(item: Item) -> tuple[Dates, Age]:
    document = parse_signed(item.content, _MEMBERS[item.kind])
    begins, ends = _date(document, "issueDate"), _date(document, "nextUpdate")
    evaluation = document.value.get("tcbEvaluationDataNumber")
    if type(evaluation) is not int or evaluation < 0:
        raise EvidenceError(f"the {item.kind} doesn't say its TCB evaluation")
    signers = load_pem(item.chain, "signing chain")
    if not signers:
        raise EvidenceError(f"the {item.kind} comes without its signing chain")
    try:
        narrowed = Dates(
            max(begins, *(signer.not_valid_before_utc for signer in signers)),
            min(ends, *(signer.not_valid_after_utc for signer in signers)),
        )
    except Exception as error:
        # As in `load_crl`.
        raise EvidenceError("a date in the signing chain can't be read") from error
    return narrowed, Age(evaluation, begins)


def _date(document: SignedDocument, member: str) -> datetime:
    value = document.value.get(member)
    if not isinstance(value, str):
        raise EvidenceError(f"Intel's document has no {member}")
    return parse_time(value)


def utc(at: int) -> datetime:
    """Unix seconds as a date."""
    return datetime.fromtimestamp(at, UTC)
