"""AMD's certificates: how they are read, what their names and extensions say, and how they are signed.

Names and extensions are those of AMD 57230, table "VCEK Certificate", and 58369, table "VLEK Certificate". Every
function raises EvidenceError.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.x509.oid import NameOID, SignatureAlgorithmOID

from cloister_attest.certificates import parse_all, quietly, whole_signature
from cloister_attest.outcome import EvidenceError
from cloister_attest.snp.products import HWID_BYTES, PRODUCTS, TCB_LAYOUT, Component, Product

MAX_CERTIFICATE = 16 << 10
RSA_BITS = 4096
SALT_BYTES = 48

_AMD = "1.3.6.1.4.1.3704.1"
PRODUCT_NAME_OID = x509.ObjectIdentifier(f"{_AMD}.2")
HWID_OID = x509.ObjectIdentifier(f"{_AMD}.4")
CSP_ID_OID = x509.ObjectIdentifier(f"{_AMD}.5")
SPL_OIDS: dict[Component, x509.ObjectIdentifier] = {
    "bootloader": x509.ObjectIdentifier(f"{_AMD}.3.1"),
    "tee": x509.ObjectIdentifier(f"{_AMD}.3.2"),
    "snp": x509.ObjectIdentifier(f"{_AMD}.3.3"),
    "microcode": x509.ObjectIdentifier(f"{_AMD}.3.8"),
    "fmc": x509.ObjectIdentifier(f"{_AMD}.3.9"),
}
RESERVED_SPL_OIDS: tuple[x509.ObjectIdentifier, ...] = tuple(
    x509.ObjectIdentifier(f"{_AMD}.3.{number}") for number in (4, 5, 6, 7)
)

_INTEGER, _OCTET_STRING, _IA5_STRING = 0x02, 0x04, 0x16

_SUBJECT = {
    NameOID.ORGANIZATIONAL_UNIT_NAME: "Engineering",
    NameOID.COUNTRY_NAME: "US",
    NameOID.LOCALITY_NAME: "Santa Clara",
    NameOID.STATE_OR_PROVINCE_NAME: "CA",
    NameOID.ORGANIZATION_NAME: "Advanced Micro Devices",
}


@dataclass(frozen=True)
class Leaf:
    """What a VCEK or VLEK says about itself.

    `tcb` is the TCB_VERSION (8 bytes, in the product's layout) that the key was derived for; `hwid` the chip of a VCEK
    (64 bytes, on Turin 8), `csp_id` the cloud provider of a VLEK, each None for the other kind.
    """

    product_name: str
    tcb: bytes
    hwid: bytes | None
    csp_id: str | None


def load_certificate(der: bytes | None, name: str) -> x509.Certificate:
    """`name` says in errors which certificate it is."""
    if der is None:
        raise EvidenceError(f"there is no certificate of the {name}")
    if len(der) > MAX_CERTIFICATE:
        raise EvidenceError(f"the certificate of the {name} has {len(der)} bytes, and {MAX_CERTIFICATE} are enough")
    try:
        with quietly():
            return parse_all(x509.load_der_x509_certificate(der))
    except Exception as error:
        # cryptography raises several classes for malformed certificates; each of them means the same here.
        raise EvidenceError(f"the certificate of the {name} can't be read") from error


def read_leaf(certificate: x509.Certificate, kind: Literal["VCEK", "VLEK"], product: Product) -> Leaf:
    """The extensions of a leaf, whose SPLs have the layout of `product`."""
    found = {
        extension.oid: extension.value.value
        for extension in certificate.extensions
        if isinstance(extension.value, x509.UnrecognizedExtension)
    }
    tcb, reserved = bytearray(), {oid: _spl(found[oid]) for oid in RESERVED_SPL_OIDS if oid in found}
    if any(reserved.values()):
        raise EvidenceError("the leaf sets a security version that its product reserves")
    for component in TCB_LAYOUT[product]:
        tcb.append(0 if component is None else _spl(_need(found, SPL_OIDS[component], f"{component} version")))
    hwid, csp_id = found.get(HWID_OID), found.get(CSP_ID_OID)
    if kind == "VCEK" and (hwid is None or csp_id is not None):
        raise EvidenceError("a VCEK names its chip and no cloud provider, and this leaf doesn't")
    if kind == "VLEK" and (csp_id is None or hwid is not None):
        raise EvidenceError("a VLEK names its cloud provider and no chip, and this leaf doesn't")
    return Leaf(
        product_name=_text(_need(found, PRODUCT_NAME_OID, "product name")),
        tcb=bytes(tcb),
        hwid=None if hwid is None else _hwid(hwid, HWID_BYTES[product]),
        csp_id=None if csp_id is None else _text(csp_id),
    )


def named(certificate: x509.Certificate, common_name: str, name: str) -> None:
    """The subject is AMD's, with this common name."""
    attributes = [(attribute.oid, attribute.value) for attribute in certificate.subject]
    expected = {**_SUBJECT, NameOID.COMMON_NAME: common_name}
    if len(attributes) != len(expected) or dict(attributes) != expected:
        raise EvidenceError(f"the {name} isn't named {common_name} of Advanced Micro Devices")


def common_name(certificate: x509.Certificate, name: str) -> str:
    found = [attribute.value for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if len(found) != 1:
        raise EvidenceError(f"the {name} has {len(found)} names instead of one")
    return str(found[0])


def product_named(certificate: x509.Certificate, prefix: str, name: str) -> Product:
    """The product in a common name such as ARK-Milan."""
    found = common_name(certificate, name)
    for product in PRODUCTS:
        if found == prefix + product:
            return product
    raise EvidenceError(f"the {name}'s name isn't {prefix} and a product that this program knows")


def may_issue(certificate: x509.Certificate, name: str) -> x509.KeyUsage:
    """The key usage of a certificate authority with an RSA key of 4096 bits."""
    key = certificate.public_key()
    if not isinstance(key, rsa.RSAPublicKey) or key.key_size != RSA_BITS:
        raise EvidenceError(f"the {name}'s key isn't RSA of {RSA_BITS} bits")
    found = certificate.extensions
    try:
        constraints = found.get_extension_for_class(x509.BasicConstraints).value
        usage = found.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound as error:
        raise EvidenceError(f"the {name} doesn't say what it may be used for") from error
    if not constraints.ca or not usage.key_cert_sign:
        raise EvidenceError(f"the {name} may not issue certificates")
    known_critical(found, name)
    return usage


def known_critical(found: x509.Extensions, name: str) -> None:
    """No critical extension but basic constraints and key usage (RFC 5280, 4.2: what isn't understood is refused)."""
    for extension in found:
        if extension.critical and not isinstance(extension.value, x509.BasicConstraints | x509.KeyUsage):
            raise EvidenceError(f"the {name} has a critical extension {extension.oid.dotted_string}")


def verify_signed_by(
    signed: x509.Certificate | x509.CertificateRevocationList, issuer: x509.Certificate, name: str, issuer_name: str
) -> None:
    """RSASSA-PSS with SHA-384, MGF1 with SHA-384 and a salt of 48 bytes (57230), and the issuer's name."""
    if signed.issuer != issuer.subject:
        raise EvidenceError(f"the {name} names another issuer than the {issuer_name}")
    if signed.signature_algorithm_oid != SignatureAlgorithmOID.RSASSA_PSS:
        raise EvidenceError(f"the {name} isn't signed with RSASSA-PSS")
    if not whole_signature(signed):
        raise EvidenceError(f"the {name}'s signature isn't whole bytes")
    key = issuer.public_key()
    if not isinstance(key, rsa.RSAPublicKey):
        raise EvidenceError(f"the {issuer_name}'s key isn't RSA")
    tbs = signed.tbs_certificate_bytes if isinstance(signed, x509.Certificate) else signed.tbs_certlist_bytes
    try:
        key.verify(signed.signature, tbs, padding.PSS(padding.MGF1(SHA384()), SALT_BYTES), SHA384())
        # Once more as it says of itself, inside and outside of what is signed: the two must be the same and be true.
        if isinstance(signed, x509.Certificate):
            signed.verify_directly_issued_by(issuer)
        elif not signed.is_signature_valid(key):
            raise InvalidSignature
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError) as error:
        raise EvidenceError(f"the {name} isn't signed by the {issuer_name}") from error


def _need(found: dict[x509.ObjectIdentifier, bytes], oid: x509.ObjectIdentifier, name: str) -> bytes:
    if oid not in found:
        raise EvidenceError(f"the leaf doesn't say its {name}")
    return found[oid]


def _der(value: bytes, tag: int) -> bytes:
    """The content of one short DER element that is all of `value`."""
    if len(value) < 2 or value[0] != tag or value[1] > 0x7F or len(value) != 2 + value[1]:
        raise EvidenceError("an extension of the leaf has another form than AMD gives it")
    return value[2:]


def _spl(value: bytes) -> int:
    content = _der(value, _INTEGER)
    # DER writes 128..255 with a zero byte before it, and no other value.
    minimal = len(content) == 1 or (len(content) == 2 and content[0] == 0 and content[1] > 0x7F)
    number = int.from_bytes(content, "big", signed=True)
    if not minimal or not 0 <= number <= 0xFF:
        raise EvidenceError("a security version of the leaf isn't a number from 0 to 255")
    return number


def _hwid(value: bytes, size: int) -> bytes:
    """The hardware id: older certificates hold the bytes as they are, newer ones an OCTET STRING of them."""
    hwid = value if len(value) == size else _der(value, _OCTET_STRING)
    if len(hwid) != size:
        raise EvidenceError(f"the leaf's hardware id has {len(hwid)} bytes instead of {size}")
    return hwid


def _text(value: bytes) -> str:
    content = _der(value, _IA5_STRING)
    if not content.isascii() or not content.decode("ascii").isprintable():
        raise EvidenceError("a text in the leaf isn't printable ASCII")
    return content.decode("ascii")
