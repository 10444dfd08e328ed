"""Who made an SEV-SNP report: its chain up to AMD's root, and its signature. Every function raises EvidenceError.

The functions prove one thing each, on certificates that are no more than read: only all of them together prove a
report. `appraise.appraise_snp` makes them all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding

from cloister_attest.certificates import quietly, serial_number
from cloister_attest.outcome import EvidenceError
from cloister_attest.snp.abi import CHIP_ID_BYTES, Report
from cloister_attest.snp.certificate_table import Collateral
from cloister_attest.snp.certificates import (
    common_name,
    known_critical,
    load_certificate,
    may_issue,
    named,
    product_named,
    read_leaf,
    verify_signed_by,
)
from cloister_attest.snp.products import Product, decode_tcb
from cloister_attest.snp.vendor import ARK_SHA256, ASK_SHA256, ASVK_SHA256

MAX_CRL = 1 << 20

LeafKind = Literal["VCEK", "VLEK"]
_LEAF_NAMES: dict[str, LeafKind] = {"SEV-VCEK": "VCEK", "SEV-VLEK": "VLEK"}
_ISSUER_PREFIX: dict[LeafKind, str] = {"VCEK": "SEV-", "VLEK": "SEV-VLEK-"}
_ISSUER_TITLE: dict[LeafKind, str] = {"VCEK": "ASK", "VLEK": "ASVK"}

# The stepping may follow ("Milan-B0"). AMD sells two more processors whose keys are Genoa's.
_LEAF_PRODUCTS: dict[str, Product] = {
    "Milan": "Milan",
    "Genoa": "Genoa",
    "Bergamo": "Genoa",
    "Siena": "Genoa",
    "Turin": "Turin",
}


@dataclass(frozen=True)
class Chain:
    """The three certificates of a report, read and not proven: VCEK or VLEK, ASK or ASVK, ARK."""

    leaf: x509.Certificate
    intermediate: x509.Certificate
    root: x509.Certificate

    @cached_property
    def product(self) -> Product:
        """The product that the root is named for."""
        return product_named(self.root, "ARK-", "root")

    @cached_property
    def kind(self) -> LeafKind:
        """What the leaf is named."""
        name = common_name(self.leaf, "leaf")
        if name not in _LEAF_NAMES:
            raise EvidenceError("the leaf is named neither SEV-VCEK nor SEV-VLEK")
        return _LEAF_NAMES[name]


@dataclass(frozen=True)
class RevocationList:
    """A list of revoked serial numbers that the root signed, and when it was and will be made."""

    revoked: frozenset[int]
    this_update: datetime
    next_update: datetime


def read_chain(collateral: Collateral) -> Chain:
    """The certificates, all three there and readable."""
    return Chain(
        leaf=load_certificate(collateral.leaf, "report's signer"),
        intermediate=load_certificate(collateral.intermediate, "signer's issuer"),
        root=load_certificate(collateral.root, "root"),
    )


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the DER form, hex."""
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()


def verify_root(chain: Chain, pinned: Collection[str] | Literal["vendor"]) -> str:
    """The root's SHA-256 (hex), once it is pinned: one of `pinned`, or AMD's own for the product that it names."""
    digest = fingerprint(chain.root)
    expected = (ARK_SHA256[chain.product],) if pinned == "vendor" else pinned
    if digest not in expected:
        whose = "AMD's own" if pinned == "vendor" else "one that the policy names"
        raise EvidenceError(f"the root {digest} isn't {whose}")
    return digest


def verify_links(chain: Chain) -> None:
    """Root to root, root to intermediate, intermediate to leaf: names and RSASSA-PSS signatures (57230)."""
    verify_signed_by(chain.root, chain.root, "root", "root")
    verify_signed_by(chain.intermediate, chain.root, "intermediate", "root")
    verify_signed_by(chain.leaf, chain.intermediate, "leaf", "intermediate")


