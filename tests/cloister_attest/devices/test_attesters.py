"""Real machines as attesters, on recorded devices: what they collect, a client's verifier accepts."""

from __future__ import annotations

import json
import os
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from cloister_attest import collect
from cloister_attest.collect import attester_for
from cloister_attest.devices import hardware
from cloister_attest.devices.hardware import (
    SnpHardware,
    SnpThroughTsm,
    TdxHardware,
    check_tdx_source,
    find_snp_source,
)
from cloister_attest.devices.sev_guest import SevGuestDevice
from cloister_attest.devices.tsm import TsmReports
from cloister_attest.policy import AttestationPolicy
from cloister_attest.snp import abi as snp
from cloister_attest.snp.appraise import appraise_snp
from cloister_attest.snp.certificate_table import ARK_GUID, ASK_GUID, VCEK_GUID, VLEK_GUID, Collateral
from cloister_attest.tdx import abi as tdx
from cloister_attest.tdx.appraise import appraise_tdx
from cloister_data.errors import ConfigurationError, UnavailableError
from tests.cloister_attest.devices.recorded import (
    ASKED,
    FakeConfigfs,
    FakeSevGuest,
    certificate_table,
    snp_machine,
    snp_report,
    tdx_quote,
)
from tests.cloister_attest.policies import SNP_POLICY
from tests.cloister_attest.snp.minted import AT, REPORT_DATA, Recipe, mint, strict_policy
from tests.cloister_attest.tdx import minting

EVIDENCE = Path(os.environ.get("CLOISTER_EVIDENCE", Path(__file__).parents[4] / "shared" / "evidence"))
WRITERS = AttestationPolicy(format=2, publisher="none", gpu="any", log_key="any", log_origin="any", hardware=SNP_POLICY)


def through_tsm(files: FakeConfigfs) -> SnpHardware:
    return SnpHardware(SnpThroughTsm(TsmReports(files)), WRITERS)


def snp_on(table: bytes, make_report=snp_report) -> SnpHardware:
    return through_tsm(FakeConfigfs(make_report=make_report, auxblob=table))


def tdx_on(make_report=tdx_quote) -> TdxHardware:
    return TdxHardware(TsmReports(FakeConfigfs("tdx_guest", make_report)), WRITERS)


@pytest.fixture
def device(tmp_path) -> Path:
    path = tmp_path / "sev-guest"
    path.write_bytes(b"")
    return path


@pytest.mark.parametrize("way", ["configfs-TSM", "/dev/sev-guest"])
@pytest.mark.parametrize("kind", ["VCEK", "VLEK"])
def test_a_strict_client_accepts_what_an_snp_machine_collects(way, kind, device):
    # The host has the other kind of leaf in its table too, as a host that changed over would.
    minted = mint(Recipe(kind=kind, patch={0x50: ASKED}))
    chain = minted.collateral
    ours, other = (VCEK_GUID, VLEK_GUID) if kind == "VCEK" else (VLEK_GUID, VCEK_GUID)
    table = certificate_table(
        {ASK_GUID: chain.intermediate, other: b"another leaf", ours: chain.leaf, ARK_GUID: chain.root}
    )

    def make_report(data: bytes, level: int) -> bytes:
        assert (data, level) == (ASKED, 0)
        return minted.report

    if way == "configfs-TSM":
        machine = snp_on(table, make_report)
    else:
        machine = SnpHardware(SevGuestDevice(device, FakeSevGuest(make_report, table).ioctl), WRITERS)
    report, certificates = machine.collect(ASKED)
    assert (machine.platform, machine.writers()) == ("sev-snp", WRITERS)
    assert certificates == (chain.leaf, chain.intermediate, chain.root)
    changes = {} if kind == "VCEK" else {"vlek": "any", "masked_chip_id": "any", "chips_allowed": "any"}
    collateral = Collateral.from_certificates(certificates, minted.collateral.crl)
    checks = appraise_snp(report, collateral, strict_policy(minted, **changes), expected_report_data=ASKED, at=AT)
    assert [check for check in checks if check.verdict == "fail"] == []
    stale = appraise_snp(report, collateral, strict_policy(minted, **changes), expected_report_data=REPORT_DATA, at=AT)
    assert [check.name for check in stale if check.verdict == "fail"] == ["snp-report-data"]


def test_a_strict_client_accepts_what_a_tdx_machine_collects():
    machine = tdx_on(lambda data, level: tdx_quote(data) + bytes(3000))
    quote, certificates = machine.collect(ASKED)
    assert (machine.platform, machine.writers(), certificates) == ("tdx", WRITERS, ())
    # ECDSA signatures differ from one to the next, and not in their length.
    assert len(quote) == len(tdx_quote(ASKED))
    checks = appraise_tdx(quote, minting.collateral(), minting.strict(), ASKED, minting.AT)
    assert [check for check in checks if check.verdict == "fail"] == []
    stale = appraise_tdx(quote, minting.collateral(), minting.strict(), REPORT_DATA, minting.AT)
    assert [check.name for check in stale if check.verdict == "fail"] == ["tdx-report-data"]


