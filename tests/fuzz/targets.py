"""What is fuzzed: each parser of `cloister_attest`, and each appraisal of whole evidence, with seeds that are valid.

A parser may answer or raise the errors of its contract; anything else that it raises is a finding. An appraisal may
raise nothing and must judge every check itself; and it may accept nothing but the very statements of its seeds, for
everything else would be a forgery.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from pydantic import ValidationError

from cloister_attest.appraise import appraise
from cloister_attest.channel import make_server_identity
from cloister_attest.evidence import Evidence, EvidenceRecord
from cloister_attest.outcome import EvidenceError
from cloister_attest.policy import AttestationPolicy
from cloister_attest.result import Check
from cloister_attest.simulated import abi as simulated_abi
from cloister_attest.snp import abi as snp_abi
from cloister_attest.snp import verify as snp_verify
from cloister_attest.snp.appraise import appraise_snp
from cloister_attest.snp.certificate_table import ARK_GUID, ASK_GUID, VCEK_GUID, Collateral, parse_table, split_extended
from cloister_attest.snp.certificates import load_certificate, read_leaf
from cloister_attest.snp.policy import SnpPolicy
from cloister_attest.snp.products import PRODUCTS, decode_tcb
from cloister_attest.tdx import abi as tdx_abi
from cloister_attest.tdx import chain
from cloister_attest.tdx import collateral as pcs
from cloister_attest.tdx.appraise import appraise_tdx
from cloister_attest.tdx.extension import parse_extension
from cloister_attest.tdx.policy import TdxPolicy
from cloister_data.errors import ConfigurationError
from tests.cloister_attest import evidence
from tests.cloister_attest.snp import minted
from tests.cloister_attest.tdx import minting
from tests.fakes.attested_server import FakeMachine
from tests.fuzz import control

NONCE, NOW = bytes(range(32)), int(time.time())
REAL = 6
"""How many published machines of each kind seed the runs, where there are any."""


@dataclass(frozen=True)
class Target:
    """`run` raises for a finding alone; `seeds` are what the fuzzer begins with; no input is longer than `longest`."""

    run: Callable[[bytes], object]
    seeds: Callable[[], Sequence[bytes]]
    longest: int


def parser(parse: Callable[[bytes], object], *errors: type[Exception]) -> Callable[[bytes], None]:
    allowed = errors or (EvidenceError,)

    def run(data: bytes) -> None:
        with suppress(*allowed):
            parse(data)

    return run


def pack(parts: Sequence[bytes | None]) -> bytes:
    """Parts, each behind its length as u16 little-endian; None is 0xFFFF."""
    return b"".join(b"\xff\xff" if part is None else struct.pack("<H", len(part)) + part for part in parts)


def unpack(data: bytes, count: int) -> list[bytes | None]:
    parts: list[bytes | None] = []
    for _ in range(count):
        size = int.from_bytes(data[:2], "little")
        if size == 0xFFFF or len(data) < 2:
            parts.append(None)
            data = data[2:]
        else:
            parts.append(data[2 : 2 + size])
            data = data[2 + size :]
    return parts


SNP_MINTED = [minted.mint(minted.Recipe()), minted.mint(minted.Recipe(product="Turin", kind="VLEK", serial_zero=True))]
SNP_REAL = [evidence.snp_parts(case) for case in evidence.cases("snp") if case.get("default_policy") == "accept"][:REAL]
TDX_REAL = [evidence.tdx_parts(case) for case in evidence.cases("tdx") if case.get("default_policy") == "accept"][:REAL]
MACHINE, IDENTITY = FakeMachine(), make_server_identity()
SHOWN = MACHINE.evidence(IDENTITY.spki, NONCE)
TRUST = MACHINE.hardware.trust()


def snp_machines() -> list[tuple[bytes, Collateral, SnpPolicy, int]]:
    lenient = {"chips_allowed": "any", "masked_chip_id": "any", "vlek": "any", "products_allowed": "any"}
    lenient |= {"minimum_tcb": "any", "minimum_launch_tcb": "any"}
    made = [(one.report, one.collateral, minted.strict_policy(one, **lenient), minted.AT) for one in SNP_MINTED]
    return made + [(report, given, evidence.snp_policy(), at) for report, given, at in SNP_REAL]


def tdx_machines() -> list[tuple[bytes, pcs.Collateral, TdxPolicy, int]]:
    made = [(minting.quote(), minting.collateral(), minting.strict(), minting.AT)]
    return made + [(quote, given, evidence.tdx_policy(), at) for quote, given, at in TDX_REAL]


SNP, TDX = snp_machines(), tdx_machines()
SNP_STATEMENTS = {report[: snp_abi.SIGNED_BYTES] for report, *_ in SNP}
TDX_STATEMENTS = {tdx_abi.parse_quote(quote).signed for quote, *_ in TDX}


def judged(checks: Sequence[Check]) -> bool:
    """Whether the appraisal accepts; every check was judged, and not by accident."""
    accidents = [f"{check.name}: {check.reason}" for check in checks if "the check itself failed" in check.reason]
    assert not accidents, accidents
    return not [check for check in checks if check.verdict == "fail"]


def appraise_snp_input(data: bytes) -> bool:
    _, _, policy, at = SNP[(data[0] if data else 0) % len(SNP)]
    report, *certificates = unpack(data[1:], 5)
    expected = minted.REPORT_DATA if at == minted.AT else evidence.UNCHECKED
    checks = appraise_snp(report or b"", Collateral(*certificates), policy, expected_report_data=expected, at=at)
    accepted = judged(checks)
    assert not accepted or (report or b"")[: snp_abi.SIGNED_BYTES] in SNP_STATEMENTS, "a forged report is accepted"
    return accepted


def appraise_tdx_input(data: bytes) -> bool:
    _, _, policy, at = TDX[(data[0] if data else 0) % len(TDX)]
    quote, *pieces = unpack(data[1:], 7)
    try:
        given = pcs.Collateral(**dict(zip(evidence.PIECES, pieces, strict=True)))
    except ValidationError:
        return False
    try:
        parsed = tdx_abi.parse_quote(quote or b"")
        signed, expected = parsed.signed, parsed.report.report_data
    except EvidenceError:
        signed, expected = b"", bytes(64)
    accepted = judged(appraise_tdx(quote or b"", given, policy, expected, at))
    assert not accepted or signed in TDX_STATEMENTS, "a forged quote is accepted"
    return accepted


def appraise_simulated_input(data: bytes) -> bool:
    result = appraise(data, TRUST, certificate=IDENTITY.certificate_der, nonce=NONCE, at=NOW)
    accepted = judged(result.checks)
    assert not accepted or Evidence.from_json(data).report[:208] == SHOWN.report[:208], "forged evidence is accepted"
    return accepted


def read_tcbs(data: bytes) -> None:
    report = snp_abi.parse(data)
    for product in PRODUCTS:
        with suppress(EvidenceError):
            decode_tcb(report.reported_tcb, product)


def read_leaves(data: bytes) -> None:
    certificate = load_certificate(data, "leaf")
    for product in PRODUCTS:
        for kind in ("VCEK", "VLEK"):
            with suppress(EvidenceError):
                read_leaf(certificate, kind, product)


def read_document(data: bytes) -> None:
    for member, parse in (("tcbInfo", pcs.parse_tcb_info), ("enclaveIdentity", pcs.parse_qe_identity)):
        with suppress(EvidenceError):
            parse(pcs.parse_signed(data, member))


def table() -> bytes:
    given = SNP_MINTED[0].collateral
    entries = ((VCEK_GUID, given.leaf), (ASK_GUID, given.intermediate), (ARK_GUID, given.root))
    header, body = b"", b""
    for guid, value in entries:
        header += guid.bytes + struct.pack("<II", 24 * 4 + len(body), len(value or b""))
        body += value or b""
    return header + bytes(24) + body


def present(values: Sequence[bytes | None]) -> list[bytes]:
    return [value for value in values if value is not None]


SNP_CERTIFICATES = present([part for _, given, *_ in SNP for part in (given.leaf, given.intermediate, given.root)])
ROOT = load_certificate(SNP_MINTED[0].collateral.root, "root")

TARGETS: dict[str, Target] = {
    "snp-report": Target(parser(read_tcbs), lambda: [report for report, *_ in SNP], 1300),
    "snp-table": Target(parser(parse_table), lambda: [table()], 8192),
    "snp-extended": Target(parser(split_extended), lambda: [SNP[0][0] + table()], 8192),
    "snp-certificate": Target(parser(read_leaves), lambda: SNP_CERTIFICATES, 4096),
    "snp-crl": Target(
        parser(lambda data: snp_verify.verify_crl(data, ROOT, minted.AT)),
        lambda: present([given.crl for _, given, *_ in SNP]),
        4096,
    ),
    "tdx-quote": Target(parser(tdx_abi.parse_quote), lambda: [quote for quote, *_ in TDX], 8192),
    "tdx-chain": Target(
        parser(chain.verify_pck_chain), lambda: [tdx_abi.parse_quote(quote).pck_chain for quote, *_ in TDX], 8192
    ),
    "tdx-crl": Target(
        parser(lambda data: chain.verify_crl(data, minting.CA, (minting.PCK,), minting.AT, "it")),
        lambda: present([crl for _, given, *_ in TDX for crl in (given.pck_crl, given.root_crl)]),
        4096,
    ),
    "tdx-extension": Target(parser(parse_extension), lambda: [minting.sgx_extension()], 1024),
    "tdx-document": Target(
        parser(read_document),
        lambda: present([piece for _, given, *_ in TDX for piece in (given.tcb_info, given.qe_identity)]),
        8192,
    ),
    "simulated-report": Target(parser(simulated_abi.parse), lambda: [SHOWN.report], 400),
    "evidence-json": Target(
        parser(lambda data: (Evidence.from_json(data), EvidenceRecord.from_json(data)), ValidationError),
        lambda: [SHOWN.to_json()],
        8192,
    ),
    "trust-file": Target(
        parser(lambda data: AttestationPolicy.from_toml(data.decode("utf-8", "surrogateescape")), ConfigurationError),
        lambda: [TRUST.to_toml().encode(), b"[[[[a.b.c]]]]", b'a.b = {c = [1, 0x2, 1979-05-27, inf, """\\u00e9"""]}'],
        4096,
    ),
    "appraise-snp": Target(
        appraise_snp_input,
        lambda: [
            bytes([index]) + pack([report, given.leaf, given.intermediate, given.root, given.crl])
            for index, (report, given, *_) in enumerate(SNP)
        ],
        12_000,
    ),
    "appraise-tdx": Target(
        appraise_tdx_input,
        lambda: [
            bytes([index]) + pack([quote, *(getattr(given, name) for name in evidence.PIECES)])
            for index, (quote, given, *_) in enumerate(TDX)
        ],
        40_000,
    ),
    "appraise-simulated": Target(appraise_simulated_input, lambda: [SHOWN.to_json()], 8192),
}

CONTROL = Target(control.parse, lambda: [control.SEED], 64)
"""Target "control" of the command line: it must be found, and no plain run includes it."""