def verify_roles(chain: Chain) -> None:
    """AMD's names, RSA-4096 issuers that may issue, and a P-384 leaf that may not."""
    product, kind = chain.product, chain.kind
    named(chain.root, f"ARK-{product}", "root")
    named(chain.leaf, f"SEV-{kind}", "leaf")
    named(chain.intermediate, _issuer_name(chain.intermediate), "intermediate")
    for certificate, name in ((chain.root, "root"), (chain.intermediate, "intermediate")):
        may_issue(certificate, name)
    leaf_key(chain)
    found = chain.leaf.extensions
    known_critical(found, "leaf")
    for extension in found:
        value = extension.value
        if (isinstance(value, x509.BasicConstraints) and value.ca) or (
            isinstance(value, x509.KeyUsage) and value.key_cert_sign
        ):
            raise EvidenceError("the leaf may issue certificates")


def verify_signing_key(report: Report, chain: Chain) -> LeafKind:
    """The kind of the key, once SIGNING_KEY, the leaf's name and the intermediate's name agree on it.

    MASK_CHIP_KEY says that the chip signs nothing with its VCEK (56860, SNP_CONFIG), so it contradicts a VCEK.
    """
    kind = chain.kind
    if report.signing_key != kind:
        raise EvidenceError(f"the report names {report.signing_key} as its signing key, and the leaf is a {kind}")
    if _issuer_kind(chain.intermediate) != kind:
        raise EvidenceError(f"the leaf is a {kind} and its issuer isn't an {_ISSUER_TITLE[kind]}")
    if kind == "VCEK" and report.mask_chip_key:
        raise EvidenceError("the report says that its VCEK is masked, and so can't have signed it")
    return kind


def verify_product(report: Report, chain: Chain) -> Product:
    """The product, once CPUID (from version 3 on), the leaf, the intermediate and the root agree on it."""
    product = chain.product
    if report.product is not None and report.product != product:
        raise EvidenceError(f"the report comes from a {report.product}, and the root is for {product}")
    if _issuer_product(chain.intermediate) != product:
        raise EvidenceError(f"the intermediate is for another product than the root's {product}")
    name = read_leaf(chain.leaf, chain.kind, product).product_name
    if _LEAF_PRODUCTS.get(name.partition("-")[0]) != product:
        raise EvidenceError(f"the leaf is for {name[:64]}, and the root is for {product}")
    return product


def verify_signer_tcb(report: Report, chain: Chain) -> None:
    """The leaf was issued for REPORTED_TCB, from which the signing key is derived (57230, SPL extensions)."""
    product = chain.product
    issued = decode_tcb(read_leaf(chain.leaf, chain.kind, product).tcb, product)
    reported = decode_tcb(report.reported_tcb, product)
    if issued != reported:
        raise EvidenceError(f"the report claims the tcb {reported}, and its signer was issued for {issued}")


def verify_chip(report: Report, chain: Chain) -> bytes | None:
    """The chip's 64 bytes, once CHIP_ID is the hardware id of a VCEK, or is zero as the host masks it (MASK_CHIP_ID).

    A masked report that a VCEK signed comes from the VCEK's chip. A VLEK names no chip: then the report alone does, and
    the answer is None where that is masked.
    """
    hwid = read_leaf(chain.leaf, chain.kind, chain.product).hwid
    if hwid is None:
        return None if report.chip_id_masked else report.chip_id
    chip_id = hwid.ljust(CHIP_ID_BYTES, b"\0")
    if not report.chip_id_masked and report.chip_id != chip_id:
        raise EvidenceError("the report names another chip than its signer was issued for")
    return chip_id


def verify_dates(chain: Chain, at: int) -> datetime:
    """The end of the chain's validity, once `at` (Unix seconds) is within that of every certificate."""
    moment = datetime.fromtimestamp(at, UTC)
    certificates = {"leaf": chain.leaf, "intermediate": chain.intermediate, "root": chain.root}
    for name, certificate in certificates.items():
        if moment < certificate.not_valid_before_utc:
            raise EvidenceError(f"the {name} isn't valid yet: its time begins {certificate.not_valid_before_utc}")
        if moment > certificate.not_valid_after_utc:
            raise EvidenceError(f"the {name} has expired: its time ended {certificate.not_valid_after_utc}")
    return min(certificate.not_valid_after_utc for certificate in certificates.values())


