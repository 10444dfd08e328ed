"""`cloister attest verify`: judge evidence from a file under a trust file, check by check."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from cloister.judging import collateral_store, judge
from cloister.profile import read_bounded
from cloister.receipts import ReceiptFile
from cloister_attest.appraise import appraise_report
from cloister_attest.evidence import MAX_EVIDENCE_JSON, EvidenceRecord
from cloister_attest.outcome import ReportDataUnchecked
from cloister_attest.policy import load_policy
from cloister_attest.reference_values import MAX_ENVELOPE
from cloister_cli.attest_evidence import parse_shown
from cloister_cli.moments import FORMS, moment
from cloister_cli.output import REFUSED, AsJson, print_json, say


def verify(
    evidence: Annotated[
        Path,
        typer.Argument(
            help="An evidence record or a receipt (JSON), an SNP report, with or without its certificates, or a TDX "
            "quote.",
            metavar="EVIDENCE",
            show_default=False,
        ),
    ],
    policy: Annotated[
        Path, typer.Option("--policy", help="The trust file to judge by.", metavar="FILE", show_default=False)
    ],
    at: Annotated[
        str, typer.Option("--at", help=f"The moment to judge at: {FORMS}.", metavar="TIME", show_default="now")
    ] = "0s",
    report_data: Annotated[
        str | None,
        typer.Option(
            "--report-data",
            help="For a report or quote alone: the 64 bytes, in hex, that it must have been made for, or `any`.",
            metavar="HEX",
        ),
    ] = None,
    collateral: Annotated[
        Path | None,
        typer.Option(
            "--collateral",
            help="Where `fetch-collateral --to` kept the makers' documents; by default this computer's own.",
            metavar="DIR",
        ),
    ] = None,
    reference_values: Annotated[
        Path | None,
        typer.Option(
            "--reference-values", help="For a report or quote alone: what the publisher signed.", metavar="FILE"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Judge a machine's evidence offline, check by check. The exit status is 1 where any check failed.

    A record and a receipt hold the nonce and the certificate that they were made for. A report or quote alone doesn't:
    --report-data must say what it answers.
    """
    trust = load_policy(policy)
    try:
        when = moment(at, time.time())
    except (ValueError, OverflowError) as error:
        raise typer.BadParameter(str(error), param_hint="--at") from error
    content = _read(evidence, MAX_EVIDENCE_JSON)
    store = collateral_store(collateral)
    record = _record(content)
    if record is not None:
        if report_data is not None or reference_values is not None:
            raise typer.BadParameter("The record says itself what it was made for.", param_hint="--report-data")
        result = judge(record.evidence, trust, certificate=record.certificate, nonce=record.nonce, at=when, store=store)
    else:
        expected = _expected(report_data)
        shown = parse_shown(content, str(evidence))
        result = appraise_report(
            shown.platform,
            shown.report,
            shown.certificates,
            trust,
            expected_report_data=expected,
            at=when,
            cached=store.relevant(shown.platform, shown.report, shown.certificates),
            reference_values=None if reference_values is None else _read(reference_values, MAX_ENVELOPE),
        )
    if as_json:
        print_json({**result.model_dump(mode="json"), "ok": result.ok})
    else:
        say(result.table())
    if not result.ok:
        raise typer.Exit(REFUSED)


def _read(path: Path, limit: int) -> bytes:
    try:
        return read_bounded(path, limit=limit)
    except FileNotFoundError as error:
        raise typer.BadParameter(f"There is no file {path}.") from error


def _record(content: bytes) -> EvidenceRecord | None:
    """The record in a file that holds one, or a receipt."""
    with suppress(ValidationError):
        return EvidenceRecord.from_json(content)
    with suppress(ValidationError):
        return ReceiptFile.from_json(content).evidence
    return None


def _expected(report_data: str | None) -> bytes | ReportDataUnchecked:
    if report_data is None:
        raise typer.BadParameter(
            "A report alone doesn't say what it answers. Name the 64 bytes that it must have been made for, or `any`.",
            param_hint="--report-data",
        )
    if report_data == "any":
        return ReportDataUnchecked("not compared, as --report-data any asks: the report may be relayed or replayed")
    try:
        found = bytes.fromhex(report_data)
    except ValueError:
        found = b""
    if len(found) != 64:
        raise typer.BadParameter("It must be 64 bytes in hex, or `any`.", param_hint="--report-data")
    return found
