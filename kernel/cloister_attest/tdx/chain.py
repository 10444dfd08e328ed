"""Intel's certificates and revocation lists: their links, names, roles, dates. Every function raises EvidenceError.

Source: Intel SGX PCK Certificate and Certificate Revocation List Profile Specification; RFC 5280, 6.1 and 6.3.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from cloister_attest.certificates import parse_all, quietly, serial_number, whole_signature
from cloister_attest.outcome import EvidenceError
from cloister_attest.tdx.extension import SGX_EXTENSION_OID, SgxExtension, parse_extension

INTEL_SGX_ROOT = "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"
"""SHA-256 of the DER certificate "Intel SGX Root CA", which Intel publishes as Intel_SGX_Provisioning_Certification_
RootCA.cer."""

ROOT_CA = "Intel SGX Root CA"
PLATFORM_CA = "Intel SGX PCK Platform CA"
PROCESSOR_CA = "Intel SGX PCK Processor CA"
PCK = "Intel SGX PCK Certificate"
TCB_SIGNING = "Intel SGX TCB Signing"
_ORGANISATION = "Intel Corporation"

MAX_PEM = 32 << 10
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----\r?\n([A-Za-z0-9+/=\r\n]+?)\r?\n-----END CERTIFICATE-----\s*")
_KNOWN_EXTENSIONS = (x509.BasicConstraints, x509.KeyUsage)


@dataclass(frozen=True)
class PckChain:
    """The quote's chain, whose links, names and roles hold; neither pinned nor dated yet."""

    leaf: x509.Certificate
    ca: x509.Certificate
    root: x509.Certificate

    @property
    def ca_name(self) -> str:
        return _common_name(self.ca)

    @property
    def certificates(self) -> tuple[x509.Certificate, ...]:
        return (self.leaf, self.ca, self.root)


@dataclass(frozen=True)
class SigningChain:
    """The chain of TCB info or QE identity, whose links, names and roles hold; neither pinned nor dated yet."""

    signer: x509.Certificate
    root: x509.Certificate

    @property
    def certificates(self) -> tuple[x509.Certificate, ...]:
        return (self.signer, self.root)


def verify_pck_chain(pem: bytes) -> PckChain:
    """Three certificates: a PCK leaf, the Platform or Processor CA that issued it, the root that issued that."""
    certificates = load_pem(pem, "PCK chain")
    if len(certificates) != 3:
        raise EvidenceError(f"the PCK chain has {len(certificates)} certificates, where leaf, CA and root make three")
    _verify_links(certificates)
    leaf, ca, root = certificates
    _verify_name(leaf, PCK)
    _verify_name(ca, PLATFORM_CA, PROCESSOR_CA)
    _verify_name(root, ROOT_CA)
    return PckChain(leaf, ca, root)


def verify_signing_chain(pem: bytes, name: str) -> SigningChain:
    """Two certificates: the TCB signer, and the root that issued it."""
    certificates = load_pem(pem, name)
    if len(certificates) != 2:
        raise EvidenceError(f"the {name} has {len(certificates)} certificates, where signer and root make two")
    _verify_links(certificates)
    signer, root = certificates
    _verify_name(signer, TCB_SIGNING)
    _verify_name(root, ROOT_CA)
    return SigningChain(signer, root)


def verify_root(root: x509.Certificate, pinned: frozenset[str]) -> str:
    """SHA-256 (hex) of the root, once it is one of `pinned`."""
    digest = hashlib.sha256(root.public_bytes(Encoding.DER)).hexdigest()
    if digest not in pinned:
        raise EvidenceError(f"the chain ends at the root {digest}, which isn't pinned")
    return digest


def verify_dates(certificates: tuple[x509.Certificate, ...], at: int) -> datetime:
    """The end of the certificates' common validity, once `at` (Unix seconds) is within it."""
    now = moment(at)
    for certificate in certificates:
        name = _common_name(certificate)
        if now < certificate.not_valid_before_utc:
            raise EvidenceError(f"{name} isn't valid yet: its time begins {certificate.not_valid_before_utc}")
        if now > certificate.not_valid_after_utc:
            raise EvidenceError(f"{name} has expired: its time ended {certificate.not_valid_after_utc}")
    return min(certificate.not_valid_after_utc for certificate in certificates)


