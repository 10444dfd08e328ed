"""What comes with a report: the certificate table of an extended report, and the collateral made of it.

The table is that of AMD 56421, SNP Extended Guest Request: entries of 24 bytes (GUID, offset and length, both u32
little-endian, the offset from the table's start), ended by an entry of zeros; then the certificates, then zero padding
to whole pages. The 16 bytes of a GUID stand in the order in which it is written.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal
from uuid import UUID

from cloister_attest.outcome import EvidenceError
from cloister_attest.snp.abi import REPORT_BYTES, SigningKey

ENTRY_BYTES = 24
MAX_TABLE = 1 << 20
MAX_ENTRIES = 32

VCEK_GUID = UUID("63da758d-e664-4564-adc5-f4b93be8accd")
VLEK_GUID = UUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1")
ASK_GUID = UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782")
ARK_GUID = UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae")
CRL_GUID = UUID("92f81bc3-5811-4d3d-97ff-d19f88dc67ea")

EntryName = Literal["vcek", "vlek", "ask", "ark", "crl"]
_NAMES: dict[UUID, EntryName] = {
    VCEK_GUID: "vcek",
    VLEK_GUID: "vlek",
    ASK_GUID: "ask",
    ARK_GUID: "ark",
    CRL_GUID: "crl",
}
_ENTRY = struct.Struct("<16sII")


@dataclass(frozen=True)
class Collateral:
    """What proves a report: DER certificates and the root's revocation list. None is what isn't there.

    `other_crls` are further lists of the root's, older or of another address: what one of them revokes stays revoked.
    """

    leaf: bytes | None = None
    intermediate: bytes | None = None
    root: bytes | None = None
    crl: bytes | None = None
    other_crls: tuple[bytes, ...] = ()

    @classmethod
    def from_certificates(cls, certificates: Sequence[bytes], crl: bytes | None = None) -> Collateral:
        """`certificates` are DER, the report's signer first, its root last; a shorter list lacks its end."""
        if len(certificates) > 3:
            raise EvidenceError(f"the chain has {len(certificates)} certificates instead of three")
        leaf, intermediate, root = (*certificates, None, None, None)[:3]
        return cls(leaf, intermediate, root, crl)

    def completed(self, other: Collateral) -> Collateral:
        """This collateral, and from `other` what is missing here."""
        missing = {field.name for field in fields(self) if getattr(self, field.name) is None}
        return replace(self, **{name: getattr(other, name) for name in missing})


@dataclass(frozen=True)
class CertificateTable:
    """The entries of a table that this program knows, as bytes that nobody has looked at yet."""

    vcek: bytes | None = None
    vlek: bytes | None = None
    ask: bytes | None = None
    ark: bytes | None = None
    crl: bytes | None = None

    def collateral(self, signing_key: SigningKey) -> Collateral:
        """The chain of a report that `signing_key` signed. The table has one place for ASK and ASVK."""
        leaf = {"VCEK": self.vcek, "VLEK": self.vlek, "NONE": None}[signing_key]
        return Collateral(leaf, self.ask, self.ark, self.crl)


def parse_table(data: bytes) -> CertificateTable:
    """Read a table by its declared lengths. Unknown GUIDs are passed over; empty data is an empty table.

    Raises EvidenceError where entries overlap, leave the data or are there twice, and where anything but zeros stands
    outside of them.
    """
    if not data:
        return CertificateTable()
    if len(data) > MAX_TABLE:
        raise EvidenceError(f"the certificate table has {len(data)} bytes, and {MAX_TABLE} are enough")
    entries, header = _entries(data)
    found: dict[EntryName, bytes] = {}
    end = header
    for guid, start, length in sorted(entries, key=lambda entry: entry[1:]):
        if start < end or start + length > len(data):
            raise EvidenceError(f"the certificate table's entry {guid} overlaps another or leaves the table")
        if any(data[end:start]):
            raise EvidenceError("the certificate table has bytes that belong to no entry")
        end = start + length
        name = _NAMES.get(guid)
        if name is None or not length:
            continue
        if name in found:
            raise EvidenceError(f"the certificate table has two entries {guid}")
        found[name] = data[start:end]
    if any(data[end:]):
        raise EvidenceError("the certificate table has bytes behind its last entry")
    return CertificateTable(**found)


def split_extended(extended: bytes) -> tuple[bytes, CertificateTable]:
    """The report's 1184 bytes and the table behind them."""
    if len(extended) < REPORT_BYTES:
        raise EvidenceError(f"the extended report has {len(extended)} bytes, less than a report's {REPORT_BYTES}")
    return extended[:REPORT_BYTES], parse_table(extended[REPORT_BYTES:])


def _entries(data: bytes) -> tuple[list[tuple[UUID, int, int]], int]:
    """The entries, and where the header ends."""
    entries: list[tuple[UUID, int, int]] = []
    for position in range(0, (MAX_ENTRIES + 1) * ENTRY_BYTES, ENTRY_BYTES):
        if position + ENTRY_BYTES > len(data):
            raise EvidenceError("the certificate table ends before its last entry")
        raw, offset, length = _ENTRY.unpack_from(data, position)
        if not any(data[position : position + ENTRY_BYTES]):
            return entries, position + ENTRY_BYTES
        entries.append((UUID(bytes=raw), offset, length))
    raise EvidenceError(f"the certificate table has more than {MAX_ENTRIES} entries")
