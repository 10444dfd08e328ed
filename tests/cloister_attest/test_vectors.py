"""Real evidence of real machines, and forgeries of it: this verifier answers as the published manifest does.

The folder is that of CLOISTER_EVIDENCE, by default ../shared/evidence beside the checkout. `conftest` prints how many
cases agree.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cloister_attest.snp.appraise import ReportDataUnchecked, appraise_snp
from cloister_attest.snp.certificate_table import Collateral
from tests.cloister_attest import evidence, evidence_fields, evidence_files
from tests.cloister_attest.evidence import EVIDENCE, Case, case_id
from tests.cloister_attest.snp.minted import Recipe, mint


def parameters(*kinds: str, only: Callable[[Case], bool] = lambda case: True) -> list[Any]:
    found = [pytest.param(case, id=case_id(case)) for case in evidence.cases(*kinds) if only(case)]
    absent = pytest.mark.skip(reason=f"there is no such evidence in {EVIDENCE}: CLOISTER_EVIDENCE names the folder")
    return found or [pytest.param({}, id="absent", marks=absent)]


@pytest.mark.parametrize("case", parameters(*evidence.JUDGES))
def test_the_answer_is_the_manifests(case: Case, record_property: Callable[[str, object], None]) -> None:
    record_property("evidence", case_id(case))
    for name in evidence.unread_fields(case):
        record_property("evidence-unread", name)
    assert evidence.disagreements(case) == []


@pytest.mark.parametrize("case", parameters("snp", only=lambda case: case.get("default_policy") == "accept"))
def test_real_reports_come_from_issuers_that_this_program_carries(case: Case) -> None:
    assert evidence.snp_failed(case, intermediates="known") == {}


@pytest.mark.parametrize("case", parameters("snp", only=lambda case: case_id(case) == "snp/milan-v3-oak-kernel"))
def test_a_real_chain_is_checked_against_the_real_list(case: Case) -> None:
    report, given, _ = evidence.snp_parts(case)
    lists = {case_id(other): evidence.der(other, "crl") for other in evidence.cases("crl")}
    policy = evidence.snp_policy(intermediates="known", crl="required")
    at = evidence.moment("2025-06-01T00:00:00Z")
    assert at is not None
    answers = {}
    for name, crl in {**lists, "none": None}.items():
        collateral = Collateral(given.leaf, given.intermediate, given.root, crl)
        checks = appraise_snp(report, collateral, policy, expected_report_data=ReportDataUnchecked("not here"), at=at)
        answers[name] = [check.name for check in checks if check.verdict == "fail"]
    assert answers["crl/amd-milan-empty"] == []
    assert answers["crl/amd-genoa-revokes-old-ask"] == answers["none"] == ["snp-revocation"]


@pytest.mark.parametrize("case", parameters("tdx", only=lambda case: case_id(case) == "tdx/v4-phala-uptodate"))
def test_a_wrong_answer_would_be_noticed(case: Case) -> None:
    assert evidence.disagreements(case) == []
    fields = case["fields"]
    for wrong in (
        {"crypto": "fail"},
        {"default_policy": "refuse"},
        {"fields": fields | {"mrtd": "00" * 48}},
        {"fields": fields | {"MR_TD": "00" * 48}},
        {"fields": fields | {"pce_svn": 12}},
        {"fields": fields | {"tcb_status": "OutOfDate"}},
        {"fields": fields | {"advisories": ["INTEL-SA-00000"]}},
        {"crypto": None, "default_policy": None, "fields": None},
    ):
        assert evidence.disagreements(case | wrong), wrong
    assert evidence.disagreements(case | {"crypto": None, "fields": {"a field of tomorrow": 1}}) == []
    assert evidence.unread_fields(case | {"fields": {"a field of tomorrow": 1, "mrtd": ""}}) == ["a field of tomorrow"]


def test_files_come_in_several_forms() -> None:
    der = b"\x30\x82\x00\x05hello"
    text = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"
    assert evidence_files.as_der(text) == evidence_files.as_der(b"a comment\n" + text + text) == der
    assert evidence_files.as_der(der) == der
    assert evidence_files.as_pem(der + der) == text + text
    assert evidence_files.as_pem(text) == text
    assert evidence.moment("2025-06-01T00:00:00Z") == evidence.moment("2025-06-01T02:00:00+02:00") == 1748736000
    assert evidence.moment(1748736000) == evidence.moment("2025-06-01T00:00:00")
    assert evidence.moment(None) is None


@pytest.mark.parametrize(
    ("wanted", "found", "name", "agree"),
    [
        ("0x3001F", 0x3001F, "policy", True),
        (196639, 0x3001F, "policy", True),
        ("0x3001e", 0x3001F, "policy", False),
        ("AB", "ab", "", True),
        ("Siena-B1", "Genoa", "product", True),
        ("Milan", "Genoa", "product", False),
        (
            {"bl": 3, "tee": 0, "snp": 8, "ucode": 115},
            {"bootloader": 3, "tee": 0, "snp": 8, "microcode": 115},
            "",
            True,
        ),
        (
            {"bl": 3, "tee": 0, "snp": 8, "ucode": 116},
            {"bootloader": 3, "tee": 0, "snp": 8, "microcode": 115},
            "",
            False,
        ),
        ({"bl": 3}, {"bootloader": 3, "tee": 0, "snp": 8, "microcode": 115}, "", False),
        (["b", "a"], ["a", "b"], "advisories", True),
        (["b", "a"], ["a", "b"], "rtmr", False),
        (True, 1, "debug", False),
        (None, "UpToDate", "tdx_module_status", False),
        ("x", 1, "vmpl", False),
    ],
)
def test_how_fields_are_compared(wanted: Any, found: Any, name: str, agree: bool) -> None:
    assert evidence_fields.same(wanted, found, name) is agree


def test_the_summary_states_true_counts(tmp_path: Path) -> None:
    """Another folder, with PEM in place of DER, no moment, a wrong statement, and kinds of tomorrow."""
    minted = mint(Recipe(product="Turin"))
    (tmp_path / "report.bin").write_bytes(minted.report)
    for name in ("leaf", "intermediate", "root"):
        der = getattr(minted.collateral, name)
        text = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"
        (tmp_path / f"{name}.pem").write_bytes(text)
    files = {"report": "report.bin", "leaf": "leaf.pem", "intermediate": "intermediate.pem", "root": "root.pem"}
    case = {"id": "a", "kind": "snp", "files": files, "verify_at": None, "crypto": "fail", "default_policy": "refuse"}
    cases = [
        case | {"fields": {"vmpl": 0, "host_data": "68" * 32, "family_id": "66" * 16, "tomorrow": 1}},
        case | {"id": "b", "fields": {"vmpl": 1}},
        case | {"id": "c", "kind": "of-tomorrow"},
        case | {"id": "d", "files": files | {"report": "absent.bin"}},
    ]
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "cases": cases}))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "manifests"],
        env={**os.environ, "CLOISTER_EVIDENCE": str(tmp_path)},
        cwd=evidence.REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if line.startswith("evidence: ")]
    assert lines == [
        "evidence: 3 cases, 1 agree",
        "evidence: kinds passed over: of-tomorrow 1",
        "evidence: fields that no parser knows: tomorrow 1",
    ]