def verify_signature(report: Report, chain: Chain) -> None:
    """The report's ECDSA signature on P-384 with SHA-384, under the leaf's key."""
    try:
        leaf_key(chain).verify(encode_dss_signature(report.r, report.s), report.signed, ec.ECDSA(SHA384()))
    except (InvalidSignature, ValueError) as error:
        raise EvidenceError("the report's signature doesn't verify under the leaf's key") from error


def leaf_key(chain: Chain) -> ec.EllipticCurvePublicKey:
    key = chain.leaf.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise EvidenceError("the leaf's key isn't on P-384")
    return key


def verify_crl(crl: bytes | None, root: x509.Certificate, at: int) -> RevocationList:
    """The list, once the root signed it and `at` (Unix seconds) is between its two updates (RFC 5280, 5)."""
    if crl is None:
        raise EvidenceError("there is no revocation list")
    found = _signed_crl(crl, root)
    moment = datetime.fromtimestamp(at, UTC)
    if moment < found.this_update:
        raise EvidenceError(f"the revocation list isn't valid yet: it was made {found.this_update}")
    if moment > found.next_update:
        raise EvidenceError(f"the revocation list is out of date: the next one was due {found.next_update}")
    return found


def verify_not_revoked(chain: Chain, crl: bytes | None, at: int) -> RevocationList:
    """The root's list of `at`, once neither intermediate nor root is on it. It covers what the root issued."""
    found = verify_crl(crl, chain.root, at)
    _not_on(found, chain)
    return found


def verify_never_revoked(chain: Chain, crls: Iterable[bytes]) -> None:
    """Neither intermediate nor root is on one of `crls`, of any time, that the root signed; others say nothing."""
    for crl in crls:
        try:
            found = _signed_crl(crl, chain.root)
        except EvidenceError:
            continue
        _not_on(found, chain)


def _not_on(found: RevocationList, chain: Chain) -> None:
    for certificate, name in ((chain.intermediate, "intermediate"), (chain.root, "root")):
        number = serial_number(certificate)
        if number in found.revoked:
            raise EvidenceError(f"the {name}, number {number}, is revoked")


def _signed_crl(crl: bytes, root: x509.Certificate) -> RevocationList:
    if len(crl) > MAX_CRL:
        raise EvidenceError(f"the revocation list has {len(crl)} bytes, and {MAX_CRL} are enough")
    try:
        with quietly():
            found = x509.load_der_x509_crl(crl)
            revoked = frozenset(entry.serial_number for entry in found)
            critical = [extension for extension in found.extensions if extension.critical]
            critical += [extension for entry in found for extension in entry.extensions if extension.critical]
            this_update, next_update = found.last_update_utc, found.next_update_utc
            # The name is parsed where it is first looked at: better here than within a check.
            _ = found.issuer
    except Exception as error:
        # cryptography raises several classes for malformed lists; each of them means the same here.
        raise EvidenceError("the revocation list can't be read") from error
    verify_signed_by(found, root, "revocation list", "root")
    if not may_issue(root, "root").crl_sign:
        raise EvidenceError("the root may not sign revocation lists")
    if critical:
        raise EvidenceError("the revocation list has critical extensions: it isn't the root's whole list")
    if next_update is None:
        raise EvidenceError("the revocation list doesn't say until when it is the newest")
    return RevocationList(revoked, this_update, next_update)


def verify_known_intermediate(chain: Chain) -> None:
    """The intermediate is one of those that this program carries, for the leaf's kind and the root's product."""
    known = (ASK_SHA256 if chain.kind == "VCEK" else ASVK_SHA256)[chain.product]
    if fingerprint(chain.intermediate) != known:
        raise EvidenceError("the intermediate is none of AMD's that this program knows")


def _issuer_kind(intermediate: x509.Certificate) -> LeafKind:
    return "VLEK" if _issuer_name(intermediate).startswith(_ISSUER_PREFIX["VLEK"]) else "VCEK"


def _issuer_product(intermediate: x509.Certificate) -> Product:
    return product_named(intermediate, _ISSUER_PREFIX[_issuer_kind(intermediate)], "intermediate")


def _issuer_name(intermediate: x509.Certificate) -> str:
    name = common_name(intermediate, "intermediate")
    if not name.startswith("SEV-"):
        raise EvidenceError("the intermediate isn't named as an ASK or an ASVK")
    return name
