"""The launch measurement: published ones are recomputed in `test_vectors`; here, what is refused."""

from __future__ import annotations

import struct
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from cloister_attest.snp import launch
from cloister_data.errors import ConfigurationError

SEED = "0b" * 48


def firmware(
    sections: tuple[tuple[int, int, int], ...] = ((0x800000, 0x9000, 1), (0x80D000, 0x1000, 2), (0x80E000, 0x1000, 3)),
    *,
    size: int = 8192,
    count: int | None = None,
    reset: bool = True,
    table: int = 0x10,
) -> bytes:
    """The end of an OVMF image as edk2 lays it out (OvmfPkg/ResetVector/X64/OvmfSevMetadata.asm)."""
    metadata = b"ASEV" + struct.pack("<III", 16 + 12 * len(sections), 1, len(sections) if count is None else count)
    metadata += b"".join(struct.pack("<III", *section) for section in sections)
    image = bytearray(size)
    start = size - 1024
    image[start : start + len(metadata)] = metadata

    def entry(guid: str, data: bytes) -> bytes:
        return data + struct.pack("<H", len(data) + 18) + uuid.UUID(guid).bytes_le

    entries = entry("dc886566-984a-4798-a75e-5585a7bf67cc", struct.pack("<I", size - start))
    if reset:
        entries += entry("00f771de-1a7e-4fcb-890e-68c77e2fb44e", struct.pack("<I", 0x80B004))
    entries += entry("7255371f-3a3b-4b04-927b-1da6efa8d454", struct.pack("<II", 0x80FC00, 0x400))
    footer = struct.pack("<H", len(entries) + 18) + uuid.UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
    end = size - 32
    image[end - len(entries) - 18 : end] = entries + footer
    return bytes(image)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "ovmf.fd"
    path.write_bytes(firmware())
    return path


def measured(image: Path, **changed: Any) -> bytes:
    arguments: dict[str, Any] = {
        "ovmf": image,
        "kernel": None,
        "initrd": None,
        "append": None,
        "vcpus": 2,
        "vcpu_type": "EPYC-v4",
        "guest_features": 1,
        "ovmf_hash": None,
        "vmm_type": "QEMU",
    }
    return launch.launch_measurement(**(arguments | changed))


def test_every_input_changes_the_measurement(image: Path) -> None:
    found = {measured(image)}
    changes: list[dict[str, Any]] = [
        {"vcpus": 1},
        {"vcpu_type": "EPYC-Milan"},
        {"guest_features": 0x21},
        {"ovmf_hash": SEED},
        {"vmm_type": "ec2"},
        {"vmm_type": "gce"},
    ]
    for changed in changes:
        found.add(measured(image, **changed))
    assert len(found) == 7
    assert all(len(each) == 48 for each in found)
    image.write_bytes(b"\x01" + image.read_bytes()[1:])
    assert measured(image) not in found
    assert measured(image, ovmf_hash=SEED.upper()) in found


def test_the_command_line_changes_the_measurement(image: Path, tmp_path: Path) -> None:
    image.write_bytes(firmware(((0x800000, 0x9000, 1), (0x80F000, 0x1000, 0x10))))
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(b"kernel")
    found = {measured(image, kernel=kernel, append=append) for append in (None, "", "quiet")}
    assert len(found) == 2
    assert measured(image, kernel=kernel, initrd=kernel) not in found


WRONG: list[dict[str, Any]] = [
    {"vcpus": 0},
    {"vcpus": 4097},
    {"vcpu_type": "Pentium"},
    {"guest_features": -1},
    {"guest_features": 1 << 64},
    {"ovmf_hash": "00"},
    {"ovmf_hash": "xx" * 48},
    {"ovmf_hash": ""},
    {"vmm_type": "xen"},
    {"append": "quiet"},
    {"append": ""},
    {"initrd": Path("/dev/null")},
    {"kernel": Path("/dev/zero")},
    {"kernel": Path("/nonexistent/vmlinuz")},
    {"kernel": Path("nul\0")},
    {"ovmf": Path("/nonexistent/ovmf.fd")},
    {"ovmf": Path("/")},
    {"ovmf": Path("/dev/zero")},
]


@pytest.mark.parametrize("changed", WRONG, ids=str)
def test_wrong_arguments_are_refused(image: Path, changed: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        measured(image, **changed)
    assert caught.value.what.endswith(".")


@pytest.mark.parametrize("append", ["a\0b", "x" * 70_000, "\udcff"])
def test_a_command_line_that_cannot_be_one(image: Path, append: str) -> None:
    with pytest.raises(ConfigurationError, match="command line"):
        measured(image, kernel=image, append=append)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x",
        bytes(4096),
        b"\xff" * 8192,
        b"#!/bin/sh\n" * 1000,
        firmware(size=8191),
        firmware()[:-1],
        firmware(()),
        firmware(reset=False),
        firmware(((0, 0x1000, 9),)),
        firmware(((0, 0x1001, 1),)),
        firmware(((0, 0xFFFFF000, 1),)),
        firmware(((0, 0x1000, 1),), count=1 << 31),
        firmware(((0, 0x1000, 1),) * 70),
        bytes((16 << 20) + 1),
    ],
    ids=range(15),
)
def test_garbage_in_place_of_firmware_is_refused(image: Path, content: bytes) -> None:
    image.write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        measured(image)
    assert caught.value.what


def test_a_kernel_needs_firmware_that_measures_it(image: Path) -> None:
    with pytest.raises(ConfigurationError, match="SNP_KERNEL_HASHES"):
        measured(image, kernel=image)


def test_without_the_library_the_extra_is_named(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sevsnpmeasure", None)
    with pytest.raises(ConfigurationError, match=r"cloister\[auditor\]"):
        measured(image)


def test_the_types_listed_are_the_librarys() -> None:
    from sevsnpmeasure.vcpu_types import CPU_SIGS
    from sevsnpmeasure.vmm_types import VMMType

    assert tuple(CPU_SIGS) == launch.VCPU_TYPES
    assert {*VMMType.__members__} == {"QEMU", "ec2", "gce"}
