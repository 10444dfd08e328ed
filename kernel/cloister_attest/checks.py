"""Which checks an appraisal makes: those of every machine, and those of its platform."""

from __future__ import annotations

from cloister_attest.simulated.explain import SIMULATED_CHECKS
from cloister_attest.snp.explain import SNP_CHECKS
from cloister_attest.tdx.explain import TDX_CHECKS
from cloister_data.policy import Platform

BEFORE: dict[str, tuple[str, str]] = {
    "format": ("The evidence and the report in it are whole and of a known version.", "docs/protocol.md, Evidence"),
    "platform": (
        "The evidence comes from the kind of hardware that the trust file demands.",
        "trust file: hardware.platform",
    ),
    "binding": (
        "The report was made for this channel's key, this client's nonce, and this audit log: it is neither relayed "
        "nor replayed.",
        "docs/protocol.md, report_data",
    ),
    "publisher": (
        "The publisher of the images, where the trust file names one, vouches for the image that runs.",
        "trust file: publisher; DSSE 1.0; in-toto Statement v1",
    ),
}
"""The checks of every machine that come before its platform's: name, what the check establishes, where it is from."""

AFTER: dict[str, tuple[str, str]] = {
    "gpu": ("The confidential GPU, where one is demanded, proves itself.", "trust file: gpu"),
    "checkpoint": ("The audit log's key signed the checkpoint.", "C2SP tlog-checkpoint, signed-note"),
}
"""The checks of every machine that come after its platform's."""

PLATFORM_CHECKS: dict[Platform, dict[str, tuple[str, str]]] = {
    "simulated": SIMULATED_CHECKS,
    "sev-snp": SNP_CHECKS,
    "tdx": TDX_CHECKS,
}
"""A platform's own checks. Another kind of evidence adds its line here, and its module to `platforms`."""


def check_names(platform: Platform) -> tuple[str, ...]:
    """Every appraisal of a machine of this platform answers all of these, in this order. A missing one has failed."""
    return (*BEFORE, *PLATFORM_CHECKS[platform], *AFTER)
