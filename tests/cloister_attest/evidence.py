"""Published evidence and its right answers: the folder that CLOISTER_EVIDENCE names, read and judged case by case.

`disagreements(case)` says in words where this verifier's answer differs from the manifest's. A case states up to three
things, and each one that it states is compared:

* `crypto`: "ok" where every check of authenticity passes; whatever else it says, one of them must fail.
* `default_policy`: "accept" where no check fails at all under the policy that the folder's README describes;
  "signature-only" where nothing fails but the demand for collateral; anything else must fail.
* `fields`: each is printed from the parsed evidence and compared. Manifests of others may name more than this
  verifier reads. The rule: a name that the parsers know, in any spelling (`tee_tcb_svn2` is `tee_tcb_svn_2`), must have
  the value stated, and a case whose evidence can't be parsed at all disagrees; a name that no parser knows can't be
  judged, so the case may agree, and the name is listed in the summary of the run.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from cloister_attest.outcome import EvidenceError
from cloister_attest.result import Check
from cloister_attest.snp import launch
from cloister_attest.snp import verify as snp_verify
from cloister_attest.snp.appraise import ReportDataUnchecked, appraise_snp
from cloister_attest.snp.certificate_table import Collateral as SnpCollateral
from cloister_attest.snp.certificates import load_certificate
from cloister_attest.snp.explain import AUTHENTICITY, SNP_CHECKS
from cloister_attest.snp.policy import PlatformRequirements, SnpPolicy
from cloister_attest.tdx import abi as tdx_abi
from cloister_attest.tdx.appraise import appraise_tdx
from cloister_attest.tdx.collateral import Collateral as TdxCollateral
from cloister_attest.tdx.explain import AUTHENTICATION, TDX_CHECKS
from cloister_attest.tdx.policy import TdxPolicy
from tests.cloister_attest import evidence_fields, evidence_files

REPOSITORY = Path(__file__).resolve().parents[2]
EVIDENCE = Path(os.environ.get("CLOISTER_EVIDENCE") or REPOSITORY.parent / "shared" / "evidence")
MANIFEST = EVIDENCE / "manifest.json"

Case = dict[str, Any]
PIECES = ("tcb_info", "tcb_info_chain", "qe_identity", "qe_identity_chain", "root_crl", "pck_crl")
UNCHECKED = ReportDataUnchecked("these reports were made for questions of others")


def snp_policy(**changed: Any) -> SnpPolicy:
    """SNP: no DEBUG, no MIGRATE_MA, VMPL 0, and AMD's roots. The manifest's crypto pins no intermediates."""
    platform = PlatformRequirements.model_validate(dict.fromkeys(PlatformRequirements.model_fields, "any"))
    fields: dict[str, Any] = dict.fromkeys(SnpPolicy.model_fields, "any") | {
        "platform": "sev-snp",
        "roots": "vendor",
        "debug": "forbidden",
        "migrate_ma": "forbidden",
        "vmpl": 0,
        "platform_info": platform,
        "products_denied": (),
        "chips_denied": (),
    }
    return SnpPolicy(**(fields | changed))


def tdx_policy(**changed: Any) -> TdxPolicy:
    """TDX: no DEBUG, no PERFMON, SEPT_VE_DISABLE, no service TD, and good levels of everything, under Intel's root."""
    good = ("UpToDate", "SWHardeningNeeded")
    fields: dict[str, Any] = dict.fromkeys(TdxPolicy.model_fields, "any") | {
        "platform": "tdx",
        "roots": "vendor",
        "fmspcs_denied": (),
        "mr_service_td": "zero-if-reported",
        "debug": "forbidden",
        "sept_ve_disable": "required",
        "perfmon": "forbidden",
        "platform_tcb": good,
        "module_tcb": good,
        "qe_tcb": good,
        "collateral": "required",
    }
    return TdxPolicy(**(fields | changed))


@cache
def all_cases() -> tuple[Case, ...]:
    """Every case of the manifest; none where there is no folder."""
    return tuple(json.loads(MANIFEST.read_bytes())["cases"]) if MANIFEST.is_file() else ()


def cases(*kinds: str) -> tuple[Case, ...]:
    return tuple(case for case in all_cases() if case.get("kind") in kinds)


