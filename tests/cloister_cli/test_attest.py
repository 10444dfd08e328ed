"""`cloister attest verify`, `trust` and `publish`, as a command line uses them."""

import json
import stat
import time

import pytest

from cloister_attest.channel import make_server_identity
from cloister_attest.evidence import Evidence, EvidenceRecord
from cloister_attest.policy import AttestationPolicy, load_policy
from cloister_attest.reference_values import MAX_ENVELOPE
from cloister_attest.simulated.hardware import SimulatedHardware
from tests.cloister_attest.snp import minted
from tests.cloister_attest.tdx import minting
from tests.fakes.attested_server import MEASUREMENT, FakeMachine

PLAIN = minted.mint(minted.Recipe())
IDENTITY = make_server_identity()
NONCE = bytes(range(32))


@pytest.fixture(scope="module")
def machine() -> FakeMachine:
    return FakeMachine(SimulatedHardware.generate(MEASUREMENT))


@pytest.fixture
def record(machine, tmp_path):
    path = tmp_path / "record.json"
    evidence = machine.evidence(IDENTITY.spki, NONCE)
    path.write_bytes(EvidenceRecord(evidence=evidence, nonce=NONCE, certificate=IDENTITY.certificate_der).to_json())
    return path


@pytest.fixture
def trust(machine, tmp_path):
    path = tmp_path / "trust.toml"
    path.write_text(machine.hardware.trust().to_toml())
    return path


def policy_file(tmp_path, hardware, **changes):
    path = tmp_path / "hardware.toml"
    document = {"format": 2, "publisher": "none", "gpu": "any", "log_key": "any", "log_origin": "any"}
    path.write_text(AttestationPolicy(**document, hardware=hardware).model_copy(update=changes).to_toml())
    return path


def test_a_record_is_judged_check_by_check(run, record, trust):
    done = run("attest", "verify", str(record), "--policy", str(trust))
    assert done.returncode == 0, done.stdout
    assert "Verified: the evidence holds" in done.stdout
    assert "\N{CHECK MARK}" in done.stdout
    assert "\N{EN DASH}" in done.stdout
    assert "SIMULATED" in done.stdout
    answer = json.loads(run("attest", "verify", str(record), "--policy", str(trust), "--json").stdout)
    assert answer["ok"] is True
    assert {check["verdict"] for check in answer["checks"]} == {"pass", "not-applicable"}


def test_a_record_at_another_time_or_under_another_trust_file(run, record, trust):
    late = run("attest", "verify", str(record), "--policy", str(trust), "--at", "2001-01-01")
    assert late.returncode == 1
    assert "\N{BALLOT X}" in late.stdout
    assert "isn't valid yet" in " ".join(late.stdout.split())
    other = SimulatedHardware.generate(MEASUREMENT).trust()
    trust.write_text(other.to_toml())
    answer = run("attest", "verify", str(record), "--policy", str(trust), "--json")
    assert answer.returncode == 1
    failed = {check["name"] for check in json.loads(answer.stdout)["checks"] if check["verdict"] == "fail"}
    assert failed == {"root", "chip"}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--at", "yesterday"], "isn't a time"),
        (["--report-data", "any"], "itself what it was made for"),
        (["--policy", "absent.toml"], "can't be read"),
    ],
)
def test_wrong_command_lines(run, record, trust, arguments, match):
    done = run("attest", "verify", str(record), "--policy", str(trust), *arguments)
    assert done.returncode in (1, 2)
    assert match in " ".join((done.stdout + done.stderr).replace("│", " ").split())


def test_a_report_alone_must_say_what_it_answers(run, tmp_path):
    path = tmp_path / "quote.bin"
    path.write_bytes(minting.quote())
    policy = policy_file(tmp_path, minting.strict(collateral="any"))
    base = ["attest", "verify", str(path), "--policy", str(policy), "--at", str_of(minting.AT)]
    assert run(*base).returncode == 2
    assert run(*base, "--report-data", "00").returncode == 2
    for data, names in (
        (minting.REPORT_DATA.hex(), set()),
        ("any", set()),
        ("00" * 64, {"binding", "tdx-report-data"}),
    ):
        answer = json.loads(run(*base, "--report-data", data, "--json").stdout)
        failed = {check["name"] for check in answer["checks"] if check["verdict"] == "fail"}
        # The minted platform's documents aren't at hand: what needs them fails, whatever the report data.
        assert {name for name in failed if name in ("binding", "tdx-report-data", "tdx-signature")} == names


def test_what_a_report_alone_cannot_show_fails_where_it_is_demanded(run, tmp_path):
    path = tmp_path / "quote.bin"
    path.write_bytes(minting.quote())
    policy = policy_file(tmp_path, minting.strict(), gpu="required", log_key="00" * 32)
    answer = json.loads(
        run("attest", "verify", str(path), "--policy", str(policy), "--report-data", "any", "--json").stdout
    )
    assert {"gpu", "checkpoint"} <= {check["name"] for check in answer["checks"] if check["verdict"] == "fail"}


