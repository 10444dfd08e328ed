"""A guard on SEV-SNP and on TDX, with minted makers: what it shows, what it demands of itself, whose keys open data."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import cloister.profile
import cloister.session
import cloister_guard.guard
from cloister_attest.appraise import appraise
from cloister_attest.channel import pinned_context
from cloister_attest.collateral.offline import identify
from cloister_attest.evidence import AttestRequest, EvidenceRecord
from cloister_attest.policy import AttestationPolicy
from cloister_attest.reference_values import Publisher, ReferenceValues, SnpImage, sign_reference_values
from cloister_budget.clock import SteadyClock
from cloister_data.consistency import ConsistencyRequest
from cloister_data.datasets import DatasetList, Declaration
from cloister_data.errors import (
    AttestationRefusedError,
    ConfigurationError,
    ConflictError,
    StorageError,
    UnavailableError,
)
from cloister_data.framing import pack_body
from cloister_data.owner import public_bytes, sign_policy
from cloister_guard.config import GuardConfig
from cloister_guard.datasets.keys import KeyRing, NoMachineKey
from cloister_guard.guard import EVIDENCE_AT_ONCE, EVIDENCE_WAITING, Guard
from cloister_guard.identity import Caller
from tests.cloister_attest.policies import SNP_POLICY, TDX_POLICY
from tests.cloister_attest.snp.minted import ISSUER_SERIAL, mint
from tests.fakes import witnesses
from tests.fakes.data import PEOPLE, people
from tests.fakes.real_machines import DAY, NOW, Site, SnpMachine, TdxMachine, add_owner, keep, site, trust
from tests.fakes.running import make_policy

NONCE = bytes(range(32))
OLD, NEW = b"1" * 48, b"2" * 48
PUBLISHER = Ed25519PrivateKey.from_private_bytes(bytes(32))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """SEV-SNP, with AMD's list at hand."""
    with site(tmp_path, SnpMachine(), monkeypatch) as found:
        found.machine.publish(found.collateral)
        yield found


def failed(guard: Guard, policy: AttestationPolicy) -> list[str]:
    """The checks that fail for a client that trusts by `policy`."""
    shown = guard.evidence.answer(NONCE)
    certificate = guard.evidence.identity.certificate_der
    verdict = appraise(shown.to_json(), policy, certificate=certificate, nonce=NONCE, at=int(time.time()))
    return [check.name for check in verdict.failed]


def open_session(url: str, policy: AttestationPolicy, base: Path, name: str) -> cloister.session.Session:
    path = base / f"{name}.toml"
    path.write_text(policy.to_toml())
    return cloister.session.open(cloister.profile.new(name, url, path, name), need_token=False)


def body(dataset: str) -> bytes:
    key = Ed25519PrivateKey.generate()
    declaration = Declaration(
        dataset=dataset, population=dataset, data_schema=PEOPLE, data_format="csv", owner_key=public_bytes(key),
        policy=sign_policy(make_policy(dataset, {"ada": 5.0}, platforms=("sev-snp",)), key),
    )  # fmt: skip
    return pack_body(declaration.to_json(), people(20).to_csv(index=False).encode())


def test_clients_believe_it_and_owners_with_a_witness_alone_can_upload(place: Site) -> None:
    policy = trust(place.machine.hardware())
    with place.serving() as (guard, running):
        with open_session(running.url, policy, place.base, "good") as session:
            assert session.verdict.ok
            assert session.verdict.platform == "sev-snp"
        with pytest.raises(AttestationRefusedError, match="snp-measurement"):
            open_session(running.url, trust(place.machine.hardware(measurements=("00" * 48,))), place.base, "other")

        add_owner(guard, "open")
        with pytest.raises(ConflictError, match="no witness"):
            guard.catalogue.upload(Caller("open", "owner"), body("open/people"))
        assert list((place.base / "state" / "data").iterdir()) == []
        assert not (place.base / "state" / "master.key").exists()

        witnesses.init(running, "clinic")
        owner = running.session("clinic")
        with witnesses.serving(owner.profile):
            witnesses.until(lambda: witnesses.view(owner).unlocked)
            running.upload("clinic/people", people(20), PEOPLE, make_policy("clinic/people", {"ada": 5.0}))
        (view,) = owner.transport.call("GET", "/datasets", None, DatasetList).datasets
        assert (view.name, view.simulated, view.witness) == ("clinic/people", False, True)
        assert not (place.base / "state" / "master.key").exists()