def passed_over() -> Counter[str]:
    """The kinds that nothing here judges, and how many cases each has."""
    return Counter(str(case.get("kind")) for case in all_cases() if case.get("kind") not in JUDGES)


def case_id(case: Case) -> str:
    return str(case.get("id", "unnamed"))


def read(case: Case, name: str) -> bytes | None:
    """A file of the case; None where the case names none. One that is named and isn't there is an error."""
    path = (case.get("files") or {}).get(name)
    return None if path is None else (EVIDENCE / path).read_bytes()


def der(case: Case, name: str) -> bytes | None:
    data = read(case, name)
    return None if data is None else evidence_files.as_der(data)


def moment(value: Any) -> int | None:
    """`verify_at`: ISO 8601 (UTC where it names no zone), or Unix seconds. None where the case has no moment."""
    if value is None or isinstance(value, int):
        return value
    found = datetime.fromisoformat(value)
    return int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp())


def disagreements(case: Case) -> list[str]:
    """Where this verifier's answer differs from the case's; empty where they agree."""
    stated = [name for name in ("crypto", "default_policy", "fields") if case.get(name)]
    if not stated:
        return ["the case states no answer to compare with"]
    return JUDGES[case["kind"]](case)


def _verdicts(case: Case, authentic: bool, accepted: bool, failed: dict[str, str]) -> list[str]:
    found = []
    if case.get("crypto") and authentic != (case["crypto"] == "ok"):
        found.append(f"crypto is {case['crypto']}, and this verifier's failed checks are {failed}")
    if case.get("default_policy") and accepted != (case["default_policy"] == "accept"):
        found.append(f"default_policy is {case['default_policy']}, and this verifier's failed checks are {failed}")
    return found


def _failed(checks: tuple[Check, ...], names: tuple[str, ...]) -> dict[str, str]:
    """The failed checks and their reasons, once every check is answered by a judgement and not by an accident."""
    assert tuple(check.name for check in checks) == names
    assert all(check.reason and check.explanation and check.source for check in checks)
    accidents = [check.reason for check in checks if "the check itself failed" in check.reason]
    assert not accidents, accidents
    return {check.name: check.reason for check in checks if check.verdict == "fail"}


def snp_parts(case: Case) -> tuple[bytes, SnpCollateral, int]:
    report = read(case, "report")
    assert report is not None, "the case names no report"
    collateral = SnpCollateral(der(case, "leaf"), der(case, "intermediate"), der(case, "root"), der(case, "crl"))
    at = moment(case.get("verify_at"))
    return report, collateral, evidence_files.snp_moment(collateral) if at is None else at


def snp_failed(case: Case, **changed: Any) -> dict[str, str]:
    report, collateral, at = snp_parts(case)
    policy = snp_policy(**({"crl": "any" if collateral.crl is None else "required"} | changed))
    checks = appraise_snp(report, collateral, policy, expected_report_data=UNCHECKED, at=at)
    return _failed(checks, tuple(SNP_CHECKS))


def _snp(case: Case) -> list[str]:
    failed = snp_failed(case)
    found = _verdicts(case, not failed.keys() & AUTHENTICITY.keys(), not failed, failed)
    report, collateral, _ = snp_parts(case)
    return found + _fields(case, lambda wanted: evidence_fields.snp(report, collateral, wanted))


def _crl(case: Case) -> list[str]:
    root, crl = load_certificate(der(case, "issuer"), "root"), der(case, "crl")
    at = moment(case.get("verify_at"))
    try:
        made = snp_verify.verify_crl(crl, root, evidence_files.crl_moment(crl) if at is None else at)
    except EvidenceError as error:
        return _verdicts(case, False, False, {"crl": str(error)})
    found = _verdicts(case, True, True, {})
    found += _fields(case, lambda wanted: evidence_fields.crl(made))
    # It holds between its two updates, and not a second before or after.
    for wrong in (made.this_update.timestamp() - 1, made.next_update.timestamp() + 1):
        try:
            snp_verify.verify_crl(crl, root, int(wrong))
            found.append("the list is accepted outside of its time")
        except EvidenceError:
            pass
    return found


