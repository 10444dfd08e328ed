"""Intel TDX quotes, byte by byte: versions 4 and 5, little-endian, cut by their declared lengths.

Source: Intel TDX DCAP Quoting Library API, appendix A.3 (version 4) and A.4 (version 5), whose terms name the fields.
Nothing that `parse_quote` returns is proven yet.

    version 4:  header (48) | TD report 1.0 (584)                             | length (4) | signature data
    version 5:  header (48) | body type (2) | body size (4) | TD report 1.0 or 1.5 | length (4) | signature data

    signature data:     signature (64) | attestation key (64) | certification data of type 6
    certification data: type (2) | size (4) | data
    data of type 6:     QE report (384) | its signature (64) | size (2) | QE auth data | certification data of type 5
    data of type 5:     the PCK certificate chain as PEM, leaf first, which may end in NUL
"""

from __future__ import annotations

from dataclasses import dataclass

from cloister_attest.outcome import EvidenceError

MAX_QUOTE = 64 << 10

HEADER_BYTES = 48
HEADER_VERSION = 0
HEADER_ATTESTATION_KEY_TYPE = 2
HEADER_TEE_TYPE = 4
HEADER_QE_SVN = 8
"""Reserved in later editions of the specification, as is HEADER_PCE_SVN; signed in all of them, judged in none."""
HEADER_PCE_SVN = 10
HEADER_QE_VENDOR_ID = 12
HEADER_USER_DATA = 28

ECDSA_P256 = 2
TEE_TDX = 0x81
INTEL_QE_VENDOR_ID = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")

BODY_TD_10 = 2
BODY_TD_15 = 3
TD_10_BYTES = 584
TD_15_BYTES = 648
_BODY_BYTES = {BODY_TD_10: TD_10_BYTES, BODY_TD_15: TD_15_BYTES}

TEE_TCB_SVN = 0
MRSEAM = 16
MRSIGNERSEAM = 64
SEAMATTRIBUTES = 112
TDATTRIBUTES = 120
XFAM = 128
MRTD = 136
MRCONFIGID = 184
MROWNER = 232
MROWNERCONFIG = 280
RTMR0 = 328
REPORTDATA = 520
TEE_TCB_SVN_2 = 584
MRSERVICETD = 600

SVN_BYTES = 16
MEASUREMENT_BYTES = 48
FLAGS_BYTES = 8
REPORT_DATA_BYTES = 64
RTMR_COUNT = 4

SIGNATURE_BYTES = 64
"""r and s of an ECDSA P-256 signature, 32 bytes each, big-endian."""
KEY_BYTES = 64
"""x and y of a P-256 point, 32 bytes each, big-endian."""

CERTIFICATION_PCK_CHAIN = 5
CERTIFICATION_QE_REPORT = 6

QE_REPORT_BYTES = 384
QE_CPUSVN = 0
QE_MISCSELECT = 16
QE_ATTRIBUTES = 48
QE_MRENCLAVE = 64
QE_MRSIGNER = 128
QE_ISVPRODID = 256
QE_ISVSVN = 258
QE_REPORT_DATA = 320


@dataclass(frozen=True)
class TdReport:
    """The TD quote body (A.3.2, A.4.3). SVNs are 16 bytes, measurements 48, `report_data` 64.

    `seam_attributes`, `td_attributes` and `xfam` are the 8 bytes as reported, whose number is little-endian.
    `tee_tcb_svn_2` and `mr_service_td` are None in a TD report 1.0, which has no such fields.
    """

    tee_tcb_svn: bytes
    mr_seam: bytes
    mr_signer_seam: bytes
    seam_attributes: bytes
    td_attributes: bytes
    xfam: bytes
    mr_td: bytes
    mr_config_id: bytes
    mr_owner: bytes
    mr_owner_config: bytes
    rtmr: tuple[bytes, bytes, bytes, bytes]
    report_data: bytes
    tee_tcb_svn_2: bytes | None
    mr_service_td: bytes | None


