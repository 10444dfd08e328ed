"""Who made a simulated report: its chain, its root, their dates, its signature. Every function raises EvidenceError."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding

from cloister_attest.certificates import parse_all, quietly, whole_signature
from cloister_attest.outcome import EvidenceError
from cloister_attest.simulated.abi import CHIP_ID_BYTES, Report

CHIP_OID = x509.ObjectIdentifier("2.25.188846109254116530853034107215372716853")
"""The extension in a leaf that says whose it is: the 64 bytes of the chip id, then the tcb as u64 (an own UUID arc)."""

_TCB_BYTES = 8


@dataclass(frozen=True)
class Chain:
    """A leaf and the root that issued it, whose links hold. `chip_id` and `tcb` are what the leaf was issued for."""

    leaf: x509.Certificate
    root: x509.Certificate
    leaf_key: ec.EllipticCurvePublicKey
    chip_id: bytes
    tcb: int


def verify_chain(certificates: tuple[bytes, ...]) -> Chain:
    """The links: a self-signed P-384 root that may issue, and a P-384 leaf that may not, issued by it."""
    if len(certificates) != 2:
        raise EvidenceError(f"the chain has {len(certificates)} certificates, where leaf and root make two")
    leaf, root = (_load(der) for der in certificates)
    for name, certificate in (("leaf", leaf), ("root", root)):
        if not isinstance(certificate.signature_hash_algorithm, SHA384):
            raise EvidenceError(f"the {name} isn't signed with SHA-384")
    _issued_by(root, root, "the root isn't signed by itself")
    _issued_by(leaf, root, "the leaf isn't signed by the root")
    if not _may_issue(root):
        raise EvidenceError("the root isn't a certificate authority")
    if _may_issue(leaf):
        raise EvidenceError("the leaf is a certificate authority")
    _p384(root, "root")
    chip_id, tcb = _chip(leaf)
    return Chain(leaf, root, _p384(leaf, "leaf"), chip_id, tcb)


def verify_root(chain: Chain, pinned: frozenset[str]) -> str:
    """SHA-256 (hex) of the root, once it is one of `pinned`."""
    digest = hashlib.sha256(chain.root.public_bytes(Encoding.DER)).hexdigest()
    if digest not in pinned:
        raise EvidenceError(f"the root {digest} is none of those that the trust file pins")
    return digest


def verify_dates(chain: Chain, at: int) -> datetime:
    """The end of the chain's validity, once `at` (Unix seconds) is within it."""
    moment = datetime.fromtimestamp(at, UTC)
    for name, certificate in (("leaf", chain.leaf), ("root", chain.root)):
        if moment < certificate.not_valid_before_utc:
            raise EvidenceError(f"the {name} isn't valid yet: its time begins {certificate.not_valid_before_utc}")
        if moment > certificate.not_valid_after_utc:
            raise EvidenceError(f"the {name} has expired: its time ended {certificate.not_valid_after_utc}")
    return min(chain.leaf.not_valid_after_utc, chain.root.not_valid_after_utc)


def verify_signature(report: Report, chain: Chain) -> None:
    """The report's ECDSA P-384 signature under the leaf's key."""
    try:
        chain.leaf_key.verify(encode_dss_signature(report.r, report.s), report.signed, ec.ECDSA(SHA384()))
    except (InvalidSignature, ValueError) as error:
        raise EvidenceError("the report's signature doesn't verify under the leaf's key") from error


def _load(der: bytes) -> x509.Certificate:
    try:
        with quietly():
            certificate = parse_all(x509.load_der_x509_certificate(der))
            # Unknown algorithms are noticed where they are first asked for: better here than within a check.
            _ = certificate.signature_hash_algorithm
            return certificate
    except Exception as error:
        # cryptography raises several classes for malformed certificates; each of them means the same here.
        raise EvidenceError("a certificate of the chain can't be read") from error


def _issued_by(certificate: x509.Certificate, issuer: x509.Certificate, otherwise: str) -> None:
    try:
        if not whole_signature(certificate):
            raise InvalidSignature
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, ValueError, TypeError) as error:
        raise EvidenceError(otherwise) from error


def _may_issue(certificate: x509.Certificate) -> bool:
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError) as error:
        raise EvidenceError("a certificate of the chain doesn't say what it may be used for") from error
    if constraints.ca != usage.key_cert_sign:
        raise EvidenceError("a certificate of the chain contradicts itself about issuing others")
    return constraints.ca


def _p384(certificate: x509.Certificate, name: str) -> ec.EllipticCurvePublicKey:
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise EvidenceError(f"the {name}'s key isn't on P-384")
    return key


def _chip(leaf: x509.Certificate) -> tuple[bytes, int]:
    try:
        extension = leaf.extensions.get_extension_for_oid(CHIP_OID).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError) as error:
        raise EvidenceError("the leaf doesn't say which chip it belongs to") from error
    value = extension.value if isinstance(extension, x509.UnrecognizedExtension) else b""
    if len(value) != CHIP_ID_BYTES + _TCB_BYTES:
        raise EvidenceError("the leaf's chip extension has another length")
    return value[:CHIP_ID_BYTES], int.from_bytes(value[CHIP_ID_BYTES:], "big")
