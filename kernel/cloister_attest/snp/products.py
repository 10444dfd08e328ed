"""The processors, how a report names them, and how each lays out its TCB_VERSION."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from cloister_attest.outcome import EvidenceError

Product = Literal["Milan", "Genoa", "Turin"]
"""The names that AMD's certificates use (57230, "Determining the Product Name"). Bergamo and Siena are Genoa there."""

PRODUCTS: tuple[Product, ...] = get_args(Product)

TCB_BYTES = 8
HWID_BYTES: dict[Product, int] = {"Milan": 64, "Genoa": 64, "Turin": 8}
"""Bytes of the hardware id in a VCEK. CHIP_ID is that id, with zero bytes behind it up to 64 (56860, CHIP_ID)."""

Component = Literal["fmc", "bootloader", "tee", "snp", "microcode"]

TCB_LAYOUT: dict[Product, tuple[Component | None, ...]] = {
    "Milan": ("bootloader", "tee", None, None, None, None, "snp", "microcode"),
    "Genoa": ("bootloader", "tee", None, None, None, None, "snp", "microcode"),
    "Turin": ("fmc", "bootloader", "tee", "snp", None, None, None, "microcode"),
}
"""Byte by byte, the lowest first; None is reserved (56860, 2.2 TCB_VERSION)."""

_MODELS: tuple[tuple[int, range, Product], ...] = (
    (0x19, range(0x10), "Milan"),
    (0x19, range(0x10, 0x20), "Genoa"),
    (0x19, range(0xA0, 0xB0), "Genoa"),
    (0x1A, range(0x12), "Turin"),
)


def product_of_cpuid(family: int, model: int) -> Product:
    """The product of a CPUID family and model, both with their extended parts added."""
    for known, models, product in _MODELS:
        if family == known and model in models:
            return product
    raise EvidenceError(f"the processor of family {family:#x}, model {model:#x} is none that this program knows")


@dataclass(frozen=True)
class Tcb:
    """TCB_VERSION: the security version (0..255) of each part of the firmware. Only Turin has an `fmc`."""

    fmc: int | None
    bootloader: int
    tee: int
    snp: int
    microcode: int

    def at_least(self, other: Tcb) -> bool:
        """Whether no component is lower than in `other`, of the same product. Versions have no other order."""
        if (self.fmc is None) != (other.fmc is None):
            raise EvidenceError("security versions of two kinds of processors can't be compared")
        return (
            (self.fmc or 0) >= (other.fmc or 0)
            and self.bootloader >= other.bootloader
            and self.tee >= other.tee
            and self.snp >= other.snp
            and self.microcode >= other.microcode
        )

    def __str__(self) -> str:
        fmc = "" if self.fmc is None else f"fmc {self.fmc}, "
        return f"{fmc}bootloader {self.bootloader}, tee {self.tee}, snp {self.snp}, microcode {self.microcode}"


def decode_tcb(raw: bytes, product: Product) -> Tcb:
    """Read the 8 bytes of a TCB_VERSION. Raises EvidenceError where reserved bytes aren't zero."""
    if len(raw) != TCB_BYTES:
        raise EvidenceError(f"a TCB_VERSION has {len(raw)} bytes instead of {TCB_BYTES}")
    found: dict[Component, int] = {}
    for component, value in zip(TCB_LAYOUT[product], raw, strict=True):
        if component is not None:
            found[component] = value
        elif value:
            raise EvidenceError(f"the TCB_VERSION {raw.hex()} sets bytes that {product} reserves")
    return Tcb(found.get("fmc"), found["bootloader"], found["tee"], found["snp"], found["microcode"])
