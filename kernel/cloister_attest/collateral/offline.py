"""What a file of collateral is, as it was downloaded on another machine or comes from a mirror. Nothing is believed.

Known are AMD's certificates and lists, and Intel's lists and JSON documents, in DER, PEM or hex. A JSON document's
signing chain is in a header of the answer that brought it: in PEM, or as the header stands in a saved answer.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from urllib.parse import unquote_to_bytes

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from cloister_attest.collateral.dates import load_crl
from cloister_attest.collateral.items import MAX_CHAIN, MAX_CONTENT, Item, Kind
from cloister_attest.collateral.needs import product_of, vcek_name
from cloister_attest.outcome import EvidenceError
from cloister_attest.snp.certificates import common_name, load_certificate, named, read_leaf
from cloister_attest.snp.products import PRODUCTS
from cloister_attest.tdx import chain
from cloister_attest.tdx.collateral import SignedDocument, parse_signed, verify_document

MAX_BLOCKS = 64
"""PEM blocks of one file, and certificates among which a document's signer is looked for."""

_PEM = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,32})-----([A-Za-z0-9+/=\s]*)-----END \1-----")
_QUOTED = re.compile(rb"-----BEGIN%20CERTIFICATE-----[A-Za-z0-9%+/=-]*")
_HEX = re.compile(rb"[0-9A-Fa-f\s]+")
_FMSPC = re.compile(r"[0-9A-Fa-f]{12}")

_AMD_AUTHORITIES: tuple[tuple[str, Kind], ...] = (
    ("ARK-", "amd-ark"),
    ("SEV-VLEK-", "amd-asvk"),
    ("SEV-", "amd-ask"),
)
_INTEL_LISTS: dict[str, tuple[Kind, str]] = {
    chain.ROOT_CA: ("intel-root-crl", "root"),
    chain.PLATFORM_CA: ("intel-pck-crl", "platform"),
    chain.PROCESSOR_CA: ("intel-pck-crl", "processor"),
}
_INTEL_SIGNERS = (chain.TCB_SIGNING, chain.ROOT_CA)


def identify(content: bytes, others: Sequence[bytes]) -> tuple[Item, ...]:
    """The items in a file.

    Args:
        content: the file.
        others: files among which the signing chain of Intel's JSON documents is looked for.

    Returns none where the file is a part of Intel's signing chain, which serves documents alone. Raises EvidenceError,
    and nothing else, where it is something that no appraisal takes.
    """
    if not content.strip():
        raise EvidenceError("it is empty")
    if len(content) > MAX_CONTENT:
        raise EvidenceError(f"it has {len(content)} bytes, and {MAX_CONTENT} are enough for any collateral")
    if content.lstrip()[:1] == b"{":
        return (_document(content, others),)
    blocks = _blocks(content)
    if not blocks:
        raise EvidenceError("it is neither a certificate, nor a revocation list, nor a JSON document of Intel's")
    items: list[Item] = []
    signers, refused = 0, EvidenceError("it holds nothing that an appraisal takes")
    for der in blocks:
        try:
            item = _block(der)
        except EvidenceError as error:
            refused = error
            continue
        if item is None:
            signers += 1
        elif item not in items:
            items.append(item)
    if not items and not signers:
        raise refused
    return tuple(items)


def _blocks(content: bytes) -> tuple[bytes, ...]:
    """What the file holds as DER: itself, its PEM blocks, or what its hex digits spell. Empty for anything else."""
    if content[:1] == b"\x30" and not _HEX.fullmatch(content):
        return (content,)
    if _HEX.fullmatch(content):
        digits = b"".join(content.split())
        return (binascii.unhexlify(digits),) if len(digits) % 2 == 0 else ()
    quoted = b"\n".join(unquote_to_bytes(part) for part in _QUOTED.findall(content))
    found: list[bytes] = []
    for match in _PEM.finditer(quoted or content):
        if len(found) == MAX_BLOCKS:
            break
        try:
            found.append(base64.b64decode(b"".join(match[2].split()), validate=True))
        except binascii.Error:
            continue
    return tuple(found)


