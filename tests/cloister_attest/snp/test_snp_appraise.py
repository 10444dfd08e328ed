"""One report that a strict policy accepts, and the same with one thing changed: exactly its check fails."""

from __future__ import annotations

import json
import threading
import tomllib
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, padding

from cloister_attest.result import Check
from cloister_attest.snp.appraise import ReportDataUnchecked, appraise_snp
from cloister_attest.snp.certificate_table import Collateral
from cloister_attest.snp.explain import SNP_CHECKS
from cloister_attest.snp.policy import MinimumAbi, MinimumFirmware, MinimumTcb, PlatformRequirements, SnpPolicy
from cloister_attest.snp.products import PRODUCTS, Product
from tests.cloister_attest.snp.minted import (
    AT,
    CSP_ID,
    HWID,
    ISSUER_SERIAL,
    POLICY_BITS,
    REPORT_DATA,
    ROOT_SERIAL,
    TCB,
    Minted,
    Recipe,
    mint,
    pss,
    strict_policy,
)

DAY = 24 * 3600


@cache
def plain() -> Minted:
    return mint(Recipe())


def appraised(minted: Minted, policy: SnpPolicy, *, at: int = AT, expected: Any = REPORT_DATA) -> tuple[Check, ...]:
    checks = appraise_snp(minted.report, minted.collateral, policy, expected_report_data=expected, at=at)
    assert [check.name for check in checks] == list(SNP_CHECKS)
    return checks


def failed(checks: tuple[Check, ...]) -> set[str]:
    assert all(check.reason for check in checks)
    return {check.name for check in checks if check.verdict == "fail"}


def test_a_strict_policy_accepts_the_report_and_passes_over_nothing_but_the_intermediate() -> None:
    checks = appraised(plain(), strict_policy(plain()))
    assert {check.name: check.verdict for check in checks if check.verdict != "pass"} == {
        "snp-intermediate": "not-applicable"
    }


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_every_version_of_every_product_is_accepted(version: int, product: Product) -> None:
    minted = mint(Recipe(version=version, product=product, serial_zero=True))
    policy = strict_policy(minted, product, **({} if version == 5 else {"mitigations": "any"}))
    assert failed(appraised(minted, policy)) == set()


def bits(clear: int = 0, add: int = 0) -> dict[int, bytes]:
    return {0x08: (POLICY_BITS & ~clear | add).to_bytes(8, "little")}


def lower(at: int) -> bytes:
    raw = bytearray(TCB["Genoa"])
    raw[at] -= 1
    return bytes(raw)


HIGHER = bytes((4, 1, 0, 0, 0, 0, 24, 220))