def verify_crl(
    der: bytes, issuer: x509.Certificate, certificates: tuple[x509.Certificate, ...], at: int, fetch: str
) -> datetime:
    """The list's next update, once `issuer` signed it, it is current, and it names none of `certificates`.

    `fetch` says where a current list is to be had.
    """
    name = _common_name(issuer)
    try:
        with quietly():
            crl = x509.load_der_x509_crl(der)
            begins, ends = crl.last_update_utc, crl.next_update_utc
            critical = any(extension.critical for extension in crl.extensions)
            same_issuer = crl.issuer == issuer.subject
            sha256 = isinstance(crl.signature_hash_algorithm, SHA256)
    except Exception as error:
        # cryptography raises several classes for malformed lists; each of them means the same here.
        raise EvidenceError(f"the revocation list of {name} can't be read as DER: fetch {fetch}") from error
    if not same_issuer:
        raise EvidenceError(f"the revocation list comes from another issuer than {name}: fetch {fetch}")
    if not sha256 or not _crl_signed(crl, public_key(issuer)):
        raise EvidenceError(f"the revocation list isn't signed by {name}")
    if critical:
        raise EvidenceError(f"the revocation list of {name} is limited by an extension that Intel's lists don't have")
    now = moment(at)
    if now < begins:
        raise EvidenceError(f"the revocation list of {name} is of the future: its time begins {begins}")
    if ends is None or now > ends:
        raise EvidenceError(f"the revocation list of {name} has expired ({ends}): fetch {fetch}")
    for certificate in certificates:
        if crl.get_revoked_certificate_by_serial_number(serial_number(certificate)) is not None:
            raise EvidenceError(f"{name} has revoked the certificate of {_common_name(certificate)}")
    return ends


def sgx_extension(chain: PckChain) -> SgxExtension:
    """The platform that the PCK certificate was issued for."""
    try:
        extension = chain.leaf.extensions.get_extension_for_oid(x509.ObjectIdentifier(SGX_EXTENSION_OID)).value
    except (x509.ExtensionNotFound, ValueError) as error:
        raise EvidenceError("the PCK certificate doesn't say which platform it belongs to") from error
    if not isinstance(extension, x509.UnrecognizedExtension):
        raise EvidenceError("the PCK certificate's SGX extension can't be read")
    parsed = parse_extension(extension.value)
    if chain.ca_name == PLATFORM_CA and parsed.platform_instance is None:
        raise EvidenceError("the Platform CA's certificate names no platform instance")
    return parsed


def verify_ecdsa(key: ec.EllipticCurvePublicKey, signature: bytes, data: bytes, otherwise: str) -> None:
    """An ECDSA P-256 signature with SHA-256, r and s of 32 bytes each, over `data`."""
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    try:
        if len(signature) != 64:
            raise InvalidSignature
        key.verify(encode_dss_signature(r, s), data, ec.ECDSA(SHA256()))
    except (InvalidSignature, ValueError) as error:
        raise EvidenceError(otherwise) from error


