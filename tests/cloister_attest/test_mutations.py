"""No bit of what somebody signed may change: not of a report, a quote, a certificate, a list, or a document.

A part is a run of bytes that a signature or a pin covers, or that is a signature. One bit of it is changed, everything
is appraised, and one of the checks that answer for the part must fail. The suite tries some bits of each part, spread
over all of it; CLOISTER_EXHAUSTIVE=1 tries every bit of every byte (`make long`).

ECDSA has one exception, which holds for every verifier: where (r, s) is a signature, so is (r, n - s). Two byte strings
then prove one statement. That forges nothing, so long as nobody takes the bytes' hash for the statement's identity, as
a replay cache would. Cloister takes it for that nowhere: freshness comes from the nonce within what is signed, and the
digest of evidence in receipts and in the audit log only names bytes, so other bytes are refused there. The
last tests show that no answer depends on which of the two came.
"""

from __future__ import annotations

import base64
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cloister_attest.appraise import appraise
from cloister_attest.channel import make_server_identity
from cloister_attest.result import Check
from cloister_attest.simulated import abi as simulated_abi
from cloister_attest.snp import abi as snp_abi
from cloister_attest.snp.appraise import appraise_snp
from cloister_attest.snp.certificate_table import Collateral as SnpCollateral
from cloister_attest.snp.policy import SnpPolicy
from cloister_attest.tdx import abi as tdx_abi
from cloister_attest.tdx import chain
from cloister_attest.tdx import collateral as pcs
from cloister_attest.tdx.appraise import appraise_tdx
from cloister_attest.tdx.collateral import Collateral as TdxCollateral
from cloister_attest.tdx.policy import TdxPolicy
from tests.cloister_attest import evidence
from tests.cloister_attest.snp.minted import AT, Recipe, mint, strict_policy
from tests.cloister_attest.tdx import minting
from tests.fakes.attested_server import FakeMachine

EXHAUSTIVE = os.environ.get("CLOISTER_EXHAUSTIVE") == "1"
SAMPLES = 12
P256_ORDER = int("FFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551", 16)


@dataclass(frozen=True)
class Snp:
    report: bytes
    collateral: SnpCollateral
    policy: SnpPolicy
    at: int

    def checks(self) -> tuple[Check, ...]:
        return appraise_snp(
            self.report, self.collateral, self.policy, expected_report_data=evidence.UNCHECKED, at=self.at
        )


@dataclass(frozen=True)
class Tdx:
    quote: bytes
    collateral: TdxCollateral
    policy: TdxPolicy
    at: int

    def checks(self) -> tuple[Check, ...]:
        data = tdx_abi.parse_quote(self.quote).report.report_data if self.quote else bytes(64)
        return appraise_tdx(self.quote, self.collateral, self.policy, data, self.at)

    def failed_over(self, quote: bytes) -> tuple[Check, ...]:
        # The report data expected are not those of the changed quote: the check that compares them isn't asked here.
        return appraise_tdx(quote, self.collateral, self.policy, bytes(64), self.at)


@dataclass(frozen=True)
class Part:
    """`checks` answer for it, at least one of them fails once it is changed; `harmless` masks say the same thing."""

    name: str
    content: bytes
    checks: frozenset[str]
    appraise: Callable[[bytes], tuple[Check, ...]]
    harmless: Callable[[bytes], bool] = lambda content: False


def failed(checks: tuple[Check, ...]) -> set[str]:
    assert not [check.reason for check in checks if "the check itself failed" in check.reason]
    return {check.name for check in checks if check.verdict == "fail"}


@cache
def snp(name: str) -> Snp:
    if name == "minted":
        minted = mint(Recipe())
        return Snp(minted.report, minted.collateral, strict_policy(minted), AT)
    (case,) = (case for case in evidence.cases("snp") if case["id"] == name)
    (crl,) = (case for case in evidence.cases("crl") if case["id"] == "crl/amd-milan-empty")
    report, given, _ = evidence.snp_parts(case)
    at = evidence.moment("2025-06-01T00:00:00Z")
    assert at is not None
    return Snp(report, replace(given, crl=evidence.der(crl, "crl")), evidence.snp_policy(crl="required"), at)


