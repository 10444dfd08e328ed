"""What an image will measure: the launch digest (MEASUREMENT) that firmware reports for a machine started from it.

The arithmetic is the library sev-snp-measure's (virtee, Apache-2.0), after AMD 56860, SNP_LAUNCH_UPDATE ("Launch
Digest") and the metadata that the firmware image carries. The library is loaded only here, and only when it is asked.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from cloister_attest.snp.abi import MEASUREMENT_BYTES
from cloister_data.errors import ConfigurationError

VCPU_TYPES = (
    "EPYC", "EPYC-v1", "EPYC-v2", "EPYC-IBPB", "EPYC-v3", "EPYC-v4", "EPYC-Rome", "EPYC-Rome-v1", "EPYC-Rome-v2",
    "EPYC-Rome-v3", "EPYC-Milan", "EPYC-Milan-v1", "EPYC-Milan-v2", "EPYC-Genoa", "EPYC-Genoa-v1", "EPYC-Turin",
)  # fmt: skip
"""The processors that QEMU's -cpu can name, and whose CPUID signature goes into each vCPU's initial state."""

VmmType = Literal["QEMU", "ec2", "gce"]
"""Who starts the machine, for each lays it out a little differently."""

MAX_FIRMWARE = 16 << 20
MAX_PAYLOAD = 1 << 30
MAX_APPEND = 64 << 10
MAX_VCPUS = 4096
MAX_SECTIONS = 64
MAX_SECTION_BYTES = 1 << 30
PAGE_BYTES = 4096


def launch_measurement(
    *,
    ovmf: Path,
    kernel: Path | None,
    initrd: Path | None,
    append: str | None,
    vcpus: int,
    vcpu_type: str,
    guest_features: int,
    ovmf_hash: str | None,
    vmm_type: VmmType,
) -> bytes:
    """MEASUREMENT (48 bytes) of an SEV-SNP machine that starts from these files, which are read and not judged.

    Args:
        ovmf: the firmware image, whose end holds the metadata of its sections.
        kernel, initrd, append: what direct boot hashes into the firmware's table; None where the image boots otherwise.
        vcpus: how many virtual processors it has, 1 to 4096.
        vcpu_type: one of `VCPU_TYPES`.
        guest_features: SEV_FEATURES of the initial state (AMD APM 2, table B-4): 0x1 is SNP alone.
        ovmf_hash: the launch digest (48 bytes, hex) after the whole firmware, where `ovmf` is no more than its end.
        vmm_type: who starts the machine.

    Raises ConfigurationError: a file that is missing, too large or no such firmware; the library isn't installed.
    """
    guest, vcpu_types, vmm_types, sev_mode, firmware = _library()
    if vcpu_type not in vcpu_types.CPU_SIGS:
        raise ConfigurationError(
            f"There is no vCPU type {vcpu_type!r}.",
            why="Each vCPU's initial state names its processor, and so does the measurement.",
            next_step=f"Name one of {', '.join(vcpu_types.CPU_SIGS)}.",
        )
    if vmm_type not in vmm_types.VMMType.__members__:
        raise ConfigurationError(
            f"There is no VMM type {vmm_type!r}.", next_step=f"Name one of {', '.join(vmm_types.VMMType.__members__)}."
        )
    _check_numbers(vcpus, guest_features, ovmf_hash)
    if kernel is None and (initrd is not None or append is not None):
        raise ConfigurationError(
            "An initrd or a command line needs a kernel.",
            why="Only direct boot hashes them, and it hashes all three.",
            next_step="Name the kernel too, or neither of them.",
        )
    _check_append(append)
    _check_file(ovmf, "firmware", MAX_FIRMWARE)
    for path, name in ((kernel, "kernel"), (initrd, "initrd")):
        if path is not None:
            _check_file(path, name, MAX_PAYLOAD)
    try:
        image = firmware.OVMF(str(ovmf))
        _check_firmware(image, whole=ovmf_hash is None)
        digest = guest.calc_launch_digest(
            sev_mode.SevMode.SEV_SNP,
            vcpus,
            vcpu_types.CPU_SIGS[vcpu_type],
            str(ovmf),
            # The library takes an empty string for no kernel.
            str(kernel) if kernel is not None else "",
            str(initrd) if initrd is not None else "",
            append or "",
            guest_features,
            ovmf_hash or "",
            vmm_types.VMMType[vmm_type],
        )
    except ConfigurationError:
        raise
    except Exception as error:
        # The library asserts, indexes and unpacks its way through a firmware: each of its errors means the same here.
        raise _no_firmware(ovmf, f"sev-snp-measure says: {_said(error)}") from error
    if not isinstance(digest, bytes) or len(digest) != MEASUREMENT_BYTES:
        raise ConfigurationError(f"sev-snp-measure answered something other than {MEASUREMENT_BYTES} bytes.")
    return digest


def _library() -> tuple[ModuleType, ModuleType, ModuleType, ModuleType, ModuleType]:
    try:
        from sevsnpmeasure import guest, ovmf, sev_mode, vcpu_types, vmm_types
    except ImportError as error:
        raise ConfigurationError(
            "The expected measurement can't be computed here.",
            why="The library sev-snp-measure isn't installed.",
            next_step="Install it: pip install 'cloister[auditor]'.",
        ) from error
    return guest, vcpu_types, vmm_types, sev_mode, ovmf


def _check_numbers(vcpus: int, guest_features: int, ovmf_hash: str | None) -> None:
    if not 1 <= vcpus <= MAX_VCPUS:
        raise ConfigurationError(f"A machine has 1 to {MAX_VCPUS} vCPUs, not {vcpus}.")
    if not 0 <= guest_features < 1 << 64:
        raise ConfigurationError(
            "Guest features are a number of 64 bits.",
            next_step="Name SEV_FEATURES as the hypervisor sets it, for example 0x1.",
        )
    if ovmf_hash is not None and re.fullmatch(r"[0-9a-fA-F]{96}", ovmf_hash) is None:
        raise ConfigurationError(
            "The firmware's hash isn't 48 bytes in hex.",
            why="It is the launch digest after the whole firmware, a SHA-384.",
            next_step="Leave it out where the whole firmware is at hand.",
        )


def _check_append(append: str | None) -> None:
    if append is None:
        return
    if len(append) > MAX_APPEND or "\0" in append or not _encodable(append):
        raise ConfigurationError(
            "The kernel's command line can't be one.",
            why=f"It is text in UTF-8 without NUL, of at most {MAX_APPEND} characters.",
            next_step="Name it as the hypervisor passes it, for example --append 'console=ttyS0'.",
        )


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_file(path: Path, name: str, limit: int) -> None:
    try:
        found = path.stat()
        if stat.S_ISREG(found.st_mode):
            path.open("rb").close()
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"The {name} {path} can't be read.",
            why=f"{getattr(error, 'strerror', None) or error}.",
            next_step="Name the file that the machine starts from.",
        ) from error
    if not stat.S_ISREG(found.st_mode):
        raise ConfigurationError(
            f"The {name} {path} isn't a file.", next_step="Name the file that the machine starts from."
        )
    if found.st_size > limit:
        raise ConfigurationError(
            f"The {name} {path} has {found.st_size} bytes.",
            why=f"No {name} has more than {limit}.",
            next_step="Name the file that the machine starts from.",
        )


def _check_firmware(image: Any, *, whole: bool) -> None:
    """What the library takes for granted: metadata to measure, in reasonable amounts, and whole pages."""
    data, items = image.data(), image.metadata_items()
    if not items:
        raise ConfigurationError(
            "The firmware has no SEV metadata, so no SEV-SNP machine starts from it.",
            next_step="Name an image built for SEV-SNP, such as OVMF's AmdSev package.",
        )
    if len(items) > MAX_SECTIONS or sum(item.size for item in items) > MAX_SECTION_BYTES:
        raise ConfigurationError("The firmware's SEV metadata names more memory than firmware uses.")
    if whole and len(data) % PAGE_BYTES:
        raise ConfigurationError(
            f"The firmware has {len(data)} bytes, which aren't whole pages.",
            why="It is no more than a part of the image, whose pages are measured one by one.",
            next_step="Name the whole image, or the hash of the whole image: --ovmf-hash.",
        )


def _no_firmware(path: Path, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"No launch measurement follows from the firmware {path}.",
        why=why,
        next_step="Name an image built for SEV-SNP (OVMF's AmdSev package, where a kernel is named).",
    )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300] if str(error) else type(error).__name__