@pytest.mark.parametrize("entries", [(), (ASK_GUID, ARK_GUID), (VCEK_GUID,), (VCEK_GUID, ARK_GUID), (VLEK_GUID,)])
def test_certificates_end_at_the_first_that_the_host_does_not_supply(entries):
    _, certificates = snp_on(certificate_table({guid: guid.bytes for guid in entries})).collect(ASKED)
    assert certificates == ((VCEK_GUID.bytes,) if VCEK_GUID in entries else ())


def test_certificates_in_pem_are_handed_on_in_der():
    chain = snp_machine().collateral
    text = ssl.DER_cert_to_PEM_cert(chain.leaf).encode()
    _, certificates = snp_on(certificate_table({VCEK_GUID: text + b"\0", ASK_GUID: chain.intermediate})).collect(ASKED)
    assert certificates == (chain.leaf, chain.intermediate)
    for wrong in (text + text, text[:-30], b"-----BEGIN CERTIFICATE-----\n\xff\n-----END CERTIFICATE-----\n"):
        with pytest.raises(UnavailableError, match=r"PEM|several"):
            snp_on(certificate_table({VCEK_GUID: wrong})).collect(ASKED)


def test_a_table_that_cannot_be_read():
    with pytest.raises(UnavailableError, match="table of certificates"):
        snp_on(certificate_table({VCEK_GUID: b"leaf"})[:-1]).collect(ASKED)


def test_a_certificate_over_the_evidences_bound():
    with pytest.raises(UnavailableError, match="more than 16384 bytes"):
        snp_on(certificate_table({VCEK_GUID: bytes(1) * 16385})).collect(ASKED)


@pytest.mark.parametrize("length", [1, 1183, 1185, 4000])
def test_an_snp_report_of_another_length(length):
    with pytest.raises(UnavailableError, match=f"the report has {length} bytes instead of 1184"):
        snp_on(b"", lambda data, level: snp_report(data).ljust(length, b"\0")[:length]).collect(ASKED)


@pytest.mark.parametrize("keep", [1, 60, 2000])
def test_a_quote_that_ends_early(keep):
    with pytest.raises(UnavailableError, match="quote that can't be used"):
        tdx_on(lambda data, level: tdx_quote(data)[:keep]).collect(ASKED)


def test_a_quote_that_other_bytes_follow():
    with pytest.raises(UnavailableError, match="aren't zero"):
        tdx_on(lambda data, level: tdx_quote(data) + b"\0\1").collect(ASKED)


@pytest.mark.parametrize(
    "machine",
    [snp_on(b"", lambda data, level: snp_report(bytes(64))), tdx_on(lambda data, level: tdx_quote(bytes(64)))],
    ids=["sev-snp", "tdx"],
)
def test_a_report_over_other_data_is_not_handed_on(machine):
    with pytest.raises(UnavailableError, match="other report data"):
        machine.collect(ASKED)


@pytest.mark.parametrize("machine", [snp_on(b""), tdx_on()], ids=["sev-snp", "tdx"])
def test_only_64_bytes_are_asked_for(machine):
    with pytest.raises(ValueError, match="65 bytes where 64 belong"):
        machine.collect(bytes(65))


def questions() -> list[bytes]:
    return [bytes([number]) * 64 for number in range(1, 9)]


@pytest.mark.parametrize("way", ["sev-snp", "tdx", "/dev/sev-guest"])
def test_callers_take_turns_and_each_gets_its_own_report(way, device):
    if way == "/dev/sev-guest":
        # It fails where two of its calls overlap.
        files, fake = None, FakeSevGuest()
        machine = SnpHardware(SevGuestDevice(device, fake.ioctl), WRITERS)
    elif way == "sev-snp":
        files = FakeConfigfs(seconds=0.005)
        machine = through_tsm(files)
    else:
        files = FakeConfigfs("tdx_guest", tdx_quote, seconds=0.005)
        machine = TdxHardware(TsmReports(files), WRITERS)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(machine.collect, questions()))
    parse = tdx.parse_quote if way == "tdx" else snp.parse
    parsed = [parse(report) for report, _ in found]
    assert [(report.report if way == "tdx" else report).report_data for report in parsed] == questions()
    assert files is None or (files.most_at_once, files.requests) == (1, {})


def test_without_turns_the_callers_overlap():
    """The control of the test above."""
    files = FakeConfigfs(seconds=0.05)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(partial(TsmReports(files).report, provider="sev_guest"), questions()))
    assert files.most_at_once > 1