def _block(der: bytes) -> Item | None:
    """The item that is `der`; None for a certificate of Intel's signing chain. Raises EvidenceError."""
    try:
        certificate = load_certificate(der, "file")
    except EvidenceError:
        try:
            issuer = load_crl(der).issuer
        except EvidenceError as error:
            raise EvidenceError("it can be read neither as a certificate nor as a revocation list") from error
        return _list(issuer, der)
    return _certificate(certificate, der)


def _certificate(certificate: x509.Certificate, der: bytes) -> Item | None:
    name = common_name(certificate, "certificate")
    if name in _INTEL_SIGNERS:
        return None
    if name == "SEV-VLEK":
        raise EvidenceError("it is a VLEK, which comes with the evidence from the cloud provider's host")
    if name == chain.PCK:
        raise EvidenceError("it is a PCK certificate, which the quote holds itself")
    product = product_of(certificate)
    if product is None:
        raise EvidenceError("it is a certificate, and none that AMD's or Intel's appraisal takes")
    named(certificate, name, "certificate")
    if name == "SEV-VCEK":
        leaf = read_leaf(certificate, "VCEK", product)
        return _item("amd-vcek", vcek_name(leaf.hwid or b"", leaf.tcb), der)
    for prefix, kind in _AMD_AUTHORITIES:
        if name == prefix + product:
            return _item(kind, product, der)
    raise EvidenceError("it is a certificate of AMD's, and neither an ARK, an ASK, an ASVK nor a VCEK")


def _list(issuer: x509.Name, der: bytes) -> Item:
    for attribute in issuer.get_attributes_for_oid(NameOID.COMMON_NAME):
        for product in PRODUCTS:
            if attribute.value == f"ARK-{product}":
                return _item("amd-crl", product, der)
        if attribute.value in _INTEL_LISTS:
            return _item(*_INTEL_LISTS[str(attribute.value)], der)
    raise EvidenceError("it is a revocation list, and neither of an AMD root nor of Intel's authorities")


def _document(content: bytes, others: Sequence[bytes]) -> Item:
    kind: Kind
    try:
        document, kind = parse_signed(content, "tcbInfo"), "intel-tcb-info"
    except EvidenceError:
        try:
            document, kind = parse_signed(content, "enclaveIdentity"), "intel-qe-identity"
        except EvidenceError as error:
            raise EvidenceError("it is JSON, and neither Intel's TCB info nor an enclave's identity") from error
    if kind == "intel-tcb-info":
        fmspc = document.value.get("fmspc")
        if document.value.get("id") != "TDX" or not isinstance(fmspc, str) or not _FMSPC.fullmatch(fmspc):
            raise EvidenceError("it is TCB info, and not that of a TDX platform: SGX has other addresses")
        name = fmspc.lower()
    else:
        if document.value.get("id") != "TD_QE":
            raise EvidenceError("it is an enclave's identity, and not that of TDX's quoting enclave")
        name = "td"
    return _item(kind, name, content, _chain(document, others))


def _chain(document: SignedDocument, others: Sequence[bytes]) -> bytes:
    """PEM of the certificate that signed the document, and of the root that issued it."""
    known: list[x509.Certificate] = []
    for other in others:
        for der in _blocks(other[: MAX_CONTENT + 1]):
            if len(known) < MAX_BLOCKS:
                known.extend(each for each in _loaded(der) if each not in known)
    for signer in known:
        try:
            verify_document(document, signer, "document")
        except EvidenceError:
            continue
        for root in known:
            if root != signer and _issued(signer, root):
                found = signer.public_bytes(Encoding.PEM) + root.public_bytes(Encoding.PEM)
                if len(found) <= MAX_CHAIN:
                    return found
        raise EvidenceError("the root that issued its signer's certificate isn't among the files: add the whole chain")
    raise EvidenceError(
        "the certificate that signed it isn't among the files: add the signing chain, which comes in a header of the "
        "same answer (curl --dump-header FILE)"
    )


def _loaded(der: bytes) -> tuple[x509.Certificate, ...]:
    try:
        return (load_certificate(der, "signing chain"),)
    except EvidenceError:
        return ()


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except Exception:
        # cryptography raises several classes for what can't be verified; each of them means the same here.
        return False
    return True


def _item(kind: Kind, name: str, content: bytes, signers: bytes = b"") -> Item:
    return Item(kind=kind, name=name, content=content, chain=signers)