MINTED_OTHERWISE: list[tuple[str, Recipe]] = [
    ("snp-chain", Recipe(leaf_by_root=True)),
    ("snp-chain", Recipe(leaf_padding=pss(32))),
    ("snp-chain", Recipe(leaf_padding=padding.PKCS1v15())),
    ("snp-roles", Recipe(leaf_authority=True)),
    ("snp-roles", Recipe(leaf_critical=True)),
    ("snp-roles", Recipe(organization="Advanced Micro Device")),
    ("snp-roles", Recipe(issuer_authority=False)),
    ("snp-revocation", Recipe(revoked=(ISSUER_SERIAL,))),
    ("snp-revocation", Recipe(revoked=(ROOT_SERIAL,))),
    ("snp-revocation", Recipe(crl=False)),
    ("snp-revocation", Recipe(crl_by_issuer=True)),
    ("snp-revocation", Recipe(crl_days=11)),
    ("snp-revocation", Recipe(crl_days=-11)),
    ("snp-signing-key", Recipe(patch={0x48: b"\x05"})),
    ("snp-signing-key", Recipe(patch={0x48: b"\x1d"})),
    ("snp-signing-key", Recipe(patch={0x48: b"\x03"})),
    ("snp-signing-key", Recipe(issuer_prefix="SEV-VLEK-")),
    ("snp-product", Recipe(patch={0x188: b"\x19\x01\x01"})),
    ("snp-product", Recipe(product_name="Milan-B0")),
    ("snp-product", Recipe(issuer_product="Milan")),
    ("snp-signer-tcb", Recipe(leaf_tcb=HIGHER)),
    ("snp-signature", Recipe(damage={0x2A0: b"\x01\x02\x03"})),
    ("snp-signature", Recipe(damage={0x140: b"q"})),
    ("snp-measurement", Recipe(patch={0x90: b"n"})),
    ("snp-debug", Recipe(patch=bits(add=1 << 19))),
    ("snp-migrate-ma", Recipe(patch=bits(add=1 << 18))),
    ("snp-smt", Recipe(patch=bits(clear=1 << 16))),
    ("snp-single-socket", Recipe(patch=bits(clear=1 << 20))),
    ("snp-cxl-allow", Recipe(patch=bits(clear=1 << 21))),
    ("snp-mem-aes-256-xts", Recipe(patch=bits(clear=1 << 22))),
    ("snp-rapl-dis", Recipe(patch=bits(clear=1 << 23))),
    ("snp-ciphertext-hiding", Recipe(patch=bits(clear=1 << 24))),
    ("snp-page-swap-disable", Recipe(patch=bits(clear=1 << 25))),
    ("snp-abi", Recipe(patch=bits(clear=1))),
    ("snp-vmpl", Recipe(patch={0x30: b"\x01"})),
    ("snp-vmpl", Recipe(patch={0x30: b"\xff\xff\xff\xff"})),
    ("snp-host-data", Recipe(patch={0xC0: b"i"})),
    ("snp-id-key", Recipe(patch={0xE0: b"j"})),
    ("snp-author-key", Recipe(patch={0x110: b"b"})),
    ("snp-author-key", Recipe(patch={0x48: b"\x00"})),
    ("snp-family-id", Recipe(patch={0x10: b"e"})),
    ("snp-image-id", Recipe(patch={0x20: b"e"})),
    ("snp-guest-svn", Recipe(patch={0x04: b"\x06"})),
    ("snp-minimum-tcb", Recipe(patch={0x180: lower(6)}, leaf_tcb=lower(6))),
    ("snp-minimum-tcb", Recipe(patch={0x180: lower(0)}, leaf_tcb=lower(0))),
    ("snp-launch-tcb", Recipe(patch={0x1F0: lower(7)})),
    ("snp-committed", Recipe(patch={0x1E0: lower(7)})),
    ("snp-committed", Recipe(patch={0x1E8: b"\x2c"})),
    ("snp-minimum-firmware", Recipe(patch={0x1E8: b"\x2a\x37\x01\x00\x2a\x37\x01"})),
    ("snp-minimum-firmware", Recipe(patch={0x1E8: b"\xff\x36\x01\x00\xff\x36\x01"})),
    ("snp-minimum-firmware", Recipe(patch={0x1E8: b"\xff\xff\x00\x00\xff\xff\x00"})),
    ("snp-mitigations", Recipe(patch={0x1F8: b"\x01"})),
    ("snp-mitigations", Recipe(patch={0x200: b"\x02"})),
    ("snp-platform-smt", Recipe(patch={0x40: b"\xbe"})),
    ("snp-platform-tsme", Recipe(patch={0x40: b"\xbd"})),
    ("snp-platform-ecc", Recipe(patch={0x40: b"\xbb"})),
    ("snp-platform-rapl", Recipe(patch={0x40: b"\xb7"})),
    ("snp-platform-ciphertext-hiding", Recipe(patch={0x40: b"\xaf"})),
    ("snp-platform-alias-check", Recipe(patch={0x40: b"\x9f"})),
    ("snp-platform-tio", Recipe(patch={0x40: b"\x3f"})),
    ("snp-masked-chip", Recipe(patch={0x1A0: bytes(64)})),
]


