"""The simulated machine, its root's file, and what it measures."""

import os
import time

import pytest

from cloister_attest.appraise import appraise
from cloister_attest.channel import make_server_identity
from cloister_attest.collect import SIMULATED_ROOT_FILE, attester_for, simulated_hardware
from cloister_attest.measure import TRUSTED_PACKAGES, measure, measure_trusted_packages
from cloister_attest.simulated import abi
from cloister_attest.simulated.hardware import SimulatedHardware
from cloister_data.errors import ConfigurationError, StorageError
from tests.fakes.attested_server import FakeMachine


def test_the_root_outlives_a_restart_and_the_leaf_does_not(tmp_path):
    first = SimulatedHardware.from_file(tmp_path / "root.pem", bytes(48))
    second = SimulatedHardware.from_file(tmp_path / "root.pem", bytes(48))
    assert first.root == second.root
    assert first.chip_id == second.chip_id
    assert first.leaf != second.leaf
    assert first.trust() == second.trust()
    nonce, identity = b"n" * 32, make_server_identity()
    evidence = FakeMachine(second).evidence(identity.spki, nonce)
    assert appraise(evidence, first.trust(), certificate=identity.certificate_der, nonce=nonce, at=int(time.time())).ok


def test_two_machines_share_nothing():
    first, second = SimulatedHardware.generate(bytes(48)), SimulatedHardware.generate(bytes(48))
    assert first.chip_id != second.chip_id
    assert first.trust().hardware.roots != second.trust().hardware.roots


def test_the_roots_file_is_closed_to_others(tmp_path):
    path = tmp_path / "state" / "root.pem"
    SimulatedHardware.from_file(path, bytes(48))
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["root.pem"]
    path.chmod(0o644)
    with pytest.raises(ConfigurationError, match="open to other users"):
        SimulatedHardware.from_file(path, bytes(48))


def test_a_damaged_or_mixed_root_is_refused(tmp_path):
    one, two = tmp_path / "one.pem", tmp_path / "two.pem"
    for path in (one, two):
        SimulatedHardware.from_file(path, bytes(48))
    marker = b"-----BEGIN CERTIFICATE-----"
    one.write_bytes(one.read_bytes().split(marker)[0] + marker + two.read_bytes().split(marker)[1])
    with pytest.raises(ConfigurationError, match="don't belong together"):
        SimulatedHardware.from_file(one, bytes(48))
    two.write_bytes(b"nothing")
    with pytest.raises(ConfigurationError, match="can't be read"):
        SimulatedHardware.from_file(two, bytes(48))


def test_a_state_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((StorageError, ConfigurationError)):
        SimulatedHardware.from_file(tmp_path / "file" / "root.pem", bytes(48))


def test_the_report_is_304_bytes_and_reads_back():
    hardware = SimulatedHardware.generate(b"m" * 48, tcb=9)
    report, _ = hardware.collect(b"d" * 64)
    assert len(report) == abi.REPORT_BYTES == 304
    parsed = abi.parse(report)
    assert (parsed.measurement, parsed.report_data, parsed.chip_id) == (b"m" * 48, b"d" * 64, hardware.chip_id)
    assert (parsed.tcb, parsed.debug) == (9, False)


def test_report_data_of_another_length_is_not_signed():
    with pytest.raises(ValueError, match="32 bytes where 64 belong"):
        SimulatedHardware.generate(bytes(48)).collect(bytes(32))


def test_the_attester_of_the_simulated_platform(tmp_path):
    attester = attester_for("simulated", tmp_path, None)
    assert attester.platform == "simulated"
    assert (tmp_path / SIMULATED_ROOT_FILE).exists()
    report, _ = attester.collect(bytes(64))
    assert abi.parse(report).measurement == measure_trusted_packages()
    assert simulated_hardware(tmp_path).trust().hardware.measurements == (measure_trusted_packages().hex(),)


@pytest.mark.parametrize("platform", ["sev-snp", "tdx"])
def test_real_platforms_say_what_is_absent(platform, tmp_path):
    with pytest.raises(ConfigurationError, match=rf"(?s){platform} evidence"):
        attester_for(platform, tmp_path, None)


def _tree(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return {"package": root}


def test_every_source_counts_and_byte_code_does_not(tmp_path):
    files = {"a.py": "1", "sub/b.py": "2", "data.ini": "3"}
    before = measure(_tree(tmp_path / "one", files))
    assert len(before) == 48
    assert before == measure(_tree(tmp_path / "two", files))
    assert before == measure(_tree(tmp_path / "two", {"__pycache__/a.cpython-311.pyc": "x", "c.pyc": "y"}))
    for number, (name, content) in enumerate([("a.py", "9"), ("sub/b.py", ""), ("new.py", ""), ("data.ini", "4")]):
        assert before != measure(_tree(tmp_path / f"changed{number}", {**files, name: content}))
    assert before != measure(_tree(tmp_path / "moved", {"a.py": "1", "sub/c.py": "2", "data.ini": "3"}))


def test_bytes_cannot_move_from_a_name_to_a_content(tmp_path):
    assert measure(_tree(tmp_path / "one", {"ab": "c"})) != measure(_tree(tmp_path / "two", {"a": "bc"}))


def test_links_are_not_measured_around(tmp_path):
    folders = _tree(tmp_path / "tree", {"a.py": "1"})
    os.symlink("/etc/hostname", tmp_path / "tree" / "b.py")
    with pytest.raises(ConfigurationError, match="is a link"):
        measure(folders)


def test_a_missing_package_is_an_error(monkeypatch):
    monkeypatch.setattr("cloister_attest.measure.TRUSTED_PACKAGES", (*TRUSTED_PACKAGES, "cloister_absent"))
    with pytest.raises(ConfigurationError, match="cloister_absent"):
        measure_trusted_packages()
