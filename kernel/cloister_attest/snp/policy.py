"""What a relying party demands of an SEV-SNP machine. Every field is there, and accepts everything only by "any"."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from cloister_attest.fields import Any, ChipId, Measurements, Published, Roots
from cloister_attest.snp.products import Product, Tcb
from cloister_data.base import Wire

Requirement = Literal["required", "forbidden", "any"]
"""Of a bit: it must be set, it must be clear, or it isn't looked at."""

Hex16 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Hex32 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
KeyDigest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{96}$")]
"""SHA-384 in hex of an ID key or an author key in AMD's format (56860, ID_KEY_DIGEST)."""

MAX_CSP_ID = 126
CspId = Annotated[str, StringConstraints(pattern=rf"^[\x20-\x7e]{{1,{MAX_CSP_ID}}}$")]
Byte = Annotated[int, Field(ge=0, le=0xFF)]
Mask64 = Annotated[int, Field(ge=0, lt=1 << 64)]


class MinimumTcb(Wire):
    """The lowest security version of each part of one product's firmware. Only Turin has an `fmc`."""

    model_config = ConfigDict(strict=True)

    product: Product
    fmc: Byte | Literal["absent"]
    bootloader: Byte
    tee: Byte
    snp: Byte
    microcode: Byte

    @model_validator(mode="after")
    def _fmc_of_turin(self) -> Self:
        if (self.fmc != "absent") != (self.product == "Turin"):
            raise ValueError('fmc is a number for Turin, and "absent" for Milan and Genoa')
        return self

    @property
    def tcb(self) -> Tcb:
        return Tcb(None if self.fmc == "absent" else self.fmc, self.bootloader, self.tee, self.snp, self.microcode)


class MinimumAbi(Wire):
    """The lowest ABI that a guest's POLICY may accept: then older firmware can't run it."""

    model_config = ConfigDict(strict=True)

    major: Byte
    minor: Byte


class MinimumFirmware(Wire):
    """The lowest version of the SNP firmware. Versions compare by `major`, then `minor`, then `build`."""

    model_config = ConfigDict(strict=True)

    major: Byte
    minor: Byte
    build: Byte


class PlatformRequirements(Wire):
    """The bits of PLATFORM_INFO (56860), which say how the host is set up."""

    model_config = ConfigDict(strict=True)

    smt_en: Requirement
    tsme_en: Requirement
    ecc_en: Requirement
    rapl_dis: Requirement
    ciphertext_hiding_dram_en: Requirement
    alias_check_complete: Requirement
    tio_en: Requirement


Minimums = Annotated[tuple[MinimumTcb, ...], Field(min_length=1, max_length=3)] | Any
"""One entry for each product; a machine of a product that has none is refused."""


class SnpPolicy(Wire):
    """What is demanded of a report and its chain, under the terms of AMD 56860.

    Attributes:
        roots: SHA-256 of the DER root certificates that may vouch, or "vendor": AMD's own that this program carries.
        intermediates: "known" accepts only AMD's ASKs and ASVKs that this program carries, "any" all that the root
            issued.
        crl: "required", or "any" where a revocation list isn't looked at: then a revoked issuer isn't noticed.
        measurements: MEASUREMENT, the launch digests of the images that may run.
        debug, migrate_ma, smt, single_socket, cxl_allow, mem_aes_256_xts, rapl_dis, ciphertext_hiding_dram,
            page_swap_disable: the bits of the guest's POLICY.
        minimum_abi: ABI_MAJOR and ABI_MINOR of the guest's POLICY.
        vmpl: the privilege level that asked for the report. "any" still refuses reports that the host asked for.
        host_data, family_ids, image_ids: what the host or the ID block set at launch.
        id_keys: ID_KEY_DIGEST, the keys that may have signed the ID block.
        author_keys: AUTHOR_KEY_DIGEST, the keys that may have certified the ID key; demands AUTHOR_KEY_EN.
        minimum_guest_svn: GUEST_SVN of the ID block.
        minimum_tcb: of REPORTED_TCB, from which the signing key is derived.
        minimum_launch_tcb: of LAUNCH_TCB, the firmware that launched or took in the guest.
        minimum_firmware: of COMMITTED_MAJOR, COMMITTED_MINOR and COMMITTED_BUILD, below which the host can't go.
        provisional_firmware: "forbidden" demands that the running firmware is the committed one, to which the host
            can't go back from it.
        mitigations: bits that LAUNCH_MIT_VECTOR and CURRENT_MIT_VECTOR must have set (report version 5).
        platform_info: how the host is set up.
        products_allowed, products_denied: which processors may carry the machine.
        chips_allowed, chips_denied: which chips may carry it. Naming any refuses reports that name no chip.
        masked_chip_id: whether a report whose CHIP_ID the host masked is refused.
        vlek: the cloud providers (CSP_ID) whose VLEK may sign in a chip's place.
    """

    model_config = ConfigDict(strict=True)

    platform: Literal["sev-snp"]
    roots: Roots
    intermediates: Literal["known", "any"]
    crl: Literal["required", "any"]
    measurements: Measurements | Published | Any
    debug: Literal["forbidden", "any"]
    migrate_ma: Literal["forbidden", "any"]
    smt: Requirement
    single_socket: Requirement
    cxl_allow: Requirement
    mem_aes_256_xts: Requirement
    rapl_dis: Requirement
    ciphertext_hiding_dram: Requirement
    page_swap_disable: Requirement
    minimum_abi: MinimumAbi | Any
    vmpl: Annotated[int, Field(ge=0, le=3)] | Any
    host_data: Annotated[tuple[Hex32, ...], Field(min_length=1, max_length=256)] | Any
    family_ids: Annotated[tuple[Hex16, ...], Field(min_length=1, max_length=256)] | Any
    image_ids: Annotated[tuple[Hex16, ...], Field(min_length=1, max_length=256)] | Any
    id_keys: Annotated[tuple[KeyDigest, ...], Field(min_length=1, max_length=256)] | Any
    author_keys: Annotated[tuple[KeyDigest, ...], Field(min_length=1, max_length=256)] | Any
    minimum_guest_svn: Annotated[int, Field(ge=0, lt=1 << 32)] | Any
    minimum_tcb: Minimums
    minimum_launch_tcb: Minimums
    minimum_firmware: MinimumFirmware | Any
    provisional_firmware: Literal["forbidden", "any"]
    mitigations: Mask64 | Any
    platform_info: PlatformRequirements
    products_allowed: Annotated[tuple[Product, ...], Field(min_length=1, max_length=3)] | Any
    products_denied: Annotated[tuple[Product, ...], Field(max_length=3)]
    chips_allowed: Annotated[tuple[ChipId, ...], Field(min_length=1, max_length=4096)] | Any
    chips_denied: Annotated[tuple[ChipId, ...], Field(max_length=4096)]
    masked_chip_id: Literal["forbidden", "any"]
    vlek: Annotated[tuple[CspId, ...], Field(min_length=1, max_length=64)] | Literal["forbidden", "any"]

    @model_validator(mode="after")
    def _one_minimum_each(self) -> Self:
        for minimums in (self.minimum_tcb, self.minimum_launch_tcb):
            if minimums != "any" and len({minimum.product for minimum in minimums}) != len(minimums):
                raise ValueError("a product has two minimum security versions")
        return self
