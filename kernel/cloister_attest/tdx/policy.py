"""What a relying party demands of a TD and of the platform under it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StringConstraints

from cloister_attest.fields import Any, Measurements, Published, Roots
from cloister_data.base import Wire

Fmspc = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{12}$")]
"""The 6 bytes that name a family of platforms, in hex."""

Mask = Annotated[str, StringConstraints(pattern=r"^0x[0-9a-f]{16}$")]
"""The bits that may be set in a 64-bit number, most significant digit first."""

AcceptableStatus = Literal[
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
]
"""What Intel may say of a TCB level and a policy may accept. Nobody may accept "Revoked"."""

Statuses = Annotated[tuple[AcceptableStatus, ...], Field(min_length=1, max_length=6)]

TD_ATTRIBUTES_KNOWN = "0xc0000000f8010071"
"""The bits of ATTRIBUTES that this program knows: DEBUG 0, HGS+ 4, PERF_PROF 5, PMT_PROF 6, ICSSD 16, LASS 27,
SEPT_VE_DISABLE 28, MIGRATABLE 29, PKS 30, KL 31, TPA 62, PERFMON 63 (Intel TDX Module v1.5 ABI Specification,
"ATTRIBUTES (TD Attributes) Definition"; Linux, arch/x86/include/asm/shared/tdx.h)."""

XFAM_KNOWN = "0x000000000006dbe7"
"""The bits of XFAM that this program knows (the same specification, "XFAM Definition"); 0 and 1 are fixed to one."""


class TdxPolicy(Wire):
    """Every field is there, and accepts everything only by the explicit word "any".

    Attributes:
        roots: SHA-256 of the DER root certificates that may vouch for a quote, or "vendor": Intel's SGX root CA.
        mr_td, rtmr0 to rtmr3, mr_config_id, mr_owner, mr_owner_config: the values (48 bytes, hex) that may be reported.
        mr_service_td: the service TDs that may be bound. "zero": none, and the quote must say so, which a TD report
            1.0 can't. "zero-if-reported": none as far as the quote can say, and a TD that one may migrate must say so.
        debug: whether a TD is refused whose memory the host may read, or which it may profile.
        sept_ve_disable: whether a TD is refused that takes a #VE where the host removes one of its pages.
        perfmon: whether a TD is refused that uses the performance monitoring unit.
        td_attributes_allowed, xfam_allowed: the bits that may be set at all.
        platform_tcb, module_tcb, qe_tcb: what Intel may say of the platform, the TDX module, the quoting enclave. "any"
            doesn't include "Revoked".
        minimum_tcb_evaluation: the lowest tcbEvaluationDataNumber of TCB info and QE identity.
        fmspcs_allowed, fmspcs_denied: which families of platforms may carry the TD.
        collateral: "required", or "any" where pieces that nobody fetched are done without. A piece that is there is
            checked all the same, and a document without its signing chain fails.
    """

    model_config = ConfigDict(strict=True)

    platform: Literal["tdx"]
    roots: Roots
    mr_td: Measurements | Published | Any
    rtmr0: Measurements | Published | Any
    rtmr1: Measurements | Published | Any
    rtmr2: Measurements | Published | Any
    rtmr3: Measurements | Published | Any
    mr_config_id: Measurements | Any
    mr_owner: Measurements | Any
    mr_owner_config: Measurements | Any
    mr_service_td: Measurements | Literal["zero", "zero-if-reported", "any"]
    debug: Literal["forbidden", "any"]
    sept_ve_disable: Literal["required", "any"]
    perfmon: Literal["forbidden", "any"]
    td_attributes_allowed: Mask | Any
    xfam_allowed: Mask | Any
    platform_tcb: Statuses | Any
    module_tcb: Statuses | Any
    qe_tcb: Statuses | Any
    minimum_tcb_evaluation: Annotated[int, Field(ge=0, lt=1 << 32)] | Any
    fmspcs_allowed: Annotated[tuple[Fmspc, ...], Field(min_length=1, max_length=4096)] | Any
    fmspcs_denied: Annotated[tuple[Fmspc, ...], Field(max_length=4096)]
    collateral: Literal["required", "any"]