def test_missing_documents_say_where_they_are_to_be_had(run, tmp_path):
    path = tmp_path / "report.bin"
    path.write_bytes(PLAIN.report)
    policy = policy_file(tmp_path, minted.strict_policy(PLAIN))
    done = run("attest", "verify", str(path), "--policy", str(policy), "--report-data", "any")
    assert done.returncode == 1
    assert "https://kdsintf.amd.com/vcek/v1/" in "".join(done.stdout.split())


@pytest.mark.parametrize("kind", ["sev-snp", "tdx"])
def test_a_drafted_trust_file_is_strict_and_names_what_the_report_shows(run, tmp_path, kind):
    path = tmp_path / "evidence.bin"
    path.write_bytes(PLAIN.report if kind == "sev-snp" else minting.quote())
    done = run("attest", "trust", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    drafted = AttestationPolicy.from_toml(done.stdout)
    assert drafted.platform == kind
    assert drafted.hardware.debug == "forbidden"
    assert drafted.hardware.roots == "vendor"
    named = drafted.hardware.measurements if kind == "sev-snp" else drafted.hardware.mr_td
    assert len(named) == 1
    if kind == "tdx":
        lax = sum(1 << bit for bit in (0, 4, 5, 6, 29, 63))
        assert not int(drafted.hardware.td_attributes_allowed, 16) & lax
        assert int(drafted.hardware.td_attributes_allowed, 16) & 1 << 28
    assert "Nothing of this is verified" in done.stderr


def test_a_drafted_trust_file_names_the_cloud_provider(run, tmp_path):
    made = minted.mint(minted.Recipe(kind="VLEK"))
    path = tmp_path / "evidence.json"
    certificates = (made.collateral.leaf, made.collateral.intermediate, made.collateral.root)
    shown = Evidence(
        platform="sev-snp", report=made.report, certificates=certificates, checkpoint="", log_key=bytes(32)
    )
    path.write_bytes(shown.to_json())
    drafted = AttestationPolicy.from_toml(run("attest", "trust", str(path)).stdout)
    assert drafted.hardware.vlek == (minted.CSP_ID,)
    path.write_bytes(shown.model_copy(update={"certificates": ()}).to_json())
    done = run("attest", "trust", str(path))
    assert done.returncode == 1
    assert "There is no certificate of the report's signer" in done.stderr


def test_a_simulated_machine_gets_no_drafted_trust_file(run, record):
    done = run("attest", "trust", str(record))
    assert done.returncode == 1
    assert "its own trust file" in done.stderr


def test_what_is_published_is_accepted(run, record, machine, tmp_path):
    values, image = tmp_path / "values.json", tmp_path / "image.raw"
    image.write_bytes(b"an image")
    values.write_text(json.dumps([{"platform": "simulated", "measurement": MEASUREMENT.hex()}]))
    key, out = tmp_path / "key.pem", tmp_path / "signed.json"
    command = ["attest", "publish", str(values), "--artifact", str(image), "--image", "vm", "--version", "1.2"]
    assert run(*command, "--key", str(key), "--out", str(out)).returncode == 1
    done = run(*command, "--key", str(key), "--out", str(out), "--create-key")
    assert done.returncode == 0, done.stdout + done.stderr
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    base = machine.hardware.trust().to_toml().replace('publisher = "none"\n', "")
    lines = ['measurements = "published"' if line.startswith("measurements") else line for line in base.splitlines()]
    trust = tmp_path / "published.toml"
    trust.write_text("\n".join(lines) + "\n\n" + done.stdout)
    assert load_policy(trust).publisher.image == "vm"
    kept = EvidenceRecord.from_json(record.read_bytes())
    shown = kept.evidence.model_copy(update={"reference_values": out.read_bytes()})
    for evidence, status in ((shown, 0), (kept.evidence, 1)):
        record.write_bytes(kept.model_copy(update={"evidence": evidence}).to_json())
        assert run("attest", "verify", str(record), "--policy", str(trust)).returncode == status


MANY = json.dumps(
    [
        {"platform": "tdx"} | dict.fromkeys(("mr_td", "rtmr0", "rtmr1", "rtmr2", "rtmr3"), f"{number:096x}")
        for number in range(440)
    ]
)
"""More than an envelope holds, and less than the command reads."""


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", "[1]", '[{"platform": "sgx"}]', "[", "x" * (MAX_ENVELOPE + 1), MANY],
    ids=lambda text: text[:8],
)
def test_values_that_cannot_be_published(run, tmp_path, content):
    values = tmp_path / "values.json"
    values.write_text(content)
    done = run(
        *("attest", "publish", str(values), "--artifact", str(values), "--image", "vm", "--version", "1"),
        *("--key", str(tmp_path / "key.pem"), "--out", str(tmp_path / "out"), "--create-key"),
    )
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def str_of(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
