"""Reports and chains made with throw-away keys: AMD's form, names and extensions, and nothing of AMD's trust."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from cloister_attest.snp.certificate_table import Collateral
from cloister_attest.snp.policy import MinimumAbi, MinimumFirmware, MinimumTcb, PlatformRequirements, SnpPolicy
from cloister_attest.snp.products import Product

NOW = datetime(2025, 6, 1, tzinfo=UTC)
AT = int(NOW.timestamp())
DAY = timedelta(days=1)

REPORT_DATA = bytes(range(64))
MEASUREMENT = b"m" * 48
HOST_DATA = b"h" * 32
ID_KEY, AUTHOR_KEY = b"i" * 48, b"a" * 48
FAMILY_ID, IMAGE_ID = b"f" * 16, b"g" * 16
CSP_ID = "CN=test.example"
ROOT_SERIAL, ISSUER_SERIAL = 65536, 65537

HWID: dict[Product, bytes] = {"Milan": b"c" * 64, "Genoa": b"c" * 64, "Turin": b"c" * 8}
CPUID: dict[Product, bytes] = {"Milan": b"\x19\x01\x01", "Genoa": b"\x19\x11\x01", "Turin": b"\x1a\x02\x01"}
TCB: dict[Product, bytes] = {
    "Milan": bytes((4, 1, 0, 0, 0, 0, 24, 219)),
    "Genoa": bytes((4, 1, 0, 0, 0, 0, 24, 219)),
    "Turin": bytes((2, 4, 1, 24, 0, 0, 0, 219)),
}
SPL_ORDER: dict[Product, tuple[int, ...]] = {
    "Milan": (1, 2, 4, 5, 6, 7, 3, 8),
    "Genoa": (1, 2, 4, 5, 6, 7, 3, 8),
    "Turin": (9, 1, 2, 3, 5, 6, 7, 8),
}
POLICY_BITS = 0x3021F | 1 << 20 | 1 << 21 | 1 << 22 | 1 << 23 | 1 << 24 | 1 << 25
PLATFORM_BITS = 0b10111111


@dataclass(frozen=True)
class Recipe:
    """What to make. The defaults make a report that `strict_policy` accepts.

    `now` is when everything is made. `patch` is written into the report at its offsets before it is signed, `damage`
    afterwards.
    """

    version: int = 5
    now: datetime = NOW
    product: Product = "Genoa"
    kind: Literal["VCEK", "VLEK"] = "VCEK"
    patch: dict[int, bytes] = field(default_factory=dict)
    damage: dict[int, bytes] = field(default_factory=dict)
    product_name: str | None = None
    issuer_product: Product | None = None
    issuer_prefix: str | None = None
    organization: str = "Advanced Micro Devices"
    leaf_tcb: bytes | None = None
    hwid: bytes | None = None
    leaf_authority: bool = False
    leaf_curve: ec.EllipticCurve | None = None
    leaf_critical: bool = False
    leaf_by_root: bool = False
    leaf_padding: padding.AsymmetricPadding | None = None
    issuer_authority: bool = True
    serial_zero: bool = False
    revoked: tuple[int, ...] = ()
    crl_days: int = 0
    crl_by_issuer: bool = False
    crl: bool = True


@dataclass(frozen=True)
class Minted:
    report: bytes
    collateral: Collateral

    @property
    def root_digest(self) -> str:
        return hashlib.sha256(self.collateral.root or b"").hexdigest()


def mint(recipe: Recipe, leaf_key: ec.EllipticCurvePrivateKey | None = None) -> Minted:
    """A report with its collateral. With `leaf_key`, `report` makes more of the same chip's."""
    product, kind = recipe.product, recipe.kind
    root_name = _name(f"ARK-{product}")
    prefix = recipe.issuer_prefix or ("SEV-" if kind == "VCEK" else "SEV-VLEK-")
    issuer_name = _name(prefix + (recipe.issuer_product or product))
    root = _authority(root_name, root_name, root_key(), ROOT_SERIAL, True, recipe.now)
    issuer = _authority(issuer_name, root_name, issuer_key(), ISSUER_SERIAL, recipe.issuer_authority, recipe.now)
    leaf_key = leaf_key or ec.generate_private_key(recipe.leaf_curve or ec.SECP384R1())
    collateral = Collateral(
        leaf=_leaf(recipe, leaf_key, issuer_name),
        intermediate=issuer.public_bytes(Encoding.DER),
        root=root.public_bytes(Encoding.DER),
        crl=_crl(recipe, root_name) if recipe.crl else None,
    )
    return Minted(report(recipe, leaf_key), collateral)