def test_who_trusts_another_machine_refuses_it(place: Site) -> None:
    good = trust(place.machine.hardware())
    with place.started() as guard:
        assert failed(guard, good) == []
        assert failed(guard, good.demanding(measurements=(OLD.hex(),))) == ["snp-measurement"]
        assert failed(guard, good.demanding(roots=("00" * 32,))) == ["snp-root"]
        # What is published while the guard runs goes along with its next answer.
        place.machine.publish(place.collateral, revoked=(ISSUER_SERIAL,), crl_days=1)
        assert failed(guard, good) == ["snp-revocation"]
        for path in place.collateral.glob("amd-crl*"):
            path.unlink()
        assert failed(guard, good) == ["snp-revocation"]


def test_damaged_collateral_is_for_the_guards_own_log(place: Site) -> None:
    with place.started() as guard:
        (path,) = place.collateral.glob("amd-crl*")
        path.write_text("{}")
        with pytest.raises(UnavailableError) as caught:
            guard.evidence.answer(NONCE)
        assert str(place.base) not in str(caught.value)


def refused_start(place: Site, says: str) -> str:
    guard = place.guard()
    try:
        with pytest.raises(ConfigurationError, match=says) as caught:
            guard.recover()
        with guard.database.read() as session:
            assert guard.journal.last_key(session) is None
    finally:
        guard.database.close()
    return str(caught.value)


def test_a_machine_that_its_own_trust_file_refuses_does_not_start(place: Site) -> None:
    good = trust(place.machine.hardware())
    for change, says in (({"measurements": (OLD.hex(),)}, "snp-measurement"), ({"roots": ("00" * 32,)}, "snp-root")):
        place.write_trust(good.demanding(**change))
        refused_start(place, says)
    place.write_trust(good)
    with place.started():
        pass


def test_a_start_without_collateral_says_what_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with site(tmp_path, SnpMachine(), monkeypatch) as place:
        text = refused_start(place, "snp-revocation")
        assert "https://kdsintf.amd.com/vcek/v1/Genoa/crl" in text
        # And what the command that fetches it takes.
        record = place.base / "state" / "refused-evidence.json"
        assert str(record) in text
        assert EvidenceRecord.from_json(record.read_bytes()).evidence.platform == "sev-snp"


def test_a_revoked_machine_does_not_start(place: Site) -> None:
    place.machine.publish(place.collateral, revoked=(ISSUER_SERIAL,), crl_days=1)
    refused_start(place, "snp-revocation")


