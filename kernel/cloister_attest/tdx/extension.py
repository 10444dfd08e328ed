"""What a PCK certificate says about its platform: the SGX extension, 1.2.840.113741.1.13.1.

Source: Intel SGX PCK Certificate and Certificate Revocation List Profile Specification, section 1.3.5 and table 1:

    .1 PPID (16)   .2 TCB (.1 to .16 component SVNs, .17 PCESVN, .18 CPUSVN)   .3 PCE-ID (2)   .4 FMSPC (6)
    .5 SGX type    .6 platform instance id (16; certificates of the Platform CA alone)   .7 configuration
"""

from __future__ import annotations

from dataclasses import dataclass

from cloister_attest.outcome import EvidenceError

SGX_EXTENSION_OID = "1.2.840.113741.1.13.1"
_ARC = bytes.fromhex("2a864886f84d010d01")
"""The DER content of SGX_EXTENSION_OID; each field's own number follows it."""

COMPONENTS = 16
_PCESVN = 17
_CPUSVN = 18

_BOOLEAN, _INTEGER, _OCTETS, _OID, _ENUMERATED, _SEQUENCE = 0x01, 0x02, 0x04, 0x06, 0x0A, 0x30


@dataclass(frozen=True)
class SgxExtension:
    """Sizes in bytes: ppid 16, cpu_svn 16, pce_id 2, fmspc 6, platform_instance 16 (None where there is none).

    `components` are the 16 SGX TCB component SVNs, each at most 255; `pce_svn` is at most 65535.
    """

    ppid: bytes
    components: tuple[int, ...]
    pce_svn: int
    cpu_svn: bytes
    pce_id: bytes
    fmspc: bytes
    sgx_type: int
    platform_instance: bytes | None


def parse_extension(der: bytes) -> SgxExtension:
    """Raises EvidenceError for anything but one DER sequence in which each mandatory field stands once."""
    fields = _fields(der, _ARC)
    tcb = _fields(_value(fields, 2, _SEQUENCE, whole=True), _ARC + b"\x02")
    return SgxExtension(
        ppid=_octets(fields, 1, 16),
        components=tuple(_number(tcb, index, _INTEGER, 0xFF) for index in range(1, COMPONENTS + 1)),
        pce_svn=_number(tcb, _PCESVN, _INTEGER, 0xFFFF),
        cpu_svn=_octets(tcb, _CPUSVN, 16),
        pce_id=_octets(fields, 3, 2),
        fmspc=_octets(fields, 4, 6),
        sgx_type=_number(fields, 5, _ENUMERATED, 0xFF),
        platform_instance=_octets(fields, 6, 16) if 6 in fields else None,
    )


def _fields(der: bytes, arc: bytes) -> dict[int, tuple[int, bytes, bytes]]:
    """A sequence of (OID, value) pairs under `arc`: number -> (tag, content, whole encoding of the value)."""
    tag, content, rest = _read(der)
    if tag != _SEQUENCE or rest:
        raise EvidenceError("the PCK certificate's SGX extension isn't one sequence")
    fields: dict[int, tuple[int, bytes, bytes]] = {}
    while content:
        tag, pair, content = _read(content)
        if tag != _SEQUENCE:
            raise EvidenceError("the PCK certificate's SGX extension holds something other than fields")
        oid_tag, oid, value = _read(pair)
        value_tag, value_content, rest = _read(value)
        if oid_tag != _OID or oid[:-1] != arc or oid[-1] >= 0x80 or rest:
            raise EvidenceError("the PCK certificate's SGX extension holds a field that isn't its own")
        if oid[-1] in fields:
            raise EvidenceError(f"the PCK certificate's SGX extension names its field {oid[-1]} twice")
        fields[oid[-1]] = (value_tag, value_content, value)
    return fields


def _value(fields: dict[int, tuple[int, bytes, bytes]], number: int, tag: int, *, whole: bool = False) -> bytes:
    if number not in fields:
        raise EvidenceError(f"the PCK certificate's SGX extension lacks its field {number}")
    found, content, encoding = fields[number]
    if found != tag:
        raise EvidenceError(f"field {number} of the PCK certificate's SGX extension has another type")
    return encoding if whole else content


def _octets(fields: dict[int, tuple[int, bytes, bytes]], number: int, size: int) -> bytes:
    value = _value(fields, number, _OCTETS)
    if len(value) != size:
        raise EvidenceError(f"field {number} of the PCK certificate's SGX extension has {len(value)} bytes, not {size}")
    return value


def _number(fields: dict[int, tuple[int, bytes, bytes]], number: int, tag: int, largest: int) -> int:
    content = _value(fields, number, tag)
    minimal = bool(content) and (len(content) == 1 or content[0] != 0 or content[1] >= 0x80)
    value = int.from_bytes(content, "big", signed=True)
    if not minimal or not 0 <= value <= largest:
        raise EvidenceError(f"field {number} of the PCK certificate's SGX extension isn't a number up to {largest}")
    return value


def _read(der: bytes) -> tuple[int, bytes, bytes]:
    """One element's tag and content, and what follows it. Definite, minimal lengths alone (X.690, 10.1)."""
    if len(der) < 2:
        raise EvidenceError("the PCK certificate's SGX extension ends within an element")
    tag, length, start = der[0], der[1], 2
    if length >= 0x80:
        size = length & 0x7F
        encoded = der[2 : 2 + size]
        if size not in (1, 2) or len(encoded) != size:
            raise EvidenceError("the PCK certificate's SGX extension has an element of no length that DER knows")
        length, start = int.from_bytes(encoded, "big"), 2 + size
        if length < (0x80 if size == 1 else 0x100):
            raise EvidenceError("the PCK certificate's SGX extension isn't DER")
    content = der[start : start + length]
    if len(content) != length:
        raise EvidenceError("the PCK certificate's SGX extension ends within an element")
    return tag, content, der[start + length :]
