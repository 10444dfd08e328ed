"""`cloister attest fetch-collateral`: from the makers' services, from files, for evidence in every form."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cloister import profile
from cloister_attest.collateral.store import CollateralStore
from cloister_attest.evidence import Evidence, EvidenceRecord
from tests.cloister_attest.collateral.pieces import (
    SNP_AT,
    TDX_AT,
    as_pem,
    days,
    root_crl,
    snp,
    snp_items,
    tcb_info,
    tdx_items,
)
from tests.cloister_attest.snp import minted as amd
from tests.cloister_attest.tdx import minting as intel
from tests.cloister_cli.conftest import Run
from tests.fakes.attested_server import AttestedServer, FakeMachine
from tests.fakes.publishers import Answer, Publishers, issuer_chain, publishers

CHAIN = issuer_chain(intel.pem(intel.TCB_SIGNER, intel.ROOT))
VCEK = f"/vcek/v1/Genoa/{'63' * 64}?blSPL=4&teeSPL=1&snpSPL=24&ucodeSPL=219"
TCB = "/tdx/certification/v4/tcb?fmspc=90c06f000000"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLOISTER_HOME", str(tmp_path / "laptop"))
    return tmp_path / "laptop"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    found = SimpleNamespace(now=SNP_AT, time=lambda: found.now)
    monkeypatch.setattr("cloister_cli.attest_collateral.time", found)
    return found


@pytest.fixture
def served() -> Iterator[Publishers]:
    with publishers() as found:
        vcek, ask, ark, crl = snp_items()
        root, pck, tcb, qe = tdx_items()
        found.publish(VCEK, vcek.content)
        found.publish("/vcek/v1/Genoa/cert_chain", as_pem(ask.content, ark.content))
        found.publish("/vcek/v1/Genoa/crl", crl.content)
        found.publish(TCB, tcb.content, TCB_Info_Issuer_Chain=CHAIN)
        found.publish("/tdx/certification/v4/qe/identity", qe.content, SGX_Enclave_Identity_Issuer_Chain=CHAIN)
        found.publish("/sgx/certification/v4/pckcrl?ca=platform&encoding=der", pck.content)
        found.publish("/sgx/certification/v4/rootcacrl", root.content.hex().encode())
        yield found


@pytest.fixture
def report(tmp_path: Path) -> str:
    (tmp_path / "report.bin").write_bytes(snp().report)
    return str(tmp_path / "report.bin")


@pytest.fixture
def quote(tmp_path: Path) -> str:
    (tmp_path / "quote.bin").write_bytes(intel.quote())
    return str(tmp_path / "quote.bin")


def evidence(platform: Any, report: bytes, certificates: tuple[bytes, ...] = ()) -> Evidence:
    return Evidence(platform=platform, report=report, certificates=certificates, checkpoint="", log_key=bytes(32))


def test_a_report_s_pieces_are_fetched_kept_and_listed(
    run: Run, served: Publishers, clock: SimpleNamespace, report: str, home: Path
) -> None:
    done = run("attest", "fetch-collateral", report, "--amd", served.url)
    assert done.returncode == 0, done.stderr
    assert set(CollateralStore(home / "collateral").read_all()) == set(snp_items())
    assert len(done.stderr.strip().splitlines()) == 4
    assert "valid until 2025-07-01" in done.stderr
    assert f"{served.url}/vcek/v1/Genoa/crl, stored" in done.stderr
    assert "amd-vcek" in done.stdout
    assert str(home / "collateral") in done.stdout

    # Certificates are not asked for twice; lists are.
    served.asked.clear()
    again = json.loads(run("attest", "fetch-collateral", report, "--amd", served.url, "--json").stdout)
    assert served.asked == ["/vcek/v1/Genoa/crl"]
    assert again["failed"] == []
    assert {piece["outcome"] for piece in again["pieces"]} == {"already here"}

    listed = json.loads(run("attest", "fetch-collateral", "--list", "--json").stdout)["pieces"]
    assert {piece["kind"]: piece["state"] for piece in listed}["amd-crl"] == "valid"
    clock.now += 20 * 86400
    shown = run("attest", "fetch-collateral", "--list")
    assert shown.returncode == 0
    assert [line for line in shown.stdout.splitlines() if "EXPIRED" in line and "amd-crl" in line]
    assert "amd-ark   Genoa" in shown.stdout


def test_a_quote_s_pieces_come_from_a_caching_service(
    run: Run, served: Publishers, clock: SimpleNamespace, quote: str, tmp_path: Path
) -> None:
    clock.now = TDX_AT
    done = run("attest", "fetch-collateral", quote, "--intel", served.url, "--to", str(tmp_path / "c"), "--json")
    assert done.returncode == 0, done.stderr
    assert set(CollateralStore(tmp_path / "c").read_all()) == set(tdx_items())
    assert {piece["valid_until"] for piece in json.loads(done.stdout)["pieces"]} == {"2026-03-15T00:00:00Z"}


def test_a_missing_piece_is_status_1_and_the_others_are_kept(
    run: Run, served: Publishers, clock: SimpleNamespace, report: str, home: Path
) -> None:
    served.answers[VCEK] = Answer(status=429, headers={"retry-after": "9"})
    done = run("attest", "fetch-collateral", report, "--amd", served.url)
    assert done.returncode == 1
    assert "Missing: VCEK of the Genoa chip" in done.stdout
    assert "Wait 9 seconds" in done.stdout
    assert len(CollateralStore(home / "collateral").read_all()) == 3


def test_an_expired_answer_is_as_good_as_missing(
    run: Run, served: Publishers, clock: SimpleNamespace, quote: str
) -> None:
    clock.now = TDX_AT + 30 * 86400
    done = run("attest", "fetch-collateral", quote, "--intel", served.url, "--json")
    assert done.returncode == 1
    assert all("expired" in each["why"] for each in json.loads(done.stdout)["failed"])


def test_a_mirror_can_t_set_the_store_back(
    run: Run, served: Publishers, clock: SimpleNamespace, quote: str, home: Path
) -> None:
    clock.now = TDX_AT
    newer = tcb_info(intel.BEGIN + days(5), intel.END + days(5), 19, intel.pem(intel.TCB_SIGNER, intel.ROOT))
    store = CollateralStore(home / "collateral")
    store.put(newer, "x", TDX_AT)
    done = run("attest", "fetch-collateral", quote, "--intel", served.url)
    assert done.returncode == 0
    assert "a later one is here" in done.stdout
    assert newer in store.read_all()


def test_a_damaged_piece_is_named_and_fetched_again(
    run: Run, served: Publishers, clock: SimpleNamespace, report: str, home: Path
) -> None:
    run("attest", "fetch-collateral", report, "--amd", served.url)
    (damaged,) = (home / "collateral").glob("amd-vcek*")
    damaged.write_bytes(b"{}")
    listed = run("attest", "fetch-collateral", "--list")
    assert listed.returncode == 1
    assert damaged.name in listed.stderr
    done = run("attest", "fetch-collateral", report, "--amd", served.url)
    assert done.returncode == 0
    assert "replaced a damaged one" in done.stdout


def test_without_a_network_the_files_are_taken_and_the_addresses_of_the_rest_are_told(
    run: Run, clock: SimpleNamespace, quote: str, tmp_path: Path
) -> None:
    clock.now = TDX_AT
    folder = tmp_path / "downloaded"
    folder.mkdir()
    empty = run("attest", "fetch-collateral", quote, "--from", str(folder), "--json")
    assert empty.returncode == 1
    wanted = [each["url"] for each in json.loads(empty.stdout)["failed"]]
    assert "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der" in wanted
    assert len(wanted) == 4

    root, pck, tcb, qe = tdx_items()
    for name, content in {
        "IntelSGXRootCA.der": root.content,
        "pckcrl": pck.content,
        "tcb": tcb.content,
        "identity": qe.content,
        "headers.txt": b"HTTP/2 200\r\ntcb-info-issuer-chain: " + CHAIN.encode() + b"\r\n\r\n",
        "notes.txt": b"fetched on a train",
        # What an attacker, or an old copy, could bring along is no better than it was.
        "older": root_crl(intel.BEGIN - days(9), intel.END).content,
    }.items():
        (folder / name).write_bytes(content)
    done = run("attest", "fetch-collateral", quote, "--from", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "notes.txt: passed over" in done.stderr
    kept = run("attest", "fetch-collateral", "--list", "--json").stdout
    assert {piece["source"] for piece in json.loads(kept)["pieces"]} == {
        "IntelSGXRootCA.der", "pckcrl", "tcb", "identity",
    }  # fmt: skip
    # A file that was named must be something.
    named = run("attest", "fetch-collateral", quote, "--from", str(folder / "notes.txt"))
    assert named.returncode == 1
    assert "neither a certificate" in named.stdout
    absent = run("attest", "fetch-collateral", quote, "--from", str(folder / "absent"))
    assert absent.returncode == 1
    assert "There is no file" in absent.stderr


def test_files_can_be_kept_without_evidence(run: Run, clock: SimpleNamespace, tmp_path: Path, home: Path) -> None:
    bundle = tmp_path / "cert_chain"
    bundle.write_bytes(as_pem(snp_items()[1].content, snp_items()[2].content))
    assert run("attest", "fetch-collateral", "--from", str(bundle)).returncode == 0
    assert set(CollateralStore(home / "collateral").read_all()) == set(snp_items()[1:3])


def test_a_file_may_have_a_name_that_is_no_text(run: Run, clock: SimpleNamespace, tmp_path: Path) -> None:
    crl = snp_items()[3]
    (tmp_path / os.fsdecode(b"\xff\x1b[31m.der")).write_bytes(crl.content)
    done = run("attest", "fetch-collateral", "--from", str(tmp_path), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["pieces"][0]["source"] == "\N{REPLACEMENT CHARACTER}\x1b[31m.der"
    assert "\x1b" not in done.stdout + done.stderr


def test_evidence_in_every_form(run: Run, served: Publishers, clock: SimpleNamespace, tmp_path: Path) -> None:
    made = snp()
    assert made.collateral.leaf
    shown = evidence("sev-snp", made.report, (made.collateral.leaf,))
    record = EvidenceRecord(evidence=shown, nonce=bytes(32), certificate=b"x")
    table = amd_table(made.collateral.leaf)
    forms = {"evidence.json": shown.to_json(), "record.json": record.to_json(), "extended.bin": made.report + table}
    for name, content in forms.items():
        (tmp_path / name).write_bytes(content)
        served.asked.clear()
        done = run(
            "attest", "fetch-collateral", str(tmp_path / name), "--amd", served.url, "--to", str(tmp_path / f"{name}.d")
        )
        assert done.returncode == 0, (name, done.stderr)
        assert served.asked == ["/vcek/v1/Genoa/cert_chain", "/vcek/v1/Genoa/crl"]
    for content in (b"", b"hello", b"{}", made.report[:-1]):
        (tmp_path / "wrong").write_bytes(content)
        done = run("attest", "fetch-collateral", str(tmp_path / "wrong"), "--amd", served.url)
        assert done.returncode == 1
        assert "wrong" in done.stderr


def amd_table(leaf: bytes) -> bytes:
    from cloister_attest.snp.certificate_table import VCEK_GUID

    entry = VCEK_GUID.bytes + (48).to_bytes(4, "little") + len(leaf).to_bytes(4, "little")
    return entry + bytes(24) + leaf


def test_a_version_2_report_needs_its_product(
    run: Run, served: Publishers, clock: SimpleNamespace, tmp_path: Path
) -> None:
    (tmp_path / "old.bin").write_bytes(snp("Milan", version=2).report)
    vcek, ask, ark, crl = snp_items("Milan", version=2)
    served.publish(VCEK.replace("Genoa", "Milan"), vcek.content)
    served.publish("/vcek/v1/Milan/cert_chain", as_pem(ask.content, ark.content))
    served.publish("/vcek/v1/Milan/crl", crl.content)
    done = run("attest", "fetch-collateral", str(tmp_path / "old.bin"), "--amd", served.url)
    assert done.returncode == 1
    assert "name the product (Milan, Genoa, Turin)" in done.stdout
    for product, status in (("Milan", 0), ("Rome", 2)):
        done = run("attest", "fetch-collateral", str(tmp_path / "old.bin"), "--amd", served.url, "--product", product)
        assert done.returncode == status


def test_what_only_the_host_has_is_said(run: Run, clock: SimpleNamespace, tmp_path: Path) -> None:
    masked = amd.mint(amd.Recipe(patch={0x1A0: bytes(64)}))
    (tmp_path / "masked.bin").write_bytes(masked.report)
    done = run("attest", "fetch-collateral", str(tmp_path / "masked.bin"))
    assert done.returncode == 1
    assert "only the provider's host" in done.stdout


def test_a_wrong_command_line_is_status_2_and_a_wrong_address_1(run: Run, report: str) -> None:
    assert run("attest", "fetch-collateral").returncode == 2
    done = run("attest", "fetch-collateral", report, "--amd", "http://kds.example")
    assert done.returncode == 1
    assert "https://" in done.stderr
    assert run("attest", "fetch-collateral", "nothing-of-that-name").returncode == 1


def test_a_running_cloister_is_asked_and_nothing_is_believed_or_told(
    run: Run, served: Publishers, clock: SimpleNamespace, tmp_path: Path
) -> None:
    """A machine that no trust file accepts is asked all the same: with a nonce, and with nothing of the profile."""
    shown = evidence("sev-snp", snp().report)
    with AttestedServer(answer=lambda _: shown) as machine:
        known = profile.new("clinic", machine.url, tmp_path / "no-trust.toml", "ann")
        known.save()
        (known.directory / "token.json").write_text('{"token": "very-secret"}')
        for where in (machine.url, "clinic"):
            done = run("attest", "fetch-collateral", where, "--amd", served.url)
            assert done.returncode == 0, done.stderr
        assert len(set(machine.nonces)) == 2
        assert b"POST /.well-known/attest" in machine.received
        for word in (b"secret", b"ann", b"uthorization"):
            assert word not in machine.received
        machine.answer = lambda _: b"\x1b[2Jnonsense"
        done = run("attest", "fetch-collateral", machine.url)
        assert done.returncode == 1
        assert "shows no evidence" in done.stderr
        assert "nonsense" not in done.stderr


def test_simulated_hardware_needs_none(run: Run, clock: SimpleNamespace) -> None:
    with AttestedServer(FakeMachine()) as machine:
        done = run("attest", "fetch-collateral", machine.url)
    assert done.returncode == 0
    assert "simulated" in done.stderr
    assert "Nothing is needed" in done.stdout
