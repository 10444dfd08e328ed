"""A throw-away Intel: quotes, chains, collateral and lists made with own keys, each part open to change."""

import hashlib
import json
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from cloister_attest.tdx import abi, chain
from cloister_attest.tdx.collateral import Collateral
from cloister_attest.tdx.extension import SGX_EXTENSION_OID
from cloister_attest.tdx.policy import TD_ATTRIBUTES_KNOWN, XFAM_KNOWN, TdxPolicy

AT = int(datetime(2026, 3, 1, tzinfo=UTC).timestamp())
BEGIN, END = datetime(2026, 2, 15, tzinfo=UTC), datetime(2026, 3, 15, tzinfo=UTC)
FMSPC, PCE_ID = bytes.fromhex("90c06f000000"), bytes(2)
REPORT_DATA = bytes(range(64))
QE_SIGNER = hashlib.sha256(b"the quoting enclave's signer").digest()


def signed(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def raw_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]


def pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def certificate(
    name, key, issuer_name, issuer_key, *, authority, path=None, begin=BEGIN, end=END, extension=None, digest=None,
    organisation="Intel Corporation", critical=None,
):  # fmt: skip
    def named(text):
        return x509.Name(
            [
                x509.NameAttribute(NameOID.COMMON_NAME, text),
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation),
            ]
        )

    builder = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer_name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=path), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not authority,
                content_commitment=not authority,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=authority,
                crl_sign=authority,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )
    if extension is not None:
        unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier(SGX_EXTENSION_OID), extension)
        builder = builder.add_extension(unknown, critical=False)
    if critical is not None:
        builder = builder.add_extension(critical, critical=True)
    return builder.sign(issuer_key, digest or SHA256())


def revocation_list(issuer, key, *, revoked=(), begin=BEGIN, end=END, critical=None) -> bytes:
    builder = x509.CertificateRevocationListBuilder().issuer_name(issuer.subject).last_update(begin).next_update(end)
    for serial in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(begin).build()
        builder = builder.add_revoked_certificate(entry)
    if critical is not None:
        builder = builder.add_extension(critical, critical=True)
    return builder.sign(key, SHA256()).public_bytes(Encoding.DER)


def der(tag: int, content: bytes) -> bytes:
    size = len(content)
    length = (
        bytes([size]) if size < 0x80 else bytes([0x81, size]) if size < 0x100 else b"\x82" + size.to_bytes(2, "big")
    )
    return bytes([tag]) + length + content


