"""Parsed evidence under the names, and in the forms, that manifests of evidence use."""

from __future__ import annotations

import dataclasses
from typing import Any

from cloister_attest.outcome import EvidenceError
from cloister_attest.snp import abi as snp_abi
from cloister_attest.snp import verify as snp_verify
from cloister_attest.snp.certificate_table import Collateral as SnpCollateral
from cloister_attest.snp.products import PRODUCTS, Product, decode_tcb
from cloister_attest.tdx import abi as tdx_abi
from cloister_attest.tdx import chain, validate
from cloister_attest.tdx import collateral as pcs
from cloister_attest.tdx import verify as tdx_verify
from cloister_attest.tdx.collateral import Collateral as TdxCollateral

GENOA_BY_OTHER_NAMES = {"bergamo": "genoa", "siena": "genoa"}
_TCB_NAMES = {"bl": "bootloader", "ucode": "microcode", "bootloader": "bootloader", "microcode": "microcode"}
SORTED = {"advisories", "advisoryids", "revoked"}


def plain(name: str) -> str:
    """A field's name without the spelling that manifests differ in."""
    return name.lower().replace("_", "").replace("-", "")


def compare(wanted: dict[str, Any], shown: dict[str, Any]) -> list[str]:
    """What `shown` says otherwise. Names that it doesn't have are passed over (see `evidence`)."""
    known = {plain(name): value for name, value in shown.items()}
    return [
        f"{name} is {value!r} in the manifest and {known[plain(name)]!r} here"
        for name, value in wanted.items()
        if plain(name) in known and not same(value, known[plain(name)], plain(name))
    ]


def same(wanted: Any, found: Any, name: str = "") -> bool:
    """Equal values: hex in either case, with or without 0x, a number as its hex, times with any UTC zone."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        renamed = {_TCB_NAMES.get(key, key): value for key, value in wanted.items()}
        return {key: value for key, value in renamed.items() if value is not None} == found
    if isinstance(wanted, list) and isinstance(found, list):
        if name in SORTED:
            wanted, found = sorted(wanted, key=str), sorted(found, key=str)
        return len(wanted) == len(found) and all(same(*pair) for pair in zip(wanted, found, strict=True))
    if isinstance(wanted, bool) or isinstance(found, bool) or wanted is None or found is None:
        return wanted is found
    if isinstance(found, int):
        try:
            return found == (wanted if isinstance(wanted, int) else int(wanted, 0))
        except ValueError:
            return False
    left, right = (str(value).lower().removeprefix("0x").replace("+00:00", "z") for value in (wanted, found))
    if name == "product":
        left = GENOA_BY_OTHER_NAMES.get(left.partition("-")[0], left.partition("-")[0])
    return left == right


def _parts(value: Any) -> dict[str, Any]:
    """Every field and property of a parsed object that is a number, bytes (as hex) or a word."""
    names = [field.name for field in dataclasses.fields(value)]
    names += [name for name in dir(type(value)) if isinstance(getattr(type(value), name), property)]
    found = {}
    for name in names:
        part = getattr(value, name)
        if isinstance(part, bytes):
            found[name] = part.hex()
        elif isinstance(part, int | str) or part is None:
            found[name] = part
    return found


def snp(report_bytes: bytes, collateral: SnpCollateral, wanted: dict[str, Any]) -> dict[str, Any]:
    """Raises EvidenceError where the report can't be read."""
    report = snp_abi.parse(report_bytes)
    product = report.product or _product(collateral, wanted)

    def tcb(raw: bytes) -> dict[str, int]:
        value = decode_tcb(raw, product)
        return {key: number for key, number in dataclasses.asdict(value).items() if number is not None}

    values: dict[str, Any] = {
        **{name: bit for name, bit in _parts(report.platform_info).items() if name != "raw"},
        # Where a platform's bit and the guest's have one name, the guest's policy has it.
        **{name: bit for name, bit in _parts(report.policy).items() if name != "raw"},
        **_parts(report),
        "report_version": report.version,
        "product": product,
        "policy": report.policy.raw,
        "smt_allowed": report.policy.smt,
        "platform_info": report.platform_info.raw,
        "current_version": str(report.current),
        "committed_version": str(report.committed),
    }
    for name in ("reported_tcb", "current_tcb", "committed_tcb", "launch_tcb"):
        values[name] = tcb(getattr(report, name))
    if report.cpuid is not None:
        values["cpuid_fam_mod_step"] = [report.cpuid.family, report.cpuid.model, report.cpuid.stepping]
    return values


def _product(collateral: SnpCollateral, wanted: dict[str, Any]) -> Product:
    # Before version 3 only the certificates say the product; without any the manifest's word stands.
    if collateral.root is not None:
        return snp_verify.read_chain(collateral).product
    named = str(wanted.get("product", "")).lower().partition("-")[0]
    named = GENOA_BY_OTHER_NAMES.get(named, named)
    for product in PRODUCTS:
        if product.lower() == named:
            return product
    raise EvidenceError("nothing says which product the report comes from")


def crl(found: snp_verify.RevocationList) -> dict[str, Any]:
    return {
        "revoked": sorted(found.revoked),
        "this_update": found.this_update.isoformat(),
        "next_update": found.next_update.isoformat(),
    }


def tdx(quote_bytes: bytes, collateral: TdxCollateral) -> dict[str, Any]:
    """Raises EvidenceError where the quote or its PCK chain can't be read."""
    quote = tdx_abi.parse_quote(quote_bytes)
    report = quote.report
    platform = chain.sgx_extension(chain.verify_pck_chain(quote.pck_chain))
    attributes = validate.number(report.td_attributes)
    values: dict[str, Any] = {
        **{f"qe_{name}": value for name, value in _parts(quote.qe_report).items()},
        **{name: value for name, value in _parts(quote).items() if name != "pck_chain"},
        **_parts(report),
        **_parts(platform),
        "mrtd": report.mr_td.hex(),
        "rtmr": [value.hex() for value in report.rtmr],
        **{f"rtmr{index}": value.hex() for index, value in enumerate(report.rtmr)},
        "td_attributes": attributes,
        "debug": bool(attributes & validate.ATTRIBUTE_DEBUG),
        "sept_ve_disable": bool(attributes & validate.ATTRIBUTE_SEPT_VE_DISABLE),
        "perfmon": bool(attributes & validate.ATTRIBUTE_PERFMON),
        "pks": bool(attributes & validate.ATTRIBUTE_PKS),
    }
    if collateral.tcb_info is not None:
        values |= _levels(report, platform, collateral.tcb_info)
    return values


def _levels(report: tdx_abi.TdReport, platform: Any, tcb_info: bytes) -> dict[str, Any]:
    """What Intel says of the levels; None where there is none, for then no answer can name one."""
    try:
        info = pcs.parse_tcb_info(pcs.parse_signed(tcb_info, "tcbInfo"))
        level, module = tdx_verify.platform_level(report, platform, info), tdx_verify.module_level(report, info)
    except EvidenceError:
        return dict.fromkeys(("tcb_status", "tdx_module_status", "advisories", "tcb_date"))
    return {
        "tcb_status": level.tcb_status,
        "tdx_module_status": module.tcb_status if module else None,
        "advisories": list(level.advisory_ids),
        "tcb_date": level.tcb_date,
    }