@pytest.mark.parametrize("after", [20, 50])
def test_what_lapses_before_a_start_is_judged_again_keeps_it_from_being_written(
    place: Site, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """A leaf's time is coarse, and the next guard judges this start as of the minute's end: none may lock it out."""
    at = int(NOW.timestamp()) // 60 * 60 + 10
    monkeypatch.setattr(cloister_guard.guard, "steady_time", SteadyClock(lambda: at))
    assert isinstance(place.machine, SnpMachine)
    place.machine.recipe = replace(place.machine.recipe, now=datetime.fromtimestamp(at + after, UTC) - 10 * DAY)
    for path in place.collateral.glob("amd-crl*"):
        path.unlink()
    place.machine.publish(place.collateral)
    place.write_trust(trust(place.machine.hardware()))
    if after == 20:
        refused_start(place, "snp-revocation")
    else:
        with place.started():
            pass


def test_a_later_guard_vouches_for_an_earlier_start_with_what_it_holds(place: Site) -> None:
    with place.started() as guard:
        first = guard.evidence.start_digest
    for path in place.collateral.glob("amd-crl*"):
        path.unlink()
    place.machine.publish(place.collateral, crl_days=1)
    with place.started() as guard:
        assert guard.evidence.start_digest != first
        assert failed(guard, trust(place.machine.hardware())) == []

    place.write_trust(trust(place.machine.hardware(measurements=(NEW.hex(),))))
    place.machine.measurement = NEW
    guard = place.guard()
    with contextlib.closing(guard.database), pytest.raises(StorageError, match="wasn't by a proven machine"):
        guard.recover()


def test_anybodys_questions_to_a_slow_device_stall_nothing_else(place: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host may take a minute over a report; the witnesses' calls, say, must not wait for that."""
    held, make = threading.Event(), SnpMachine.extended_report

    def slow(machine: SnpMachine, report_data: bytes) -> tuple[bytes, bytes]:
        held.wait(30)
        return make(machine, report_data)

    with place.serving() as (guard, running), ThreadPoolExecutor(80) as pool:
        monkeypatch.setattr(SnpMachine, "extended_report", slow)
        context = pinned_context(guard.evidence.identity.certificate_der)
        with httpx.Client(base_url=running.url, verify=context, trust_env=False, timeout=30) as client:
            question = AttestRequest(nonce=NONCE).to_json()
            asked = [pool.submit(client.post, "/.well-known/attest", content=question) for _ in range(80)]
            try:
                beyond = 80 - EVIDENCE_AT_ONCE - EVIDENCE_WAITING
                witnesses.until(lambda: sum(each.done() for each in asked) == beyond)
                log = ConsistencyRequest(first=1, second=1).to_json()
                assert client.post("/.well-known/consistency", content=log, timeout=5).status_code == 200
            finally:
                held.set()
            assert {each.result(30).status_code for each in asked} == {200, 503}


def envelope(version: str, measurement: bytes) -> bytes:
    now = int(time.time())
    values = ReferenceValues(
        image="cloister", version=version, issued=now - 100, expires=now + 86_400,
        values=(SnpImage(measurement=measurement.hex()),),
    )  # fmt: skip
    return sign_reference_values(values, "00" * 32, PUBLISHER)


def published(machine: SnpMachine, minimum: str) -> AttestationPolicy:
    publisher = Publisher(
        key=PUBLISHER.public_key().public_bytes_raw().hex(), image="cloister", minimum_version=minimum
    )
    return trust(machine.hardware(measurements="published"), publisher=publisher)


def test_an_update_of_the_image_needs_its_publishers_word_alone(place: Site) -> None:
    assert isinstance(place.machine, SnpMachine)
    policy, later = published(place.machine, "1.0"), published(place.machine, "1.1")
    place.write_trust(policy)
    place.machine.measurement = OLD
    place.values.write_bytes(envelope("1.0", OLD))
    with place.started() as guard:
        assert failed(guard, policy) == []
        assert "publisher" in failed(guard, later)
        # Rotated under a running guard: this image isn't the one that the new envelope is about.
        place.values.write_bytes(envelope("1.1", NEW))
        assert "publisher" in failed(guard, policy)
        place.values.write_bytes(bytes(300 << 10))
        with pytest.raises(UnavailableError):
            guard.evidence.answer(NONCE)

    place.values.write_bytes(envelope("1.1", NEW))
    with pytest.raises(ConfigurationError, match="publisher: "), place.started():
        pass
    place.machine.measurement = NEW
    # The earlier start holds the earlier envelope.
    with place.started() as guard:
        assert failed(guard, policy) == failed(guard, later) == []


def test_a_host_without_certificates_is_completed_from_the_store(place: Site) -> None:
    assert isinstance(place.machine, SnpMachine)
    place.machine.with_table = False
    text = refused_start(place, "snp-certificates")
    assert "https://kdsintf.amd.com/vcek/v1/Genoa/cert_chain" in text
    held = mint(place.machine.recipe, place.machine.leaf_key).collateral
    for der in (held.leaf, held.intermediate, held.root):
        for item in identify(der or b"", ()):
            keep(place.collateral, item)
    with place.started() as guard:
        assert failed(guard, trust(place.machine.hardware())) == []
    with place.started():
        pass


def test_tdx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with site(tmp_path, TdxMachine(), monkeypatch) as place:
        text = refused_start(place, "tdx-collateral")
        assert "https://api.trustedservices.intel.com/tdx/certification/v4/tcb?fmspc=" in text
        place.machine.publish(place.collateral)
        good = trust(place.machine.hardware())
        with place.serving() as (guard, running):
            with open_session(running.url, good, place.base, "good") as session:
                assert session.verdict.platform == "tdx"
            assert failed(guard, good) == []
            assert failed(guard, good.demanding(rtmr1=(OLD.hex(),))) == ["tdx-rtmr1"]
            assert "tdx-root" in failed(guard, good.demanding(roots=("00" * 32,)))
            for path in place.collateral.glob("intel-pck-crl*"):
                path.unlink()
            assert "tdx-pck-crl" in failed(guard, good)


def test_the_machine_has_no_key_of_its_own() -> None:
    keys = KeyRing(NoMachineKey(), {"clinic": bytes(32), "open": None}.__getitem__)
    wrapped = keys.wrap(b"secret", b"context", ("clinic",))
    assert keys.unwrap(wrapped, b"context", ("clinic",)) == b"secret"
    for owners in ((), ("open",), ("clinic", "open")):
        with pytest.raises(ConflictError, match="cloister owner init"):
            keys.wrap(b"secret", b"context", owners)
        with pytest.raises((ConflictError, StorageError), match=r"no witness|can't be unwrapped"):
            keys.unwrap(wrapped, b"context", owners)


def configured(tmp_path: Path, policy: AttestationPolicy, platform: str) -> GuardConfig:
    path = tmp_path / "writers.toml"
    path.write_text(policy.to_toml())
    return GuardConfig.model_validate(
        {
            "name": "real", "listen": "127.0.0.1:0", "state_dir": tmp_path / "state", "runtime_dir": tmp_path / "run",
            "platform": platform, "trust": path,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("hardware", "platform", "says"),
    [
        (SNP_POLICY, "tdx", "is for sev-snp"),
        (SNP_POLICY.model_copy(update={"measurements": "any"}), "sev-snp", "forge this audit log"),
        (SNP_POLICY.model_copy(update={"debug": "any"}), "sev-snp", "debug"),
        (TDX_POLICY.model_copy(update={"mr_td": "any"}), "tdx", "mr_td"),
        (TDX_POLICY.model_copy(update={"rtmr1": "any"}), "tdx", "rtmr1"),
        (TDX_POLICY.model_copy(update={"rtmr2": "any"}), "tdx", "rtmr2"),
    ],
)
def test_a_trust_file_that_lets_anybody_write_the_log_is_refused(
    tmp_path: Path, hardware: Any, platform: str, says: str
) -> None:
    with pytest.raises(ConfigurationError, match=says):
        configured(tmp_path, trust(hardware), platform).writers()


def test_trust_files_that_name_an_image_are_taken(tmp_path: Path) -> None:
    for hardware in (SNP_POLICY, TDX_POLICY):
        assert configured(tmp_path, trust(hardware), hardware.platform).writers() == trust(hardware)


@pytest.mark.parametrize(("platform", "named"), [("sev-snp", None), ("tdx", None), ("simulated", Path("/trust"))])
def test_a_trust_file_belongs_to_real_hardware(tmp_path: Path, platform: Any, named: Path | None) -> None:
    with pytest.raises(ValueError, match="trust"):
        GuardConfig(
            name="real", listen="127.0.0.1:0", state_dir=tmp_path / "s", runtime_dir=tmp_path / "r",
            platform=platform, trust=named,
        )  # fmt: skip