@dataclass(frozen=True)
class QeReport:
    """The quoting enclave's SGX report body (A.3.10). `signed` is all 384 bytes, which the PCK's signature covers."""

    cpu_svn: bytes
    misc_select: bytes
    attributes: bytes
    mr_enclave: bytes
    mr_signer: bytes
    isv_prod_id: int
    isv_svn: int
    report_data: bytes
    signed: bytes


@dataclass(frozen=True)
class Quote:
    """A parsed quote. `signed` is header and body, which `signature` by `attestation_key` covers."""

    version: int
    body_type: int
    qe_svn: int
    pce_svn: int
    user_data: bytes
    report: TdReport
    signed: bytes
    signature: bytes
    attestation_key: bytes
    qe_report: QeReport
    qe_report_signature: bytes
    qe_auth_data: bytes
    pck_chain: bytes


class _Cursor:
    """What is left of some bytes. `take` never gives fewer bytes than asked."""

    def __init__(self, data: bytes, name: str) -> None:
        self._data, self._name, self.position = data, name, 0

    def take(self, size: int, field: str) -> bytes:
        end = self.position + size
        if end > len(self._data):
            raise EvidenceError(f"the {self._name} ends within its {field}")
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def number(self, size: int, field: str) -> int:
        return int.from_bytes(self.take(size, field), "little")

    def rest(self) -> bytes:
        return self._data[self.position :]

    def end(self) -> None:
        if self.position != len(self._data):
            raise EvidenceError(f"the {self._name} has {len(self._data) - self.position} bytes more than it declares")


def parse_quote(raw: bytes) -> Quote:
    """Raises EvidenceError for anything but one whole TDX quote, which zeros alone may follow."""
    if len(raw) > MAX_QUOTE:
        raise EvidenceError(f"the quote has {len(raw)} bytes, more than {MAX_QUOTE}")
    cursor = _Cursor(raw, "quote")
    header = cursor.take(HEADER_BYTES, "header")
    version = _check_header(header)
    body_type = BODY_TD_10
    if version == 5:
        body_type = cursor.number(2, "body type")
        size = cursor.number(4, "body size")
        if size != _BODY_BYTES.get(body_type):
            raise EvidenceError(f"the quote declares a body of type {body_type} with {size} bytes, not a TD report")
    body = cursor.take(_BODY_BYTES[body_type], "TD report")
    signed = raw[: cursor.position]
    data = _Cursor(cursor.take(cursor.number(4, "signature length"), "signature data"), "signature data")
    if any(cursor.rest()):
        raise EvidenceError("bytes that aren't zero follow the quote's declared length")

    signature = data.take(SIGNATURE_BYTES, "signature")
    key = data.take(KEY_BYTES, "attestation key")
    outer = _certification(data, CERTIFICATION_QE_REPORT, "QE certification data")
    data.end()
    qe_report = outer.take(QE_REPORT_BYTES, "QE report")
    qe_signature = outer.take(SIGNATURE_BYTES, "QE report signature")
    auth_data = outer.take(outer.number(2, "auth data size"), "auth data")
    inner = _certification(outer, CERTIFICATION_PCK_CHAIN, "PCK certification data")
    outer.end()
    return Quote(
        version=version,
        body_type=body_type,
        qe_svn=_u16(header, HEADER_QE_SVN),
        pce_svn=_u16(header, HEADER_PCE_SVN),
        user_data=header[HEADER_USER_DATA:],
        report=parse_td_report(body),
        signed=signed,
        signature=signature,
        attestation_key=key,
        qe_report=parse_qe_report(qe_report),
        qe_report_signature=qe_signature,
        qe_auth_data=auth_data,
        pck_chain=inner.rest(),
    )