def strict_policy(minted: Minted, product: Product = "Genoa", **changes: Any) -> SnpPolicy:
    """A policy that looks at everything that a report of version 5 says, and accepts the default recipe."""
    tcb = MinimumTcb(
        product=product, fmc=2 if product == "Turin" else "absent", bootloader=4, tee=1, snp=24, microcode=219
    )
    values: dict[str, Any] = {
        "platform": "sev-snp",
        "roots": (minted.root_digest,),
        "intermediates": "any",
        "crl": "required",
        "measurements": (MEASUREMENT.hex(),),
        "debug": "forbidden",
        "migrate_ma": "forbidden",
        "smt": "required",
        "single_socket": "required",
        "cxl_allow": "required",
        "mem_aes_256_xts": "required",
        "rapl_dis": "required",
        "ciphertext_hiding_dram": "required",
        "page_swap_disable": "required",
        "minimum_abi": MinimumAbi(major=2, minor=31),
        "vmpl": 0,
        "host_data": (HOST_DATA.hex(),),
        "family_ids": (FAMILY_ID.hex(),),
        "image_ids": (IMAGE_ID.hex(),),
        "id_keys": (ID_KEY.hex(),),
        "author_keys": (AUTHOR_KEY.hex(),),
        "minimum_guest_svn": 7,
        "minimum_tcb": (tcb,),
        "minimum_launch_tcb": (tcb,),
        "minimum_firmware": MinimumFirmware(major=1, minor=55, build=43),
        "provisional_firmware": "forbidden",
        "mitigations": 3,
        "platform_info": PlatformRequirements(
            smt_en="required",
            tsme_en="required",
            ecc_en="required",
            rapl_dis="required",
            ciphertext_hiding_dram_en="required",
            alias_check_complete="required",
            tio_en="required",
        ),
        "products_allowed": (product,),
        "products_denied": (),
        "chips_allowed": (HWID[product].ljust(64, b"\0").hex(),),
        "chips_denied": (),
        "masked_chip_id": "forbidden",
        "vlek": "forbidden",
    }
    return SnpPolicy(**(values | changes))


@cache
def root_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 4096)


@cache
def issuer_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 4096)


def pss(salt: int = 48) -> padding.PSS:
    return padding.PSS(padding.MGF1(SHA384()), salt)


def _name(common_name: str, organization: str = "Advanced Micro Devices") -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "Engineering"),
            x509.NameAttribute(NameOID.COUNTRY_NAME, "US"),
            x509.NameAttribute(NameOID.LOCALITY_NAME, "Santa Clara"),
            x509.NameAttribute(NameOID.STATE_OR_PROVINCE_NAME, "CA"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


@cache
def _authority(
    subject: x509.Name, issuer: x509.Name, key: rsa.RSAPrivateKey, serial: int, authority: bool, now: datetime
) -> x509.Certificate:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(now - 1000 * DAY)
        .not_valid_after(now + 1000 * DAY)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(_usage(authority), critical=True)
        .sign(root_key(), SHA384(), rsa_padding=pss())
    )


