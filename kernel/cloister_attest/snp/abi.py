"""The attestation report, byte by byte (AMD 56860, table ATTESTATION_REPORT): versions 2 to 5, little-endian.

Version 3 brought CPUID_FAM_ID, CPUID_MOD_ID and CPUID_STEP, version 5 LAUNCH_MIT_VECTOR and CURRENT_MIT_VECTOR. A
version that doesn't define a field reserves its bytes, and reserved bytes are zero.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

from cloister_attest.outcome import EvidenceError
from cloister_attest.snp.products import Product, product_of_cpuid

REPORT_BYTES = 0x4A0
SIGNED_BYTES = 0x2A0
"""The signature covers bytes 0 to 0x29F."""
VERSIONS = range(2, 6)
CPUID_SINCE = 3
MITIGATIONS_SINCE = 5
ECDSA_P384_SHA384 = 1
FAMILY_ID_BYTES = IMAGE_ID_BYTES = 16
REPORT_DATA_BYTES = 64
MEASUREMENT_BYTES = 48
HOST_DATA_BYTES = 32
KEY_DIGEST_BYTES = 48
REPORT_ID_BYTES = 32
CHIP_ID_BYTES = 64
COMPONENT_BYTES = 72
"""Bytes of R and of S, little-endian (56860, table "Format for an ECDSA P-384 with SHA-384 signature")."""
VMPL_HOST = 0xFFFFFFFF
"""VMPL of a report that the host asked for (SNP_HV_REPORT_REQ): its report data isn't the guest's."""

P384_BYTES = 48
P384_ORDER = int("FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973", 16)

SigningKey = Literal["VCEK", "VLEK", "NONE"]
_SIGNING_KEYS: dict[int, SigningKey] = {0: "VCEK", 1: "VLEK", 7: "NONE"}

_BODY = struct.Struct("<IIQ16s16sII8sQII64s48s32s48s48s32s32s8s24s64s8s8B8s16s152s")
_SIGNATURE = struct.Struct("<72s72s368s")


@dataclass(frozen=True)
class GuestPolicy:
    """POLICY (56860, table "Guest Policy Structure"). `raw` is the whole 64-bit field."""

    raw: int

    @property
    def abi_minor(self) -> int:
        return self.raw & 0xFF

    @property
    def abi_major(self) -> int:
        return self.raw >> 8 & 0xFF

    @property
    def smt(self) -> bool:
        return bool(self.raw & 1 << 16)

    @property
    def migrate_ma(self) -> bool:
        return bool(self.raw & 1 << 18)

    @property
    def debug(self) -> bool:
        return bool(self.raw & 1 << 19)

    @property
    def single_socket(self) -> bool:
        return bool(self.raw & 1 << 20)

    @property
    def cxl_allow(self) -> bool:
        return bool(self.raw & 1 << 21)

    @property
    def mem_aes_256_xts(self) -> bool:
        return bool(self.raw & 1 << 22)

    @property
    def rapl_dis(self) -> bool:
        return bool(self.raw & 1 << 23)

    @property
    def ciphertext_hiding_dram(self) -> bool:
        return bool(self.raw & 1 << 24)

    @property
    def page_swap_disable(self) -> bool:
        return bool(self.raw & 1 << 25)


_POLICY_ONE = 1 << 17
_POLICY_DEFINED = (1 << 26) - 1


@dataclass(frozen=True)
class PlatformInfo:
    """PLATFORM_INFO (56860, table "PLATFORM_INFO Field"). Firmware sets bits that older documents don't define yet.

    So a bit that isn't named here is neither refused nor judged. That goes for bit 6: other verifiers call it
    IOMMU_WRITE_SAFE on Turin, and revision 1.58 reserves it; `raw` shows it.
    """

    raw: int

    @property
    def smt_en(self) -> bool:
        return bool(self.raw & 1 << 0)

    @property
    def tsme_en(self) -> bool:
        return bool(self.raw & 1 << 1)

    @property
    def ecc_en(self) -> bool:
        return bool(self.raw & 1 << 2)

    @property
    def rapl_dis(self) -> bool:
        return bool(self.raw & 1 << 3)

    @property
    def ciphertext_hiding_dram_en(self) -> bool:
        return bool(self.raw & 1 << 4)

    @property
    def alias_check_complete(self) -> bool:
        return bool(self.raw & 1 << 5)

    @property
    def tio_en(self) -> bool:
        return bool(self.raw & 1 << 7)


@dataclass(frozen=True)
class FirmwareVersion:
    """A version of the SNP firmware."""

    major: int
    minor: int
    build: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor} build {self.build}"


@dataclass(frozen=True)
class Cpuid:
    """CPUID_FAM_ID, CPUID_MOD_ID and CPUID_STEP, the first two with their extended parts."""

    family: int
    model: int
    stepping: int


@dataclass(frozen=True)
class Report:
    """A parsed report, its fields under the table's names. Nothing of it is proven yet.

    The TCB_VERSIONs are kept as their 8 bytes, for their layout depends on the product (`products.decode_tcb`).
    `cpuid` and `product` are None before version 3, the mitigation vectors before version 5. `signed` is the part that
    the signature (r, s) covers.
    """

    version: int
    guest_svn: int
    policy: GuestPolicy
    family_id: bytes
    image_id: bytes
    vmpl: int
    signature_algo: int
    current_tcb: bytes
    platform_info: PlatformInfo
    author_key_en: bool
    mask_chip_key: bool
    signing_key: SigningKey
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    author_key_digest: bytes
    report_id: bytes
    report_id_ma: bytes
    reported_tcb: bytes
    cpuid: Cpuid | None
    product: Product | None
    chip_id: bytes
    committed_tcb: bytes
    current: FirmwareVersion
    committed: FirmwareVersion
    launch_tcb: bytes
    launch_mit_vector: int | None
    current_mit_vector: int | None
    signed: bytes
    r: int
    s: int

    @property
    def chip_id_masked(self) -> bool:
        """The host has CHIP_ID written as zeros (56860, SNP_CONFIG, MASK_CHIP_ID)."""
        return not any(self.chip_id)


def parse(report: bytes) -> Report:
    """Read one whole report of 1184 bytes. Raises EvidenceError for anything else."""
    if len(report) != REPORT_BYTES:
        raise EvidenceError(f"the report has {len(report)} bytes instead of {REPORT_BYTES}")
    (
        version, guest_svn, policy, family_id, image_id, vmpl, algorithm, current_tcb, platform_info, key_info,
        reserved, report_data, measurement, host_data, id_key_digest, author_key_digest, report_id, report_id_ma,
        reported_tcb, cpuid_bytes, chip_id, committed_tcb, current_build, current_minor, current_major,
        reserved_current, committed_build, committed_minor, committed_major, reserved_committed, launch_tcb,
        vectors, reserved_end,
    ) = _BODY.unpack_from(report)  # fmt: skip
    if version not in VERSIONS:
        raise EvidenceError(f"the report has version {version}, and this program reads 2 to 5")
    if algorithm != ECDSA_P384_SHA384:
        raise EvidenceError(f"the report names signature algorithm {algorithm}, which isn't ECDSA P-384 with SHA-384")
    if vmpl > 3 and vmpl != VMPL_HOST:
        raise EvidenceError(f"the report names VMPL {vmpl}, which doesn't exist")
    if key_info >> 5 or reserved or reserved_current or reserved_committed or any(reserved_end):
        raise EvidenceError("the report sets reserved bytes")
    cpuid = _cpuid(version, cpuid_bytes)
    launch_mit_vector, current_mit_vector = _mitigations(version, vectors)
    r, s = _signature(report)
    return Report(
        version=version,
        guest_svn=guest_svn,
        policy=_policy(policy),
        family_id=family_id,
        image_id=image_id,
        vmpl=vmpl,
        signature_algo=algorithm,
        current_tcb=current_tcb,
        platform_info=PlatformInfo(platform_info),
        author_key_en=bool(key_info & 1),
        mask_chip_key=bool(key_info & 2),
        signing_key=_signing_key(key_info >> 2 & 7),
        report_data=report_data,
        measurement=measurement,
        host_data=host_data,
        id_key_digest=id_key_digest,
        author_key_digest=author_key_digest,
        report_id=report_id,
        report_id_ma=report_id_ma,
        reported_tcb=reported_tcb,
        cpuid=cpuid,
        product=product_of_cpuid(cpuid.family, cpuid.model) if cpuid else None,
        chip_id=chip_id,
        committed_tcb=committed_tcb,
        current=FirmwareVersion(current_major, current_minor, current_build),
        committed=FirmwareVersion(committed_major, committed_minor, committed_build),
        launch_tcb=launch_tcb,
        launch_mit_vector=launch_mit_vector,
        current_mit_vector=current_mit_vector,
        signed=report[:SIGNED_BYTES],
        r=r,
        s=s,
    )


def _policy(raw: int) -> GuestPolicy:
    if not raw & _POLICY_ONE:
        raise EvidenceError(f"the guest policy {raw:#x} clears bit 17, which is always one")
    if raw & ~_POLICY_DEFINED:
        raise EvidenceError(f"the guest policy {raw:#x} sets reserved bits")
    return GuestPolicy(raw)


def _signing_key(value: int) -> SigningKey:
    if value not in _SIGNING_KEYS:
        raise EvidenceError(f"the report names signing key {value}, which is reserved")
    return _SIGNING_KEYS[value]


def _cpuid(version: int, field: bytes) -> Cpuid | None:
    used = 3 if version >= CPUID_SINCE else 0
    if any(field[used:]):
        raise EvidenceError("the report sets reserved bytes around CPUID_STEP")
    return Cpuid(*field[:3]) if used else None


def _mitigations(version: int, field: bytes) -> tuple[int | None, int | None]:
    if version >= MITIGATIONS_SINCE:
        return int.from_bytes(field[:8], "little"), int.from_bytes(field[8:], "little")
    if any(field):
        raise EvidenceError("the report sets reserved bytes behind LAUNCH_TCB")
    return None, None


def _signature(report: bytes) -> tuple[int, int]:
    r_bytes, s_bytes, reserved = _SIGNATURE.unpack_from(report, SIGNED_BYTES)
    if any(reserved):
        raise EvidenceError("the report sets reserved bytes behind its signature")
    r, s = int.from_bytes(r_bytes, "little"), int.from_bytes(s_bytes, "little")
    if not r and not s:
        raise EvidenceError("the report isn't signed: its signature is all zero")
    if not (0 < r < P384_ORDER and 0 < s < P384_ORDER):
        raise EvidenceError("the report's signature isn't a pair of numbers below the order of P-384")
    return r, s