def parse_td_report(body: bytes) -> TdReport:
    """A TD report of 584 (1.0) or 648 bytes (1.5). Raises EvidenceError for another length."""
    if len(body) not in (TD_10_BYTES, TD_15_BYTES):
        raise EvidenceError(f"the TD report has {len(body)} bytes, where {TD_10_BYTES} or {TD_15_BYTES} belong")
    is_15 = len(body) == TD_15_BYTES
    r0, r1, r2, r3 = (
        body[RTMR0 + index * MEASUREMENT_BYTES : RTMR0 + (index + 1) * MEASUREMENT_BYTES] for index in range(RTMR_COUNT)
    )
    return TdReport(
        tee_tcb_svn=body[TEE_TCB_SVN : TEE_TCB_SVN + SVN_BYTES],
        mr_seam=body[MRSEAM : MRSEAM + MEASUREMENT_BYTES],
        mr_signer_seam=body[MRSIGNERSEAM : MRSIGNERSEAM + MEASUREMENT_BYTES],
        seam_attributes=body[SEAMATTRIBUTES : SEAMATTRIBUTES + FLAGS_BYTES],
        td_attributes=body[TDATTRIBUTES : TDATTRIBUTES + FLAGS_BYTES],
        xfam=body[XFAM : XFAM + FLAGS_BYTES],
        mr_td=body[MRTD : MRTD + MEASUREMENT_BYTES],
        mr_config_id=body[MRCONFIGID : MRCONFIGID + MEASUREMENT_BYTES],
        mr_owner=body[MROWNER : MROWNER + MEASUREMENT_BYTES],
        mr_owner_config=body[MROWNERCONFIG : MROWNERCONFIG + MEASUREMENT_BYTES],
        rtmr=(r0, r1, r2, r3),
        report_data=body[REPORTDATA : REPORTDATA + REPORT_DATA_BYTES],
        tee_tcb_svn_2=body[TEE_TCB_SVN_2 : TEE_TCB_SVN_2 + SVN_BYTES] if is_15 else None,
        mr_service_td=body[MRSERVICETD : MRSERVICETD + MEASUREMENT_BYTES] if is_15 else None,
    )


def parse_qe_report(body: bytes) -> QeReport:
    """A report body of 384 bytes. Raises EvidenceError for another length."""
    if len(body) != QE_REPORT_BYTES:
        raise EvidenceError(f"the QE report has {len(body)} bytes instead of {QE_REPORT_BYTES}")
    return QeReport(
        cpu_svn=body[QE_CPUSVN : QE_CPUSVN + 16],
        misc_select=body[QE_MISCSELECT : QE_MISCSELECT + 4],
        attributes=body[QE_ATTRIBUTES : QE_ATTRIBUTES + 16],
        mr_enclave=body[QE_MRENCLAVE : QE_MRENCLAVE + 32],
        mr_signer=body[QE_MRSIGNER : QE_MRSIGNER + 32],
        isv_prod_id=_u16(body, QE_ISVPRODID),
        isv_svn=_u16(body, QE_ISVSVN),
        report_data=body[QE_REPORT_DATA:],
        signed=body,
    )


def _check_header(header: bytes) -> int:
    version = _u16(header, HEADER_VERSION)
    if version not in (4, 5):
        raise EvidenceError(f"the quote has version {version}, and TDX quotes have version 4 or 5")
    key_type = _u16(header, HEADER_ATTESTATION_KEY_TYPE)
    if key_type != ECDSA_P256:
        raise EvidenceError(f"the quote's attestation key has type {key_type}, and this program reads ECDSA P-256 (2)")
    tee = int.from_bytes(header[HEADER_TEE_TYPE:HEADER_QE_SVN], "little")
    if tee != TEE_TDX:
        raise EvidenceError(f"the quote comes from a TEE of type {tee:#x}, and TDX is {TEE_TDX:#x}")
    vendor = header[HEADER_QE_VENDOR_ID:HEADER_USER_DATA]
    if vendor != INTEL_QE_VENDOR_ID:
        raise EvidenceError(f"the quoting enclave's vendor is {vendor.hex()}, which isn't Intel")
    return version


def _certification(cursor: _Cursor, kind: int, name: str) -> _Cursor:
    found = cursor.number(2, f"type of {name}")
    if found != kind:
        raise EvidenceError(f"the {name} has type {found} instead of {kind}")
    return _Cursor(cursor.take(cursor.number(4, f"size of {name}"), name), name)


def _u16(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 2], "little")
