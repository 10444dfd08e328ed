"""`cloister attest trust`: a first trust file for a machine, to be compared and then handed out."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cloister_attest.drafting import draft
from cloister_attest.outcome import EvidenceError
from cloister_attest.snp.products import PRODUCTS
from cloister_cli.attest_evidence import read_shown
from cloister_cli.output import note
from cloister_data.errors import ConfigurationError


def trust(
    evidence: Annotated[
        str,
        typer.Argument(
            help="Evidence, an evidence record, an SNP report or a TDX quote; a cloister's name or address.",
            metavar="EVIDENCE",
            show_default=False,
        ),
    ],
    product: Annotated[
        str | None,
        typer.Option("--product", help=f"For SNP reports of version 2: {', '.join(PRODUCTS)}.", metavar="PRODUCT"),
    ] = None,
) -> None:
    """Write a strict trust file for a machine of real hardware to standard output, from what its report shows.

    Nothing is verified: compare the measurements with those of the image that you built (cloister attest measure) or
    that its publisher announced, then judge the evidence under the file: cloister attest verify.
    """
    known = next((each for each in PRODUCTS if each == product), None)
    if product is not None and known is None:
        raise typer.BadParameter(f"It must be one of {', '.join(PRODUCTS)}.", param_hint="--product")
    shown = read_shown(evidence)
    try:
        drafted = draft(shown.platform, shown.report, shown.certificates, known)
    except EvidenceError as error:
        raise ConfigurationError(
            "No trust file can be made of this evidence.",
            why=f"{str(error)[:1].upper()}{str(error)[1:]}.",
            next_step="Name evidence of real hardware; for a report of version 2, also --product.",
        ) from error
    note("Nothing of this is verified: compare the measurements before you hand it out.")
    sys.stdout.write(drafted.to_toml())