@pytest.mark.parametrize(
    ("name", "recipe"), MINTED_OTHERWISE, ids=[f"{i}-{name}" for i, (name, _) in enumerate(MINTED_OTHERWISE)]
)
def test_one_change_fails_exactly_its_check(name: str, recipe: Recipe) -> None:
    minted = mint(recipe)
    assert failed(appraised(minted, strict_policy(minted))) == {name}


MILAN_MINIMUM = MinimumTcb(product="Milan", fmc="absent", bootloader=0, tee=0, snp=0, microcode=0)

JUDGED_OTHERWISE: list[tuple[str, dict[str, Any]]] = [
    ("snp-root", {"roots": ("0" * 64,)}),
    ("snp-root", {"roots": "vendor"}),
    ("snp-intermediate", {"intermediates": "known"}),
    ("snp-smt", {"smt": "forbidden"}),
    (
        "snp-minimum-tcb",
        {"minimum_tcb": (MinimumTcb(product="Milan", fmc="absent", bootloader=0, tee=0, snp=0, microcode=0),)},
    ),
    ("snp-abi", {"minimum_abi": MinimumAbi(major=3, minor=0)}),
    ("snp-minimum-firmware", {"minimum_firmware": MinimumFirmware(major=1, minor=55, build=44)}),
    ("snp-minimum-firmware", {"minimum_firmware": MinimumFirmware(major=2, minor=0, build=0)}),
    ("snp-product-admitted", {"products_allowed": ("Milan", "Turin")}),
    ("snp-product-admitted", {"products_denied": ("Genoa",)}),
    ("snp-chip-admitted", {"chips_allowed": ("0" * 128,)}),
    ("snp-chip-admitted", {"chips_denied": (HWID["Genoa"].hex(),)}),
]


@pytest.mark.parametrize(
    ("name", "changes"), JUDGED_OTHERWISE, ids=[f"{i}-{name}" for i, (name, _) in enumerate(JUDGED_OTHERWISE)]
)
def test_another_policy_fails_exactly_its_check(name: str, changes: dict[str, Any]) -> None:
    assert failed(appraised(plain(), strict_policy(plain(), **changes))) == {name}


def test_every_check_can_fail() -> None:
    covered = {name for name, _ in (*MINTED_OTHERWISE, *JUDGED_OTHERWISE)}
    elsewhere = {
        "snp-format",
        "snp-certificates",
        "snp-dates",
        "snp-chip",
        "snp-report-data",
        "snp-tcb-order",
        "snp-vlek",
    }
    assert covered | elsewhere == set(SNP_CHECKS)
    assert not covered & elsewhere


def test_certificates_hold_in_their_time_alone() -> None:
    policy = strict_policy(plain(), crl="any")
    assert failed(appraised(plain(), policy, at=AT - 29 * DAY)) == set()
    for at in (AT - 31 * DAY, AT + 31 * DAY):
        assert failed(appraised(plain(), policy, at=at)) == {"snp-dates"}


def test_report_data_is_compared_or_goes_unchecked_for_a_reason() -> None:
    policy = strict_policy(plain())
    for expected in (bytes(64), REPORT_DATA[:63], REPORT_DATA + b"\0", b""):
        assert failed(appraised(plain(), policy, expected=expected)) == {"snp-report-data"}
    checks = appraised(plain(), policy, expected=ReportDataUnchecked("it binds the claims, which are compared"))
    (check,) = [check for check in checks if check.name == "snp-report-data"]
    assert (check.verdict, check.reason) == ("not-applicable", "it binds the claims, which are compared")
    with pytest.raises(ValueError, match="reason"):
        ReportDataUnchecked(" ")


def test_another_chip_fails_the_chip_and_its_admission() -> None:
    minted = mint(Recipe(hwid=b"d" * 64))
    assert failed(appraised(minted, strict_policy(minted))) == {"snp-chip", "snp-chip-admitted"}
    assert failed(appraised(minted, strict_policy(minted, chips_allowed="any"))) == {"snp-chip"}


