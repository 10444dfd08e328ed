"""The simulated report, byte by byte. Big-endian, 304 bytes:

offset  bytes  field
     0      8  magic "CLSTRSIM"
     8      4  version (1)
    12      4  signature algorithm (1: ECDSA P-384 with SHA-384)
    16      8  policy flags (bit 0: the host may debug the machine; all others zero)
    24     48  measurement
    72     64  report data
   136     64  chip id
   200      8  tcb, the platform's security version
   208     48  signature r    } over bytes 0..207
   256     48  signature s    }
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from cloister_attest.outcome import EvidenceError

MAGIC = b"CLSTRSIM"
VERSION = 1
ECDSA_P384_SHA384 = 1
FLAG_DEBUG = 1
MEASUREMENT_BYTES = 48
CHIP_ID_BYTES = 64
COORDINATE_BYTES = 48

_BODY = struct.Struct(">8sIIQ48s64s64sQ")
_SIGNATURE = struct.Struct(">48s48s")
REPORT_BYTES = _BODY.size + _SIGNATURE.size


@dataclass(frozen=True)
class Report:
    """A parsed report. `signed` is the part that the signature (r, s) covers. Nothing of it is proven yet."""

    debug: bool
    measurement: bytes
    report_data: bytes
    chip_id: bytes
    tcb: int
    signed: bytes
    r: int
    s: int


def parse(report: bytes) -> Report:
    """Raises EvidenceError for anything but one whole report of this version."""
    if len(report) != REPORT_BYTES:
        raise EvidenceError(f"the report has {len(report)} bytes instead of {REPORT_BYTES}")
    magic, version, algorithm, flags, measurement, data, chip_id, tcb = _BODY.unpack_from(report)
    if magic != MAGIC:
        raise EvidenceError("the report doesn't begin as a simulated report does")
    if version != VERSION:
        raise EvidenceError(f"the report has version {version}, and this program reads version {VERSION}")
    if algorithm != ECDSA_P384_SHA384:
        raise EvidenceError(f"the report names signature algorithm {algorithm}, which is unknown")
    if flags & ~FLAG_DEBUG:
        raise EvidenceError(f"the report sets reserved policy flags ({flags:#x})")
    r, s = _SIGNATURE.unpack_from(report, _BODY.size)
    return Report(
        debug=bool(flags & FLAG_DEBUG),
        measurement=measurement,
        report_data=data,
        chip_id=chip_id,
        tcb=tcb,
        signed=report[: _BODY.size],
        r=int.from_bytes(r, "big"),
        s=int.from_bytes(s, "big"),
    )


def pack_body(*, debug: bool, measurement: bytes, report_data: bytes, chip_id: bytes, tcb: int) -> bytes:
    """The 208 bytes that are signed."""
    for field, size in ((measurement, MEASUREMENT_BYTES), (report_data, 64), (chip_id, CHIP_ID_BYTES)):
        if len(field) != size:
            raise ValueError(f"a field of {len(field)} bytes where {size} belong")
    flags = FLAG_DEBUG if debug else 0
    return _BODY.pack(MAGIC, VERSION, ECDSA_P384_SHA384, flags, measurement, report_data, chip_id, tcb)


def pack_signature(r: int, s: int) -> bytes:
    return _SIGNATURE.pack(r.to_bytes(COORDINATE_BYTES, "big"), s.to_bytes(COORDINATE_BYTES, "big"))