def test_a_caller_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(hardware, "TURN_SECONDS", 0.01)
    inside, leave = threading.Event(), threading.Event()

    def slow(data: bytes, level: int) -> bytes:
        inside.set()
        leave.wait(5)
        return snp_report(data)

    machine = snp_on(b"", slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(machine.collect, ASKED)
        inside.wait(5)
        with pytest.raises(UnavailableError, match="earlier request hasn't ended"):
            machine.collect(ASKED)
        leave.set()
        assert first.result()[0] == snp_report(ASKED)
    assert machine.collect(ASKED)[0] == snp_report(ASKED)


def test_a_machine_that_failed_can_be_asked_again():
    files = FakeConfigfs(failures={("read", "outblob"): [5]})
    machine = through_tsm(files)
    with pytest.raises(UnavailableError, match="EIO"):
        machine.collect(ASKED)
    assert not files.requests
    assert machine.collect(ASKED)[0] == snp_report(ASKED)


def test_configfs_tsm_is_preferred_where_it_serves_snp(device):
    assert isinstance(find_snp_source(TsmReports(FakeConfigfs()), device), SnpThroughTsm)
    for files in (FakeConfigfs(mounted=False), FakeConfigfs(None), FakeConfigfs("other")):
        assert isinstance(find_snp_source(TsmReports(files), device), SevGuestDevice)
        with pytest.raises(ConfigurationError):
            find_snp_source(TsmReports(files), device.with_name("absent"))


@pytest.mark.parametrize("files", [FakeConfigfs(mounted=False), FakeConfigfs(None)], ids=["no configfs", "no driver"])
def test_the_tdx_device_alone_does_not_do(files):
    with pytest.raises(ConfigurationError, match=r"TDREPORTs.*6\.7 or later.*quote generation service"):
        check_tdx_source(TsmReports(files))


def test_an_snp_machine_is_no_tdx_machine():
    with pytest.raises(ConfigurationError, match="'sev_guest' instead of 'tdx_guest'"):
        check_tdx_source(TsmReports(FakeConfigfs()))


@pytest.mark.parametrize(("platform", "provider"), [("sev-snp", "sev_guest"), ("tdx", "tdx_guest")])
def test_the_attester_of_a_real_platform(platform, provider, tmp_path, monkeypatch):
    absent = tmp_path / "absent"
    monkeypatch.setitem(collect._DEVICES, platform, (absent,))
    with pytest.raises(ConfigurationError, match=f"can't make {platform} evidence"):
        attester_for(platform, tmp_path, WRITERS)
    monkeypatch.setitem(collect._DEVICES, platform, (absent, tmp_path))
    with pytest.raises(ConfigurationError, match="must name a trust file: trust = "):
        attester_for(platform, tmp_path, None)
    make_report = snp_report if platform == "sev-snp" else tdx_quote
    monkeypatch.setattr(hardware, "ConfigfsFiles", lambda: FakeConfigfs(provider, make_report))
    attester = attester_for(platform, tmp_path, WRITERS)
    assert (attester.platform, attester.writers()) == (platform, WRITERS)
    assert attester.collect(ASKED)[1] == ()


def cases(kind: str, *parts: str) -> list:
    manifest = EVIDENCE / "manifest.json"
    if not manifest.is_file():
        reason = f"there is no evidence in {EVIDENCE}: set CLOISTER_EVIDENCE"
        return [pytest.param({}, id="absent", marks=pytest.mark.skip(reason=reason))]
    found = [case for case in json.loads(manifest.read_bytes())["cases"] if case["kind"] == kind]
    real = [case for case in found if case["crypto"] == "ok" and all(part in case["files"] for part in parts)]
    return [pytest.param(case, id=case["id"]) for case in real]


def read(case: dict, name: str) -> bytes:
    return (EVIDENCE / case["files"][name]).read_bytes()


@pytest.mark.parametrize("way", ["configfs-TSM", "/dev/sev-guest"])
@pytest.mark.parametrize("case", cases("snp", "leaf", "intermediate", "root"))
def test_a_real_report_passes_through_unchanged(case, way, device):
    report, chain = read(case, "report"), tuple(read(case, name) for name in ("leaf", "intermediate", "root"))
    parsed = snp.parse(report)
    leaf = VLEK_GUID if parsed.signing_key == "VLEK" else VCEK_GUID
    table = certificate_table(dict(zip((leaf, ASK_GUID, ARK_GUID), chain, strict=True)))

    def recorded(data: bytes, level: int) -> bytes:
        assert data == parsed.report_data
        return report

    if way == "configfs-TSM":
        machine = snp_on(table, recorded)
    else:
        machine = SnpHardware(SevGuestDevice(device, FakeSevGuest(recorded, table).ioctl), WRITERS)
    assert machine.collect(parsed.report_data) == (report, chain)


@pytest.mark.parametrize("case", cases("tdx"))
def test_a_real_quote_is_cut_to_its_length(case):
    raw = read(case, "quote")
    parsed = tdx.parse_quote(raw)
    for padded in (raw, raw + bytes(100)):
        quote, certificates = tdx_on(lambda data, level, padded=padded: padded).collect(parsed.report.report_data)
        assert tdx.parse_quote(quote) == parsed
        assert (raw.startswith(quote), any(raw[len(quote) :]), certificates) == (True, False, ())
        with pytest.raises(UnavailableError, match="ends within"):
            tdx_on(lambda data, level, quote=quote: quote[:-1]).collect(parsed.report.report_data)