def public_key(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey:
    try:
        key = certificate.public_key()
    except Exception as error:
        raise EvidenceError("a certificate's key can't be read") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise EvidenceError(f"the key of {_common_name(certificate)} isn't on P-256")
    return key


def load_pem(pem: bytes, name: str) -> tuple[x509.Certificate, ...]:
    """Certificates and nothing else; NUL may end the text."""
    text = pem.rstrip(b"\0")
    if len(text) > MAX_PEM:
        raise EvidenceError(f"the {name} has more than {MAX_PEM} bytes")
    certificates = []
    position = 0
    while position < len(text):
        match = _PEM.match(text, position)
        if match is None:
            raise EvidenceError(f"the {name} isn't a list of PEM certificates")
        certificates.append(_load(match[1], name))
        position = match.end()
    return tuple(certificates)


def moment(at: int) -> datetime:
    try:
        return datetime.fromtimestamp(at, UTC)
    except (OverflowError, OSError, ValueError) as error:
        raise EvidenceError(f"{at} seconds is no moment to verify at") from error


def _load(body: bytes, name: str) -> x509.Certificate:
    try:
        der = base64.b64decode(re.sub(rb"[\r\n]", b"", body), validate=True)
        with quietly():
            return parse_all(x509.load_der_x509_certificate(der))
    except binascii.Error as error:
        raise EvidenceError(f"the {name} isn't base64") from error
    except Exception as error:
        # cryptography raises several classes for malformed certificates; each of them means the same here.
        raise EvidenceError(f"a certificate of the {name} can't be read") from error


def _verify_links(certificates: tuple[x509.Certificate, ...]) -> None:
    """Each certificate issued by the next, the last by itself; the first alone may not issue."""
    issuers = (*certificates[1:], certificates[-1])
    for depth, (certificate, issuer) in enumerate(zip(certificates, issuers, strict=True)):
        public_key(certificate)
        _verify_role(certificate, depth)
        try:
            if not isinstance(certificate.signature_hash_algorithm, SHA256):
                raise EvidenceError(f"the certificate of {_common_name(certificate)} isn't signed with SHA-256")
            if not whole_signature(certificate):
                raise EvidenceError(f"the signature of {_common_name(certificate)} isn't whole bytes")
            certificate.verify_directly_issued_by(issuer)
        except EvidenceError:
            raise
        except Exception as error:
            raise EvidenceError(f"{_common_name(issuer)} didn't issue {_common_name(certificate)}") from error


def _verify_role(certificate: x509.Certificate, depth: int) -> None:
    """RFC 5280, 6.1.4 (k) to (o). `depth` is the number of certificates below: 0 is a leaf, which may not issue."""
    name = _common_name(certificate)
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        unknown = [
            extension
            for extension in certificate.extensions
            if extension.critical and not isinstance(extension.value, _KNOWN_EXTENSIONS)
        ]
    except Exception as error:
        raise EvidenceError(f"the certificate of {name} doesn't say what it may be used for") from error
    if unknown:
        raise EvidenceError(f"the certificate of {name} has a critical extension that this program doesn't know")
    if depth == 0:
        if constraints.ca or usage.key_cert_sign or not usage.digital_signature:
            raise EvidenceError(f"the certificate of {name} isn't one that signs documents alone")
        return
    if not constraints.ca or not usage.key_cert_sign or not usage.crl_sign:
        raise EvidenceError(f"the certificate of {name} isn't an authority's")
    if constraints.path_length is not None and constraints.path_length < depth - 1:
        raise EvidenceError(f"the certificate of {name} may not issue authorities")


def _verify_name(certificate: x509.Certificate, *allowed: str) -> None:
    name = _common_name(certificate)
    organisations = [
        attribute.value for attribute in certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    ]
    if name not in allowed or organisations != [_ORGANISATION]:
        raise EvidenceError(f"a certificate isn't named {' or '.join(allowed)}, of {_ORGANISATION}, where it should be")


def _common_name(certificate: x509.Certificate) -> str:
    try:
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except Exception as error:
        raise EvidenceError("a certificate's name can't be read") from error
    value = names[0].value if len(names) == 1 else ""
    known = {ROOT_CA, PLATFORM_CA, PROCESSOR_CA, PCK, TCB_SIGNING}
    # What the evidence calls itself isn't quoted to people.
    return value if isinstance(value, str) and value in known else "an unknown name"


def _crl_signed(crl: x509.CertificateRevocationList, key: ec.EllipticCurvePublicKey) -> bool:
    try:
        return whole_signature(crl) and crl.is_signature_valid(key)
    except Exception:
        return False
