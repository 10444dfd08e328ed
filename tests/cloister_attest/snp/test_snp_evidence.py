"""Real reports, with what a correct verifier answers: the vectors of the folder that CLOISTER_EVIDENCE names."""

from __future__ import annotations

import json
import os
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from cloister_attest.outcome import EvidenceError
from cloister_attest.snp import abi, verify
from cloister_attest.snp.appraise import ReportDataUnchecked, appraise_snp
from cloister_attest.snp.explain import AUTHENTICITY, SNP_CHECKS
from cloister_attest.snp.certificate_table import Collateral
from cloister_attest.snp.certificates import load_certificate
from cloister_attest.snp.policy import PlatformRequirements, SnpPolicy
from cloister_attest.snp.products import Product, decode_tcb

REPOSITORY = Path(__file__).parents[3]
EVIDENCE = Path(os.environ.get("CLOISTER_EVIDENCE", REPOSITORY.parent / "shared" / "evidence"))
MANIFEST = EVIDENCE / "manifest.json"

DEFAULT_POLICY = SnpPolicy(
    roots="vendor",
    intermediates="known",
    crl="any",
    measurements="any",
    debug="forbidden",
    migrate_ma="forbidden",
    smt="any",
    single_socket="any",
    cxl_allow="any",
    mem_aes_256_xts="any",
    rapl_dis="any",
    ciphertext_hiding_dram="any",
    page_swap_disable="any",
    minimum_abi="any",
    vmpl=0,
    host_data="any",
    family_ids="any",
    image_ids="any",
    id_keys="any",
    author_keys="any",
    minimum_guest_svn="any",
    minimum_tcb="any",
    minimum_launch_tcb="any",
    provisional_firmware="any",
    mitigations="any",
    platform_info=PlatformRequirements(
        smt_en="any",
        tsme_en="any",
        ecc_en="any",
        rapl_dis="any",
        ciphertext_hiding_dram_en="any",
        alias_check_complete="any",
        tio_en="any",
    ),
    products_allowed="any",
    products_denied=(),
    chips_allowed="any",
    chips_denied=(),
    masked_chip_id="any",
    vlek="any",
)
"""The policy that the manifest's `default_policy` answers for."""

UNCHECKED = ReportDataUnchecked("these reports were made for questions of others")

Case = dict[str, Any]


@cache
def cases(kind: str) -> tuple[Case, ...]:
    if not MANIFEST.is_file():
        return ()
    return tuple(case for case in json.loads(MANIFEST.read_bytes())["cases"] if case["kind"] == kind)


def parameters(kind: str) -> list[Any]:
    found = [pytest.param(case, id=case["id"]) for case in cases(kind)]
    absent = pytest.mark.skip(reason=f"there is no evidence in {EVIDENCE}: set CLOISTER_EVIDENCE")
    return found or [pytest.param({}, id="absent", marks=absent)]


def file(case: Case, name: str) -> bytes | None:
    return (EVIDENCE / case["files"][name]).read_bytes() if name in case["files"] else None


def seconds(moment: str | None) -> int:
    # Evidence without a moment can't be verified at any: one in its time is as good as another.
    return int(datetime.fromisoformat(moment or "2025-06-01T00:00:00Z").timestamp())


@pytest.mark.parametrize("case", parameters("snp"))
def test_a_real_report_gets_the_right_answer(case: Case) -> None:
    report = file(case, "report")
    assert report is not None
    collateral = Collateral(file(case, "leaf"), file(case, "intermediate"), file(case, "root"))
    checks = appraise_snp(
        report, collateral, DEFAULT_POLICY, expected_report_data=UNCHECKED, at=seconds(case["verify_at"])
    )
    assert [check.name for check in checks] == list(SNP_CHECKS)
    failed = {check.name: check.reason for check in checks if check.verdict == "fail"}
    assert not [reason for reason in failed.values() if reason.startswith("the check itself failed")]
    authentic = not failed.keys() & AUTHENTICITY.keys()
    assert authentic == (case["crypto"] == "ok"), failed
    assert (not failed) == (case["default_policy"] == "accept"), failed
    if case["fields"]:
        assert shown(abi.parse(report), collateral, case["fields"]) == case["fields"]