def sgx_extension(*, components=(5,) * 16, pce_svn=11, fmspc=FMSPC, pce_id=PCE_ID, instance=True) -> bytes:
    arc = bytes.fromhex("2a864886f84d010d01")

    def pair(oid: bytes, value: bytes) -> bytes:
        return der(0x30, der(0x06, oid) + value)

    def whole(number: int) -> bytes:
        return der(0x02, number.to_bytes(number.bit_length() // 8 + 1, "big"))

    tcb = b"".join(pair(arc + bytes([2, index]), whole(svn)) for index, svn in enumerate(components, 1))
    tcb += pair(arc + b"\x02\x11", whole(pce_svn)) + pair(arc + b"\x02\x12", der(0x04, bytes(components)))
    fields = [
        pair(arc + b"\x01", der(0x04, bytes(16))),
        pair(arc + b"\x02", der(0x30, tcb)),
        pair(arc + b"\x03", der(0x04, pce_id)),
        pair(arc + b"\x04", der(0x04, fmspc)),
        pair(arc + b"\x05", der(0x0A, b"\x01")),
    ]
    if instance:
        fields.append(pair(arc + b"\x06", der(0x04, bytes(16))))
    return der(0x30, b"".join(fields))


def stamp(when: datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def level(sgx=5, pce=11, tdx=3, status="UpToDate", advisories=()) -> dict:
    return {
        "tcb": {
            "sgxtcbcomponents": [{"svn": sgx}] * 16,
            "pcesvn": pce,
            "tdxtcbcomponents": [{"svn": tdx}] * 16,
        },
        "tcbDate": "2024-03-13T00:00:00Z",
        "tcbStatus": status,
        "advisoryIDs": list(advisories),
    }


def isv_level(svn: int, status: str = "UpToDate") -> dict:
    return {"tcb": {"isvsvn": svn}, "tcbDate": "2024-03-13T00:00:00Z", "tcbStatus": status}


MODULE = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}

TCB_INFO = {
    "id": "TDX",
    "version": 3,
    "issueDate": stamp(BEGIN),
    "nextUpdate": stamp(END),
    "fmspc": FMSPC.hex(),
    "pceId": PCE_ID.hex(),
    "tcbType": 0,
    "tcbEvaluationDataNumber": 18,
    "tdxModule": MODULE,
    "tdxModuleIdentities": [{"id": "TDX_01", **MODULE, "tcbLevels": [isv_level(6), isv_level(2, "OutOfDate")]}],
    "tcbLevels": [level(), level(2, 11, 3, "OutOfDate", ["INTEL-SA-01036"])],
}

QE_IDENTITY = {
    "id": "TD_QE",
    "version": 2,
    "issueDate": stamp(BEGIN),
    "nextUpdate": stamp(END),
    "tcbEvaluationDataNumber": 18,
    "miscselect": "00000000",
    "miscselectMask": "FFFFFFFF",
    "attributes": "11000000000000000000000000000000",
    "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
    "mrsigner": QE_SIGNER.hex().upper(),
    "isvprodid": 2,
    "tcbLevels": [isv_level(4), isv_level(2, "OutOfDate")],
}

ROOT_KEY, CA_KEY, PCK_KEY, TCB_KEY, OTHER_KEY = (ec.generate_private_key(ec.SECP256R1()) for _ in range(5))
ATTESTATION_KEY = ec.generate_private_key(ec.SECP256R1())
ROOT = certificate(chain.ROOT_CA, ROOT_KEY, chain.ROOT_CA, ROOT_KEY, authority=True, path=1)
CA = certificate(chain.PLATFORM_CA, CA_KEY, chain.ROOT_CA, ROOT_KEY, authority=True, path=0)
PCK = certificate(chain.PCK, PCK_KEY, chain.PLATFORM_CA, CA_KEY, authority=False, extension=sgx_extension())
TCB_SIGNER = certificate(chain.TCB_SIGNING, TCB_KEY, chain.ROOT_CA, ROOT_KEY, authority=False)


def td_body(body_type=abi.BODY_TD_15, **fields: bytes) -> bytes:
    """A TD report; `fields` by the names of the offsets in `abi`, in lower case."""
    body = bytearray(abi.TD_15_BYTES if body_type == abi.BODY_TD_15 else abi.TD_10_BYTES)
    values = {
        "tee_tcb_svn": bytes([6, 1, *[3] * 14]),
        "tdattributes": (1 << 28).to_bytes(8, "little"),
        "xfam": (0x602E7).to_bytes(8, "little"),
        "mrtd": b"\xd0" * 48,
        "rtmr0": b"".join(bytes([index]) * 48 for index in range(0xA0, 0xA4)),
        "mrconfigid": b"\xc1" * 48,
        "mrowner": b"\xc2" * 48,
        "mrownerconfig": b"\xc3" * 48,
        "reportdata": REPORT_DATA,
    } | fields
    for name, value in values.items():
        offset = getattr(abi, name.upper())
        body[offset : offset + len(value)] = value
    return bytes(body)


def qe_body(**fields: bytes) -> bytes:
    body = bytearray(abi.QE_REPORT_BYTES)
    values = {
        "attributes": bytes.fromhex("15000000000000000700000000000000"),
        "mrsigner": QE_SIGNER,
        "isvprodid": (2).to_bytes(2, "little"),
        "isvsvn": (4).to_bytes(2, "little"),
    } | fields
    for name, value in values.items():
        offset = getattr(abi, f"QE_{name.upper()}")
        body[offset : offset + len(value)] = value
    return bytes(body)


def u16(number: int) -> bytes:
    return number.to_bytes(2, "little")


def u32(number: int) -> bytes:
    return number.to_bytes(4, "little")


def quote(
    *, version=5, body_type=abi.BODY_TD_15, body=None, key=ATTESTATION_KEY, signer=None, pck_key=PCK_KEY, qe=None,
    qe_report_data=None, auth_data=bytes(range(32)), certificates=None, after=b"",
) -> bytes:  # fmt: skip
    body = td_body(body_type) if body is None else body
    header = u16(version) + u16(2) + u32(0x81) + bytes(4) + abi.INTEL_QE_VENDOR_ID + bytes(20)
    covered = header + (u16(body_type) + u32(len(body)) if version == 5 else b"") + body
    bound = hashlib.sha256(raw_key(key) + auth_data).digest() + bytes(32) if qe_report_data is None else qe_report_data
    enclave = qe_body(report_data=bound, **(qe or {}))
    text = pem(PCK, CA, ROOT) if certificates is None else certificates
    inner = enclave + signed(pck_key, enclave) + u16(len(auth_data)) + auth_data + u16(5) + u32(len(text)) + text
    data = signed(signer or key, covered) + raw_key(key) + u16(6) + u32(len(inner)) + inner
    return covered + u32(len(data)) + data + after


def document(name: str, value: dict, key=TCB_KEY) -> bytes:
    body = json.dumps(value, separators=(",", ":")).encode()
    return b'{"' + name.encode() + b'":' + body + b',"signature":"' + signed(key, body).hex().encode() + b'"}'


def changed(value: dict, **members) -> dict:
    return deepcopy(value) | members


def collateral(**pieces: bytes | None) -> Collateral:
    return Collateral(**(_PIECES | pieces))


_PIECES = {
    "tcb_info": document("tcbInfo", TCB_INFO),
    "tcb_info_chain": pem(TCB_SIGNER, ROOT),
    "qe_identity": document("enclaveIdentity", QE_IDENTITY),
    "qe_identity_chain": pem(TCB_SIGNER, ROOT),
    "root_crl": revocation_list(ROOT, ROOT_KEY),
    "pck_crl": revocation_list(CA, CA_KEY),
}


def permissive(**changed) -> TdxPolicy:
    """ "any" everywhere, but for what `changed` demands."""
    fields = dict.fromkeys(TdxPolicy.model_fields, "any") | {"platform": "tdx", "roots": "vendor", "fmspcs_denied": ()}
    return TdxPolicy(**(fields | changed))


def strict(**changed) -> TdxPolicy:
    """What the minted quote just fulfils: every field demands something."""
    fields = {
        "platform": "tdx",
        "roots": (hashlib.sha256(ROOT.public_bytes(Encoding.DER)).hexdigest(),),
        "mr_td": ("d0" * 48,),
        **{f"rtmr{index}": (f"a{index}" * 48,) for index in range(4)},
        "mr_config_id": ("c1" * 48,),
        "mr_owner": ("c2" * 48,),
        "mr_owner_config": ("c3" * 48,),
        "mr_service_td": "zero",
        "debug": "forbidden",
        "sept_ve_disable": "required",
        "perfmon": "forbidden",
        "td_attributes_allowed": TD_ATTRIBUTES_KNOWN,
        "xfam_allowed": XFAM_KNOWN,
        "platform_tcb": ("UpToDate",),
        "module_tcb": ("UpToDate",),
        "qe_tcb": ("UpToDate",),
        "minimum_tcb_evaluation": 18,
        "fmspcs_allowed": (FMSPC.hex(),),
        "fmspcs_denied": (),
        "collateral": "required",
    }
    return TdxPolicy(**(fields | changed))


@dataclass
class Case:
    """A quote, its collateral and the question, by default all valid together."""

    quote: bytes = field(default_factory=quote)
    collateral: Collateral = field(default_factory=collateral)
    policy: TdxPolicy = field(default_factory=strict)
    report_data: bytes = REPORT_DATA
    at: int = AT


def later(days: int) -> datetime:
    return datetime.fromtimestamp(AT, UTC) + timedelta(days=days)