def tdx_parts(case: Case) -> tuple[bytes, TdxCollateral, int]:
    quote = read(case, "quote")
    assert quote is not None, "the case names no quote"
    pieces: dict[str, bytes | None] = {name: read(case, name) for name in PIECES}
    for name in ("root_crl", "pck_crl"):
        pieces[name] = der(case, name)
    for name in ("tcb_info_chain", "qe_identity_chain"):
        given = pieces[name]
        pieces[name] = None if given is None else evidence_files.as_pem(given)
    collateral = TdxCollateral(**pieces)
    at = moment(case.get("verify_at"))
    return quote, collateral, evidence_files.tdx_moment(quote, collateral) if at is None else at


def complete(collateral: TdxCollateral) -> bool:
    return all(getattr(collateral, name) is not None for name in PIECES)


def tdx_failed(case: Case, policy: TdxPolicy) -> dict[str, str]:
    quote, collateral, at = tdx_parts(case)
    try:
        data = tdx_abi.parse_quote(quote).report.report_data
    except EvidenceError:
        data = bytes(tdx_abi.REPORT_DATA_BYTES)
    return _failed(appraise_tdx(quote, collateral, policy, data, at), tuple(TDX_CHECKS))


def _tdx(case: Case) -> list[str]:
    quote, collateral, _ = tdx_parts(case)
    # What nobody published can't speak against the signatures; a piece that is there is checked under either policy.
    lenient = tdx_policy(collateral="required" if complete(collateral) else "any")
    without, strict = tdx_failed(case, lenient), tdx_failed(case, tdx_policy())
    found = _verdicts(case, not without.keys() & AUTHENTICATION.keys(), not strict, without | strict)
    if case.get("default_policy") == "signature-only" and (without or "tdx-collateral" not in strict):
        found.append(f"more than collateral is missing: {without or strict}")
    return found + _fields(case, lambda wanted: evidence_fields.tdx(quote, collateral))


def _measure(case: Case) -> list[str]:
    fields = case["fields"]
    if fields.get("mode", "snp") != "snp":
        return []
    with evidence_files.empty_file() as empty:

        def path(name: str) -> Path:
            given = (case.get("files") or {}).get(name)
            return empty if given is None else EVIDENCE / given

        number = fields.get("guest_features", 1)
        made = launch.launch_measurement(
            ovmf=path("ovmf"),
            kernel=path("kernel"),
            initrd=path("initrd"),
            append=fields.get("append"),
            vcpus=fields["vcpus"],
            vcpu_type=fields["vcpu_type"],
            guest_features=number if isinstance(number, int) else int(number, 0),
            ovmf_hash=fields.get("ovmf_hash"),
            vmm_type=fields.get("vmm_type", "QEMU"),
        )
    same = made.hex() == str(fields["expected_measurement"]).lower()
    return _verdicts(case, same, same, {"measurement": f"it is {made.hex()}"})


def _fields(case: Case, show: Callable[[Case], dict[str, Any]]) -> list[str]:
    wanted = case.get("fields") or {}
    if not wanted:
        return []
    try:
        shown = show(wanted)
    except EvidenceError as error:
        return [f"fields are stated, and the evidence can't be read: {error}"]
    return evidence_fields.compare(wanted, shown)


def unread_fields(case: Case) -> list[str]:
    """The names of the case's fields that no parser knows."""
    wanted = case.get("fields") or {}
    if not wanted or case["kind"] not in ("snp", "tdx"):
        return []
    shows: dict[str, Callable[[], dict[str, Any]]] = {
        "snp": lambda: evidence_fields.snp(*snp_parts(case)[:2], wanted),
        "tdx": lambda: evidence_fields.tdx(*tdx_parts(case)[:2]),
    }
    try:
        known = {evidence_fields.plain(name) for name in shows[case["kind"]]()}
    except (EvidenceError, OSError):
        return []
    return [name for name in wanted if evidence_fields.plain(name) not in known]


JUDGES: dict[str, Callable[[Case], list[str]]] = {"snp": _snp, "crl": _crl, "tdx": _tdx, "measure": _measure}
"""The kinds of cases that this verifier answers."""