def shown(report: abi.Report, collateral: Collateral, expected: Case) -> Case:
    """The report's values under the names, and in the forms, of the manifest."""
    # Before version 3 only the certificates say the product; without any the manifest's word stands.
    product: Product = report.product or (
        verify.read_chain(collateral).product if collateral.root else expected["product"]
    )

    def tcb(raw: bytes) -> dict[str, int]:
        value = decode_tcb(raw, product)
        names = {"bl": value.bootloader, "tee": value.tee, "snp": value.snp, "ucode": value.microcode}
        return names if value.fmc is None else {"fmc": value.fmc, **names}

    values: Case = {
        "report_version": report.version,
        "product": product,
        "guest_svn": report.guest_svn,
        "policy": hex(report.policy.raw),
        "debug": report.policy.debug,
        "migrate_ma": report.policy.migrate_ma,
        "smt_allowed": report.policy.smt,
        "vmpl": report.vmpl,
        "platform_info": hex(report.platform_info.raw),
        "signing_key": report.signing_key,
        "measurement": report.measurement.hex(),
        "report_data": report.report_data.hex(),
        "host_data": report.host_data.hex(),
        "chip_id": report.chip_id.hex(),
        "reported_tcb": tcb(report.reported_tcb),
        "current_tcb": tcb(report.current_tcb),
        "committed_tcb": tcb(report.committed_tcb),
        "launch_tcb": tcb(report.launch_tcb),
    }
    if report.cpuid is not None:
        values["cpuid_fam_mod_step"] = [
            hex(part) for part in (report.cpuid.family, report.cpuid.model, report.cpuid.stepping)
        ]
    if report.launch_mit_vector is not None:
        values["launch_mit_vector"] = report.launch_mit_vector
        values["current_mit_vector"] = report.current_mit_vector
    return values


@pytest.mark.parametrize("case", parameters("crl"))
def test_a_real_revocation_list_gets_the_right_answer(case: Case) -> None:
    root, crl, at = load_certificate(file(case, "issuer"), "root"), file(case, "crl"), seconds(case["verify_at"])
    try:
        found = verify.verify_crl(crl, root, at)
    except EvidenceError:
        assert case["crypto"] == "fail"
        return
    assert case["crypto"] == "ok"
    fields = case["fields"]
    assert sorted(found.revoked) == fields["revoked"]
    assert found.this_update == datetime.fromisoformat(fields["this_update"])
    assert found.next_update == datetime.fromisoformat(fields["next_update"])
    for moment in (seconds(fields["this_update"]) - 1, seconds(fields["next_update"]) + 1):
        with pytest.raises(EvidenceError):
            verify.verify_crl(crl, root, moment)


@pytest.mark.parametrize(
    "case", [case for case in parameters("snp") if case.id in ("snp/milan-v3-oak-kernel", "absent")]
)
def test_a_real_chain_is_checked_against_the_real_list(case: Case) -> None:
    report = file(case, "report")
    assert report is not None
    lists = {other["id"]: file(other, "crl") for other in cases("crl")}
    policy = DEFAULT_POLICY.model_copy(update={"crl": "required"})
    answers = {}
    for name, crl in {**lists, "none": None}.items():
        collateral = Collateral(file(case, "leaf"), file(case, "intermediate"), file(case, "root"), crl)
        checks = appraise_snp(
            report, collateral, policy, expected_report_data=UNCHECKED, at=seconds("2025-06-01T00:00:00Z")
        )
        answers[name] = [check.name for check in checks if check.verdict == "fail"]
    assert answers["crl/amd-milan-empty"] == []
    assert answers["crl/amd-genoa-revokes-old-ask"] == answers["none"] == ["snp-revocation"]