@cache
def tdx(name: str) -> Tdx:
    if name == "minted":
        return Tdx(minting.quote(), minting.collateral(), minting.strict(), minting.AT)
    (case,) = (case for case in evidence.cases("tdx") if case["id"] == name)
    quote, collateral, at = evidence.tdx_parts(case)
    start = len(tdx_abi.parse_quote(quote).signed)
    declared = int.from_bytes(quote[start : start + 4], "little")
    return Tdx(quote[: start + 4 + declared], collateral, evidence.tdx_policy(), at)


def snp_parts(name: str) -> Iterator[Part]:
    valid = snp(name)

    def piece(field: str, checks: set[str]) -> Part:
        content = getattr(valid.collateral, field)
        assert content is not None

        def appraise(changed: bytes) -> tuple[Check, ...]:
            return replace(valid, collateral=replace(valid.collateral, **{field: changed})).checks()

        return Part(field, content, frozenset(checks), appraise)

    yield Part(
        "report",
        valid.report,
        frozenset({"snp-format", "snp-signature"}),
        lambda changed: replace(valid, report=changed).checks(),
    )
    yield piece("leaf", {"snp-certificates", "snp-chain"})
    yield piece("intermediate", {"snp-certificates", "snp-chain"})
    yield piece("root", {"snp-certificates", "snp-root"})
    yield piece("crl", {"snp-revocation"})


def tdx_parts(name: str) -> Iterator[Part]:
    valid = tdx(name)
    parsed = tdx_abi.parse_quote(valid.quote)
    size = len(parsed.signed)
    start = valid.quote.index(parsed.pck_chain)
    auth = valid.quote.index(parsed.qe_report_signature) + tdx_abi.SIGNATURE_BYTES
    whole = valid.quote

    def within(title: str, begin: int, end: int, *checks: str) -> Part:
        return Part(
            title,
            whole[begin:end],
            frozenset(checks),
            lambda changed: valid.failed_over(whole[:begin] + changed + whole[end:]),
        )

    body = size - len(body_of(parsed))
    key = size + 4
    report = auth - tdx_abi.SIGNATURE_BYTES - tdx_abi.QE_REPORT_BYTES
    yield within("header", 0, body, "tdx-format", "tdx-signature")
    yield within("body", body, size, "tdx-signature")
    yield within("signature length", size, key, "tdx-format")
    yield within("signature", key, key + 64, "tdx-signature")
    yield within("attestation key", key + 64, key + 128, "tdx-signature", "tdx-qe-binding")
    yield within("certification header", key + 128, report, "tdx-format")
    yield within("qe report", report, report + tdx_abi.QE_REPORT_BYTES, "tdx-qe-report")
    yield within("qe report signature", report + tdx_abi.QE_REPORT_BYTES, auth, "tdx-qe-report")
    yield within("auth data", auth, start, "tdx-format", "tdx-qe-binding")
    for index, certificate in enumerate(chain.load_pem(parsed.pck_chain, "chain")):
        yield certificate_part(valid, parsed.pck_chain, index, certificate)
    for piece, member in (("tcb_info", "tcbInfo"), ("qe_identity", "enclaveIdentity")):
        check = f"tdx-{piece.replace('_', '-')}-signature"
        yield document_part(valid, piece, member, check)
        for index, certificate in enumerate(chain.load_pem(getattr(valid.collateral, f"{piece}_chain"), "chain")):
            yield signer_part(valid, f"{piece}_chain", index, certificate, check)
    for piece in ("root_crl", "pck_crl"):
        yield Part(
            piece, getattr(valid.collateral, piece), frozenset({"tdx-" + piece.replace("_", "-")}), given(valid, piece)
        )


def body_of(parsed: tdx_abi.Quote) -> bytes:
    size = tdx_abi.TD_10_BYTES if parsed.body_type == tdx_abi.BODY_TD_10 else tdx_abi.TD_15_BYTES
    return parsed.signed[-size:]


def given(valid: Tdx, piece: str) -> Callable[[bytes], tuple[Check, ...]]:
    def appraise(changed: bytes) -> tuple[Check, ...]:
        return replace(valid, collateral=valid.collateral.model_copy(update={piece: changed})).checks()

    return appraise


def pem_with(pem: bytes, index: int, der: bytes) -> bytes:
    """The chain with one certificate replaced."""
    ders = [found.public_bytes(Encoding.DER) for found in chain.load_pem(pem, "chain")]
    ders[index] = der
    return b"".join(
        b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(each) + b"-----END CERTIFICATE-----\n" for each in ders
    )


