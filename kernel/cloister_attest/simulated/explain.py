"""The names of the checks on simulated evidence, what each establishes, and where its rule is written."""

from __future__ import annotations

SIMULATED_CHECKS: dict[str, tuple[str, str]] = {
    "chain": ("The report's signer was issued by the chain's root, and each may do what it does.", "RFC 5280, 6.1"),
    "root": ("The chain's root is pinned.", "trust file: roots"),
    "dates": ("Every certificate of the chain is valid now.", "RFC 5280, 4.1.2.5"),
    "signature": ("The hardware's signer signed the report.", "FIPS 186-5, 6.4"),
    "debug": ("The host can't read the machine through its debugger.", "trust file: debug"),
    "measurement": ("The machine runs an image that the trust file names.", "trust file: measurements"),
    "tcb": (
        "The platform's firmware is recent enough, and is the one its signer was issued for.",
        "trust file: minimum_tcb",
    ),
    "chip": (
        "The processor is the one its signer was issued for, and is admitted.",
        "trust file: chips_allowed, chips_denied",
    ),
}
"""Every appraisal of simulated evidence answers all of these, in this order."""