def _usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _leaf(recipe: Recipe, key: ec.EllipticCurvePrivateKey, issuer_name: x509.Name) -> bytes:
    product, vcek = recipe.product, recipe.kind == "VCEK"
    name = recipe.product_name or (f"{product}-B0" if vcek else product)
    found = {"2": _der(0x16, name.encode())}
    for number, value in zip(SPL_ORDER[product], recipe.leaf_tcb or TCB[product], strict=True):
        found[f"3.{number}"] = _der(0x02, bytes((0, value) if value > 0x7F else (value,)))
    found["4" if vcek else "5"] = (recipe.hwid or HWID[product]) if vcek else _der(0x16, CSP_ID.encode())
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(f"SEV-{recipe.kind}", recipe.organization))
        .issuer_name(issuer_name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(recipe.now - 30 * DAY)
        .not_valid_after(recipe.now + 30 * DAY)
    )
    for number, value in found.items():
        oid = x509.ObjectIdentifier(f"1.3.6.1.4.1.3704.1.{number}")
        builder = builder.add_extension(x509.UnrecognizedExtension(oid, value), critical=False)
    if recipe.leaf_authority:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    if recipe.leaf_critical:
        unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.3704.9.9"), b"\x05\x00")
        builder = builder.add_extension(unknown, critical=True)
    signer = root_key() if recipe.leaf_by_root else issuer_key()
    leaf_padding: Any = recipe.leaf_padding or pss()
    leaf = builder.sign(signer, SHA384(), rsa_padding=leaf_padding)
    der = leaf.public_bytes(Encoding.DER)
    if not recipe.serial_zero:
        return der
    # The builder refuses the number that AMD uses: write it into the signed part, and sign that again.
    signed = leaf.tbs_certificate_bytes
    version_and_number = b"\xa0\x03\x02\x01\x02\x02\x01"
    assert signed.count(version_and_number + b"\x01") == 1
    zero = signed.replace(version_and_number + b"\x01", version_and_number + b"\x00")
    return der.replace(signed, zero).replace(leaf.signature, signer.sign(zero, pss(), SHA384()))


def _crl(recipe: Recipe, root_name: x509.Name) -> bytes:
    made = recipe.now + recipe.crl_days * DAY
    builder = x509.CertificateRevocationListBuilder().issuer_name(root_name)
    builder = builder.last_update(made - 10 * DAY).next_update(made + 10 * DAY)
    for serial in recipe.revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(made - 20 * DAY).build()
        builder = builder.add_revoked_certificate(entry)
    signer = issuer_key() if recipe.crl_by_issuer else root_key()
    return builder.sign(signer, SHA384(), rsa_padding=pss()).public_bytes(Encoding.DER)


def report(recipe: Recipe, key: ec.EllipticCurvePrivateKey) -> bytes:
    """The 1184 bytes, signed by `key`."""
    product, version, vcek = recipe.product, recipe.version, recipe.kind == "VCEK"
    tcb = TCB[product]
    fields: dict[int, bytes] = {
        0x00: version.to_bytes(4, "little"),
        0x04: (7).to_bytes(4, "little"),
        0x08: POLICY_BITS.to_bytes(8, "little"),
        0x10: FAMILY_ID,
        0x20: IMAGE_ID,
        0x34: (1).to_bytes(4, "little"),
        0x38: tcb,
        0x40: PLATFORM_BITS.to_bytes(8, "little"),
        0x48: (1 if vcek else 5).to_bytes(4, "little"),
        0x50: REPORT_DATA,
        0x90: MEASUREMENT,
        0xC0: HOST_DATA,
        0xE0: ID_KEY,
        0x110: AUTHOR_KEY,
        0x140: b"r" * 32,
        0x160: b"\xff" * 32,
        0x180: tcb,
        0x188: CPUID[product] if version >= 3 else b"",
        0x1A0: HWID[product] if vcek else b"",
        0x1E0: tcb,
        0x1E8: b"\x2b\x37\x01\x00\x2b\x37\x01\x00",
        0x1F0: tcb,
        0x1F8: (b"\x07" + bytes(7)) * 2 if version >= 5 else b"",
    }
    made = bytearray(0x4A0)
    for offset, value in (*fields.items(), *recipe.patch.items()):
        made[offset : offset + len(value)] = value
    signature = key.sign(bytes(made[:0x2A0]), ec.ECDSA(SHA384()))
    for offset, number in zip((0x2A0, 0x2E8), decode_dss_signature(signature), strict=True):
        made[offset : offset + 72] = number.to_bytes(72, "little")
    for offset, value in recipe.damage.items():
        made[offset : offset + len(value)] = value
    return bytes(made)


def _der(tag: int, content: bytes) -> bytes:
    return bytes((tag, len(content))) + content