def with_pck_chain(quote: bytes, pem: bytes) -> bytes:
    """The quote with another PEM chain and the lengths that belong to it, none of which is signed."""
    old = tdx_abi.parse_quote(quote)
    size, start = len(old.signed), quote.index(old.pck_chain)
    longer = len(pem) - len(old.pck_chain)
    raw = bytearray(quote[:start] + pem)
    for offset in (size, size + 4 + 128 + 2, start - 4):
        raw[offset : offset + 4] = (int.from_bytes(raw[offset : offset + 4], "little") + longer).to_bytes(4, "little")
    return bytes(raw)


def certificate_part(valid: Tdx, pem: bytes, index: int, certificate: x509.Certificate) -> Part:
    def appraise(changed: bytes) -> tuple[Check, ...]:
        return valid.failed_over(with_pck_chain(valid.quote, pem_with(pem, index, changed)))

    der = certificate.public_bytes(Encoding.DER)
    return Part(f"pck chain {index}", der, frozenset({"tdx-pck-chain", "tdx-root"}), appraise)


def signer_part(valid: Tdx, piece: str, index: int, certificate: x509.Certificate, check: str) -> Part:
    def appraise(changed: bytes) -> tuple[Check, ...]:
        return given(valid, piece)(pem_with(getattr(valid.collateral, piece), index, changed))

    return Part(f"{piece} {index}", certificate.public_bytes(Encoding.DER), frozenset({check}), appraise)


def document_part(valid: Tdx, piece: str, member: str, check: str) -> Part:
    raw = getattr(valid.collateral, piece)
    signature = pcs.parse_signed(raw, member).signature

    def harmless(changed: bytes) -> bool:
        # A hex digit of the signature in the other case is the same digit; white space around members says nothing.
        try:
            same = pcs.parse_signed(changed, member)
        except Exception:
            return False
        return same.signature == signature and same.body == pcs.parse_signed(raw, member).body

    return Part(piece, raw, frozenset({check}), given(valid, piece), harmless)


REAL_SNP, REAL_TDX = ("snp/milan-v3-oak-kernel",), ("tdx/v4-phala-uptodate", "tdx/v5-google")
PARTS = {
    "snp": ("report", "leaf", "intermediate", "root", "crl"),
    "tdx": (
        "header", "body", "signature length", "signature", "attestation key", "certification header", "qe report",
        "qe report signature", "auth data", "pck chain 0", "pck chain 1", "pck chain 2", "tcb_info", "tcb_info_chain 0",
        "tcb_info_chain 1", "qe_identity", "qe_identity_chain 0", "qe_identity_chain 1", "root_crl", "pck_crl",
    ),
}  # fmt: skip


def vectors() -> list[tuple[str, str, str]]:
    ids = {case["id"] for case in evidence.all_cases()}
    found = [("snp", "minted"), ("tdx", "minted")]
    found += [("snp", name) for name in REAL_SNP if name in ids] + [("tdx", name) for name in REAL_TDX if name in ids]
    return [(kind, name, part) for kind, name in found for part in PARTS[kind]]


@cache
def parts(kind: str, name: str) -> dict[str, Part]:
    return {part.name: part for part in (snp_parts(name) if kind == "snp" else tdx_parts(name))}