def test_newer_firmware_that_is_not_committed_does_not_count() -> None:
    """The host goes back to what is committed whenever it likes."""
    minted = mint(Recipe(patch={0x1E8: b"\xff\x37\x01\x00\x2a\x37\x01"}))
    policy = strict_policy(minted, provisional_firmware="any")
    assert failed(appraised(minted, policy)) == {"snp-minimum-firmware"}
    assert failed(appraised(minted, strict_policy(minted, minimum_firmware="any"))) == {"snp-committed"}


def test_a_turin_chip_is_eight_bytes_and_zeros() -> None:
    minted = mint(Recipe(product="Turin", patch={0x1A8: b"\x01"}))
    assert failed(appraised(minted, strict_policy(minted, "Turin", chips_allowed="any"))) == {"snp-chip"}


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_hardware_id_may_be_an_octet_string(product: Product) -> None:
    wrapped = bytes((4, len(HWID[product]))) + HWID[product]
    minted = mint(Recipe(product=product, hwid=wrapped))
    assert failed(appraised(minted, strict_policy(minted, product))) == set()


def test_a_masked_report_of_a_chip_key_comes_from_its_chip() -> None:
    minted = mint(Recipe(patch={0x1A0: bytes(64)}))
    assert failed(appraised(minted, strict_policy(minted, masked_chip_id="any"))) == set()
    denied = strict_policy(minted, masked_chip_id="any", chips_allowed="any", chips_denied=(HWID["Genoa"].hex(),))
    assert failed(appraised(minted, denied)) == {"snp-chip-admitted"}


def test_a_providers_key_is_accepted_where_the_policy_names_the_provider() -> None:
    minted = mint(Recipe(kind="VLEK"))
    chips: dict[str, Any] = {"chips_allowed": "any", "masked_chip_id": "any"}
    assert failed(appraised(minted, strict_policy(minted, vlek=(CSP_ID,), **chips))) == set()
    assert failed(appraised(minted, strict_policy(minted, vlek="any", **chips))) == set()
    for vlek in ("forbidden", ("CN=other.example",)):
        assert failed(appraised(minted, strict_policy(minted, vlek=vlek, **chips))) == {"snp-vlek"}
    assert failed(appraised(minted, strict_policy(minted, vlek="any", chips_allowed="any"))) == {"snp-masked-chip"}
    for named in ({"chips_allowed": ("0" * 128,)}, {"chips_denied": ("1" * 128,)}):
        policy = strict_policy(minted, vlek="any", **(chips | named))
        assert failed(appraised(minted, policy)) == {"snp-chip-admitted"}


def test_a_providers_key_can_not_stand_in_a_chips_place() -> None:
    report, vlek = mint(Recipe()).report, mint(Recipe(kind="VLEK")).collateral
    minted = Minted(report, vlek)
    assert {"snp-signing-key", "snp-signature", "snp-vlek"} <= failed(appraised(minted, strict_policy(minted)))


def test_versions_that_contradict_each_other_are_refused() -> None:
    minted = mint(Recipe(patch={0x180: HIGHER}, leaf_tcb=HIGHER))
    assert failed(appraised(minted, strict_policy(minted))) == {"snp-tcb-order"}
    minted = mint(Recipe(patch={0x1E0: HIGHER}))
    assert failed(appraised(minted, strict_policy(minted, provisional_firmware="any"))) == {"snp-tcb-order"}


def test_a_leaf_on_another_curve_is_refused() -> None:
    minted = mint(Recipe(leaf_curve=ec.SECP256R1()))
    assert failed(appraised(minted, strict_policy(minted))) == {"snp-roles", "snp-signature"}


