"""Real quotes with the right answers, from the folder that CLOISTER_EVIDENCE names (default ../shared/evidence)."""

import json
import os
from datetime import datetime
from pathlib import Path

import pytest

from cloister_attest.outcome import EvidenceError
from cloister_attest.tdx import abi, chain, validate, verify
from cloister_attest.tdx import collateral as pcs
from cloister_attest.tdx.appraise import appraise_tdx
from cloister_attest.tdx.collateral import Collateral
from cloister_attest.tdx.explain import AUTHENTICATION, TDX_CHECKS
from tests.cloister_attest.tdx.minting import permissive

REPOSITORY = Path(__file__).resolve().parents[3]
EVIDENCE = Path(os.environ.get("CLOISTER_EVIDENCE", REPOSITORY.parent / "shared" / "evidence"))
PIECES = ("tcb_info", "tcb_info_chain", "qe_identity", "qe_identity_chain", "root_crl", "pck_crl")


def cases() -> list[dict]:
    manifest = EVIDENCE / "manifest.json"
    if not manifest.is_file():
        return []
    return [case for case in json.loads(manifest.read_text())["cases"] if case["kind"] == "tdx"]


CASES = cases()
if not CASES:
    pytest.skip(f"no evidence in {EVIDENCE}: CLOISTER_EVIDENCE names the folder", allow_module_level=True)


def default_policy(**changed):
    """The strict production policy that the manifest's `default_policy` answers for."""
    return permissive(
        **{
            "roots": "vendor",
            "mr_service_td": "zero-if-reported",
            "debug": "forbidden",
            "sept_ve_disable": "required",
            "perfmon": "forbidden",
            "platform_tcb": ("UpToDate", "SWHardeningNeeded"),
            "module_tcb": ("UpToDate", "SWHardeningNeeded"),
            "qe_tcb": ("UpToDate", "SWHardeningNeeded"),
            "collateral": "required",
        }
        | changed
    )


def read(case: dict, name: str) -> bytes | None:
    return (EVIDENCE / case["files"][name]).read_bytes() if name in case["files"] else None


def collateral_of(case: dict) -> Collateral:
    return Collateral(**{piece: read(case, piece) for piece in PIECES})


def moment_of(case: dict) -> int:
    return int(datetime.fromisoformat(case["verify_at"]).timestamp())


def report_data_of(quote: bytes) -> bytes:
    try:
        return abi.parse_quote(quote).report.report_data
    except EvidenceError:
        return bytes(64)


def judge(case: dict, policy) -> set[str]:
    """The names of the failed checks; every check is answered, and with a reason."""
    quote = read(case, "quote")
    checks = appraise_tdx(quote, collateral_of(case), policy, report_data_of(quote), moment_of(case))
    assert tuple(check.name for check in checks) == tuple(TDX_CHECKS)
    assert all(check.reason and check.explanation and check.source for check in checks)
    assert not [check.reason for check in checks if "the check itself failed" in check.reason]
    return {check.name for check in checks if check.verdict == "fail"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_crypto(case):
    collateral = "any" if collateral_of(case) == Collateral.none() else "required"
    failed = judge(case, default_policy(collateral=collateral))
    assert ("fail" if failed & set(AUTHENTICATION) else "ok") == case["crypto"], failed


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_default_policy(case):
    failed = judge(case, default_policy())
    assert bool(failed) == (case["default_policy"] != "accept"), failed
    if case["default_policy"] == "signature-only":
        assert "tdx-collateral" in failed
        assert judge(case, default_policy(collateral="any")) == set()


@pytest.mark.parametrize("case", [case for case in CASES if case["fields"]], ids=lambda case: case["id"])
def test_fields(case):
    quote = abi.parse_quote(read(case, "quote"))
    report = quote.report
    platform = chain.sgx_extension(chain.verify_pck_chain(quote.pck_chain))
    attributes = validate.number(report.td_attributes)
    found = {
        "version": quote.version,
        "body_type": quote.body_type,
        "mrtd": report.mr_td.hex(),
        "rtmr": [value.hex() for value in report.rtmr],
        "report_data": report.report_data.hex(),
        "mrconfigid": report.mr_config_id.hex(),
        "mrowner": report.mr_owner.hex(),
        "mrownerconfig": report.mr_owner_config.hex(),
        "mrseam": report.mr_seam.hex(),
        "tee_tcb_svn": report.tee_tcb_svn.hex(),
        "td_attributes": hex(attributes),
        "debug": bool(attributes & validate.ATTRIBUTE_DEBUG),
        "sept_ve_disable": bool(attributes & validate.ATTRIBUTE_SEPT_VE_DISABLE),
        "perfmon": bool(attributes & validate.ATTRIBUTE_PERFMON),
        "pks": bool(attributes & validate.ATTRIBUTE_PKS),
        "xfam": report.xfam.hex(),
        "fmspc": platform.fmspc.hex(),
        "pceid": platform.pce_id.hex(),
        "pce_svn": platform.pce_svn,
    }
    if quote.body_type == abi.BODY_TD_15:
        found |= {"tee_tcb_svn2": report.tee_tcb_svn_2.hex(), "mrservicetd": report.mr_service_td.hex()}
    if "tcb_status" in case["fields"]:
        info = pcs.parse_tcb_info(pcs.parse_signed(read(case, "tcb_info"), "tcbInfo"))
        level, module = verify.platform_level(report, platform, info), verify.module_level(report, info)
        found |= {
            "tcb_status": level.tcb_status,
            "tdx_module_status": module.tcb_status if module else None,
            "advisories": sorted(level.advisory_ids),
            "tcb_date": level.tcb_date,
        }
    expected = dict(case["fields"])
    if "advisories" in expected:
        expected["advisories"] = sorted(expected["advisories"])
    assert {name: found[name] for name in expected} == expected
