"""What a relying party demands of simulated hardware. Every field is there, and accepts everything only by "any"."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from cloister_attest.fields import Any, ChipId, Measurements, Published
from cloister_data.base import Digest, Wire


class SimulatedPolicy(Wire):
    """What is demanded of a simulated report and its chain.

    Attributes:
        roots: SHA-256 of the DER root certificates that may vouch. Simulated hardware has no vendor.
        measurements: the images that may run.
        debug: whether a machine that its host may debug, and so read, is refused.
        minimum_tcb: the lowest security version of the platform.
        chips_allowed, chips_denied: which simulated chips may carry the machine.
    """

    model_config = ConfigDict(strict=True)

    platform: Literal["simulated"]
    roots: Annotated[
        tuple[Annotated[Digest, Field(description="SHA-256 in lower-case hex")], ...],
        Field(min_length=1, max_length=16),
    ]
    measurements: Measurements | Published | Any
    debug: Literal["forbidden", "any"]
    minimum_tcb: Annotated[int, Field(ge=0, lt=1 << 64)] | Any
    chips_allowed: Annotated[tuple[ChipId, ...], Field(min_length=1, max_length=4096)] | Any
    chips_denied: Annotated[tuple[ChipId, ...], Field(max_length=4096)]