def test_checks_without_ground_fail() -> None:
    policy = strict_policy(plain())
    unread = failed(appraised(replace(plain(), report=plain().report[:-1]), policy))
    assert set(SNP_CHECKS) - unread == {
        "snp-certificates",
        "snp-root",
        "snp-chain",
        "snp-roles",
        "snp-dates",
        "snp-revocation",
        "snp-intermediate",
        "snp-product-admitted",
        "snp-vlek",
    }
    for part in ("leaf", "intermediate", "root"):
        for value in (None, b"", b"\x30\x00", bytes(20_000)):
            collateral = replace(plain().collateral, **{part: value})
            checks = failed(appraised(Minted(plain().report, collateral), policy))
            assert {"snp-certificates", "snp-root", "snp-chain", "snp-signature", "snp-chip"} <= checks
    nothing = failed(appraised(Minted(b"", Collateral()), policy))
    assert set(SNP_CHECKS) - nothing == {"snp-intermediate"}


def test_a_policy_that_demands_nothing_says_so_of_every_check() -> None:
    platform = dict.fromkeys(PlatformRequirements.model_fields, "any")
    fields = dict.fromkeys(SnpPolicy.model_fields, "any")
    policy = SnpPolicy.from_json(
        SnpPolicy.model_validate(
            fields
            | {
                "platform": "sev-snp",
                "roots": (plain().root_digest,),
                "platform_info": PlatformRequirements.model_validate(platform),
                "products_denied": (),
                "chips_denied": (),
            }
        ).to_json()
    )
    checks = {check.name: check for check in appraised(plain(), policy)}
    assert {name for name, check in checks.items() if check.verdict == "not-applicable"} >= {
        "snp-measurement",
        "snp-debug",
        "snp-minimum-tcb",
        "snp-platform-smt",
        "snp-chip-admitted",
    }
    assert not failed(tuple(checks.values()))


@pytest.mark.parametrize("name", SnpPolicy.model_fields)
def test_a_policy_names_every_field(name: str) -> None:
    values = dict(strict_policy(plain()))
    del values[name]
    with pytest.raises(ValueError, match=name):
        SnpPolicy.model_validate(values)


@pytest.mark.parametrize(
    "changes",
    [
        {"unknown": 1},
        {"roots": "any"},
        {"roots": ()},
        {"measurements": ()},
        {"measurements": None},
        {"vmpl": "0"},
        {"vmpl": 4},
        {"debug": False},
        {"minimum_tcb": (MILAN_MINIMUM, MILAN_MINIMUM)},
    ],
)
def test_a_policy_of_another_form_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        SnpPolicy.model_validate(dict(strict_policy(plain())) | changes)


@pytest.mark.parametrize(("product", "fmc"), [("Turin", "absent"), ("Milan", 0), ("Genoa", 0)])
def test_a_minimum_has_the_components_of_its_product(product: Product, fmc: Any) -> None:
    with pytest.raises(ValueError, match="fmc"):
        MinimumTcb(product=product, fmc=fmc, bootloader=0, tee=0, snp=0, microcode=0)


def test_a_policy_can_be_written_as_toml() -> None:
    policy = strict_policy(plain())
    text = "\n".join(lines("", policy.model_dump(mode="json")))
    assert SnpPolicy.from_json(json.dumps(tomllib.loads(text))) == policy


def lines(key: str, value: Any) -> list[str]:
    """`value` in TOML, with dotted keys; lists of tables as inline tables. TOML has no null."""
    if isinstance(value, dict):
        return [line for name, inner in value.items() for line in lines(f"{key}.{name}" if key else name, inner)]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        tables = [", ".join(f"{name} = {json.dumps(inner)}" for name, inner in item.items()) for item in value]
        return [f"{key} = [{', '.join('{' + table + '}' for table in tables)}]"]
    return [f"{key} = {json.dumps(value)}"]


def test_threads_may_appraise_at_the_same_time() -> None:
    minted = mint(Recipe(serial_zero=True))
    policy, answers = strict_policy(minted), []

    def appraise() -> None:
        answers.extend(failed(appraised(minted, policy)) for _ in range(10))

    threads = [threading.Thread(target=appraise) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [set()] * 40