def bits(size: int, seed: str) -> Iterator[tuple[int, int]]:
    """Positions and masks: all of them, or some in each stretch of the part."""
    if EXHAUSTIVE:
        yield from ((position, 1 << bit) for position in range(size) for bit in range(8))
        return
    chosen = random.Random(seed)
    for index in range(min(SAMPLES, size)):
        stretch = range(index * size // min(SAMPLES, size), (index + 1) * size // min(SAMPLES, size))
        yield chosen.choice(stretch), 1 << chosen.randrange(8)


@pytest.mark.parametrize(("kind", "name", "part"), vectors())
@pytest.mark.timeout(0 if EXHAUSTIVE else 300)
def test_no_bit_may_change(kind: str, name: str, part: str) -> None:
    assert tuple(parts(kind, name)) == PARTS[kind]
    found = parts(kind, name)[part]
    missed = []
    for position, mask in bits(len(found.content), f"{kind} {name} {part}"):
        changed = bytearray(found.content)
        changed[position] ^= mask
        if not failed(found.appraise(bytes(changed))) & found.checks and not found.harmless(bytes(changed)):
            missed.append((position, hex(mask)))
    assert missed == []


@pytest.mark.parametrize(("kind", "name"), sorted({(kind, name) for kind, name, _ in vectors()}))
def test_unchanged_parts_pass(kind: str, name: str) -> None:
    """Without which the test above would be true of a verifier that refuses everything."""
    assert failed((snp(name) if kind == "snp" else tdx(name)).checks()) == set()
    for part in parts(kind, name).values():
        assert not failed(part.appraise(part.content)) & part.checks, part.name


def other_s(signature: bytes) -> bytes:
    """(r, n - s) for (r, s), both of 32 bytes."""
    return signature[:32] + (P256_ORDER - int.from_bytes(signature[32:], "big")).to_bytes(32, "big")


def told(checks: tuple[Check, ...]) -> list[tuple[Any, ...]]:
    return [(check.name, check.verdict, check.reason) for check in checks]


@pytest.mark.parametrize("name", [name for kind, name, part in vectors() if (kind, part) == ("snp", "report")])
def test_the_other_s_of_a_report_gives_the_same_answer(name: str) -> None:
    valid = snp(name)
    s = snp_abi.P384_ORDER - snp_abi.parse(valid.report).s
    other = bytearray(valid.report)
    other[0x2E8 : 0x2E8 + 72] = s.to_bytes(72, "little")
    assert bytes(other) != valid.report
    assert told(replace(valid, report=bytes(other)).checks()) == told(valid.checks())


@pytest.mark.parametrize("name", [name for kind, name, part in vectors() if (kind, part) == ("tdx", "body")])
def test_the_other_s_of_a_quote_and_of_documents_gives_the_same_answer(name: str) -> None:
    valid = tdx(name)
    parsed = tdx_abi.parse_quote(valid.quote)
    quote = valid.quote
    for signature in (parsed.signature, parsed.qe_report_signature):
        quote = quote.replace(signature, other_s(signature), 1)
    pieces = {}
    for piece, member in (("tcb_info", "tcbInfo"), ("qe_identity", "enclaveIdentity")):
        raw = getattr(valid.collateral, piece)
        old = pcs.parse_signed(raw, member).signature
        pieces[piece] = _replaced(raw, old, other_s(old))
    other = replace(valid, quote=quote, collateral=valid.collateral.model_copy(update=pieces))
    assert other != valid
    assert told(other.checks()) == told(valid.checks())


def test_the_other_s_of_a_simulated_report_gives_the_same_answer() -> None:
    identity, machine, nonce = make_server_identity(), FakeMachine(), bytes(range(32))
    shown = machine.evidence(identity.spki, nonce)
    s = snp_abi.P384_ORDER - simulated_abi.parse(shown.report).s
    other = shown.model_copy(update={"report": shown.report[:-48] + s.to_bytes(48, "big")})
    first, second = (
        appraise(each, machine.hardware.trust(), certificate=identity.certificate_der, nonce=nonce, at=int(time.time()))
        for each in (shown, other)
    )
    assert first.ok
    assert first.model_copy(update={"verified_at": second.verified_at}) == second
    assert shown.digest() != other.digest()


def _replaced(raw: bytes, old: bytes, new: bytes) -> bytes:
    for form in (old.hex(), old.hex().upper()):
        if form.encode() in raw:
            return raw.replace(form.encode(), new.hex().encode(), 1)
    raise AssertionError("the document doesn't hold its signature in one case")


def test_a_certificate_that_cryptography_warns_about_is_judged_all_the_same() -> None:
    """A country of other length, a number that isn't positive: no warning leaves, and one of its checks fails."""
    for name, old, new in (
        ("intermediate", b"\x06\x03U\x04\x06\x13\x02US", b"\x06\x03U\x04\x0a\x13\x02US"),
        ("intermediate", b"\x06\x03U\x04\x0b", b"\x06\x03U\x04\x06"),
        ("root", b"\x06\x03U\x04\x0b", b"\x06\x03U\x04\x06"),
        ("intermediate", b"\x02\x03\x01\x00\x01", b"\x02\x03\x81\x00\x01"),
        ("root", b"\x02\x03\x01\x00\x00", b"\x02\x03\x81\x00\x00"),
    ):
        part = parts("snp", "minted")[name]
        assert old in part.content, (name, old)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert failed(part.appraise(part.content.replace(old, new, 1))) & part.checks
        assert not seen
