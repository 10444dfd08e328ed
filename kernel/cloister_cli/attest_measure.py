"""`cloister attest measure`: what an image will measure, for the trust file of whoever audits it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cloister_attest.snp.launch import VCPU_TYPES, launch_measurement
from cloister_cli.output import AsJson, busy, print_json, say


class Mode(StrEnum):
    """The kinds of machines whose launch can be computed."""

    SNP = "snp"


class Vmm(StrEnum):
    """Who starts the machine."""

    QEMU = "QEMU"
    EC2 = "ec2"
    GCE = "gce"


def _number(text: str | int) -> int:
    if isinstance(text, int):
        return text
    try:
        return int(text, 0)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} isn't a number such as 0x1") from error


def measure(
    ovmf: Annotated[Path, typer.Option("--ovmf", help="The firmware image.", metavar="FILE")],
    vcpus: Annotated[int, typer.Option("--vcpus", help="How many virtual processors the machine has.", metavar="N")],
    vcpu_type: Annotated[
        str, typer.Option("--vcpu-type", help=f"Their type: {', '.join(VCPU_TYPES)}.", metavar="TYPE")
    ],
    kernel: Annotated[
        Path | None, typer.Option("--kernel", help="The kernel, where the machine boots it directly.", metavar="FILE")
    ] = None,
    initrd: Annotated[Path | None, typer.Option("--initrd", help="Its initial RAM disk.", metavar="FILE")] = None,
    append: Annotated[str | None, typer.Option("--append", help="Its command line.", metavar="TEXT")] = None,
    guest_features: Annotated[
        int,
        typer.Option(
            "--guest-features",
            help="SEV_FEATURES as the hypervisor sets it; 0x1 is SNP alone, QEMU's kernel often adds 0x20.",
            parser=_number,
            metavar="NUMBER",
        ),
    ] = 1,
    mode: Annotated[Mode, typer.Option("--mode", help="The kind of machine.")] = Mode.SNP,
    ovmf_hash: Annotated[
        str | None,
        typer.Option(
            "--ovmf-hash",
            help="The launch digest after the whole firmware, where --ovmf is no more than the end of it.",
            metavar="HEX",
        ),
    ] = None,
    vmm_type: Annotated[Vmm, typer.Option("--vmm-type", help="Who starts the machine.")] = Vmm.QEMU,
    as_json: AsJson = False,
) -> None:
    """Compute what an SEV-SNP machine will report as its measurement when it starts from these files.

    Build the image yourself, compute its measurement, and put that into your trust file: then no one else's word is
    needed on what the machine runs. Needs the extra: pip install 'cloister\\[auditor]'.
    """
    with busy("Measuring ..."):
        found = launch_measurement(
            ovmf=ovmf,
            kernel=kernel,
            initrd=initrd,
            append=append,
            vcpus=vcpus,
            vcpu_type=vcpu_type,
            guest_features=guest_features,
            ovmf_hash=ovmf_hash,
            vmm_type=vmm_type.value,
        ).hex()
    if as_json:
        print_json(
            {
                "mode": mode.value,
                "measurement": found,
                "vcpus": vcpus,
                "vcpu_type": vcpu_type,
                "guest_features": guest_features,
                "vmm_type": vmm_type.value,
            }
        )
        return
    say(f"Measurement: {found}")
    say("In a trust file:")
    say(f'measurements = ["{found}"]')
