"""The appraisal: the valid case, then one thing wrong at a time, and the very check that must notice."""

import json
import time
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_attest.appraise import appraise
from cloister_attest.channel import make_server_identity
from cloister_attest.checks import PLATFORM_CHECKS, check_names
from cloister_attest.evidence import Evidence
from cloister_attest.policy import AttestationPolicy
from cloister_attest.result import SIMULATED_WARNING
from cloister_attest.simulated.hardware import SimulatedHardware
from cloister_attest.simulated.verify import CHIP_OID
from tests.cloister_attest.policies import SNP_POLICY, TDX_POLICY
from tests.fakes.attested_server import MEASUREMENT, FakeLog, FakeMachine

NOW = int(time.time())
CHECK_NAMES = check_names("simulated")
NONCE = bytes(range(32))
IDENTITY = make_server_identity()
MACHINE = FakeMachine()
POLICY = MACHINE.hardware.trust()
EVIDENCE = MACHINE.evidence(IDENTITY.spki, NONCE)


def judge(evidence=EVIDENCE, policy=POLICY, *, certificate=IDENTITY.certificate_der, nonce=NONCE, at=NOW):
    return appraise(evidence, policy, certificate=certificate, nonce=nonce, at=at)


def failed(result) -> set[str]:
    """The failed checks; every check was answered, and every failure has a reason."""
    assert tuple(check.name for check in result.checks) == CHECK_NAMES
    assert all(check.reason and check.explanation and check.source for check in result.checks)
    assert result.ok == (not result.failed)
    return {check.name for check in result.failed}


def changed(**fields) -> Evidence:
    return EVIDENCE.model_copy(update=fields)


def policy(**fields) -> AttestationPolicy:
    """The trust file with other values of keys, wherever they stand."""
    document = POLICY.model_dump(mode="json")
    for key, value in fields.items():
        (document["hardware"] if key in document["hardware"] else document)[key] = value
    return AttestationPolicy.from_json(json.dumps(document))


def test_valid_evidence_passes():
    result = judge()
    assert failed(result) == set()
    assert result.ok
    assert result.simulated
    assert result.measurement == MEASUREMENT.hex()
    assert result.chip == MACHINE.hardware.chip_id.hex()
    assert result.checkpoint == EVIDENCE.checkpoint


def test_the_json_as_it_came_passes_too():
    assert judge(EVIDENCE.to_json()) == judge()


def test_another_nonce():
    assert failed(judge(nonce=bytes(32))) == {"binding"}


def test_an_all_zero_nonce_is_a_nonce():
    zero = MACHINE.evidence(IDENTITY.spki, bytes(32))
    assert failed(judge(zero)) == {"binding"}
    assert failed(judge(zero, nonce=bytes(32))) == set()


def test_another_channel():
    assert failed(judge(certificate=make_server_identity().certificate_der)) == {"binding"}


def test_a_certificate_that_cannot_be_read():
    assert failed(judge(certificate=b"not a certificate")) == {"binding"}


def test_another_root():
    other = FakeMachine(SimulatedHardware.generate(MEASUREMENT, chip_id=MACHINE.hardware.chip_id), MACHINE.log)
    assert failed(judge(other.evidence(IDENTITY.spki, NONCE))) == {"root"}


def test_the_pinned_root_beside_a_leaf_that_it_did_not_issue():
    other = FakeMachine(SimulatedHardware.generate(MEASUREMENT, chip_id=MACHINE.hardware.chip_id), MACHINE.log)
    forged = other.evidence(IDENTITY.spki, NONCE)
    forged = forged.model_copy(update={"certificates": (forged.certificates[0], EVIDENCE.certificates[1])})
    assert {"chain", "root", "signature"} <= failed(judge(forged))


def test_another_measurement():
    good = SimulatedHardware.generate(MEASUREMENT)
    bad = SimulatedHardware.generate(bytes(48), chip_id=good.chip_id)
    evidence = FakeMachine(bad, MACHINE.log).evidence(IDENTITY.spki, NONCE)
    trusting = policy(roots=list(bad.trust().hardware.roots), chips_allowed=[good.chip_id.hex()])
    assert failed(judge(evidence, trusting)) == {"measurement"}
    assert failed(judge(evidence, trusting.demanding(measurements="any"))) == set()


def test_a_debuggable_machine():
    machine = FakeMachine(SimulatedHardware.generate(MEASUREMENT, debug=True), MACHINE.log)
    evidence = machine.evidence(IDENTITY.spki, NONCE)
    assert failed(judge(evidence, machine.hardware.trust())) == {"debug"}
    tolerant = machine.hardware.trust().demanding(debug="any")
    result = judge(evidence, tolerant)
    assert failed(result) == set()
    assert next(check for check in result.checks if check.name == "debug").verdict == "not-applicable"


def test_an_old_tcb():
    assert failed(judge(policy=policy(minimum_tcb=2))) == {"tcb"}
    assert failed(judge(policy=policy(minimum_tcb="any"))) == set()


def test_chips():
    chip = MACHINE.hardware.chip_id.hex()
    assert failed(judge(policy=policy(chips_allowed=["00" * 64]))) == {"chip"}
    assert failed(judge(policy=policy(chips_allowed="any"))) == set()
    assert failed(judge(policy=policy(chips_denied=[chip]))) == {"chip"}
    assert failed(judge(policy=policy(chips_allowed="any", chips_denied=[chip]))) == {"chip"}


def test_gpus():
    with_gpu = FakeMachine(MACHINE.hardware, MACHINE.log, gpu=b"gpu").evidence(IDENTITY.spki, NONCE)
    assert failed(judge(policy=policy(gpu="required"))) == {"gpu"}
    assert failed(judge(with_gpu, policy(gpu="required"))) == {"gpu"}
    assert failed(judge(with_gpu)) == {"gpu"}
    assert failed(judge(with_gpu, policy(gpu="any"))) == set()
    assert failed(judge(changed(gpu=b"swapped in"), policy(gpu="any"))) == {"binding"}
    assert failed(judge(with_gpu.model_copy(update={"gpu": None}))) == {"binding"}


def test_a_checkpoint_of_the_same_log_that_the_report_does_not_bind():
    later = FakeLog(MACHINE.log.key, size=6)
    assert failed(judge(changed(checkpoint=later.checkpoint()))) == {"binding"}


def test_another_log():
    other = FakeLog()
    assert failed(judge(changed(checkpoint=other.checkpoint(), log_key=other.public_key))) == {"binding"}
    assert failed(judge(changed(log_key=other.public_key))) == {"binding", "checkpoint"}


def test_a_bound_checkpoint_that_nobody_signed():
    class Unsigned(FakeLog):
        def checkpoint(self):
            return super().checkpoint().replace("\n7\n", "\n8\n")

    evidence = FakeMachine(MACHINE.hardware, Unsigned()).evidence(IDENTITY.spki, NONCE)
    result = judge(evidence)
    assert failed(result) == {"checkpoint"}
    assert result.checkpoint == ""


def test_a_pinned_log():
    key, origin = MACHINE.log.public_key.hex(), MACHINE.log.origin
    assert failed(judge(policy=policy(log_key=key, log_origin=origin))) == set()
    assert failed(judge(policy=policy(log_key="00" * 32))) == {"checkpoint"}
    assert failed(judge(policy=policy(log_origin="another"))) == {"checkpoint"}


def test_dates():
    assert failed(judge(at=NOW - 3 * 86400)) == {"dates"}
    assert failed(judge(at=NOW + 400 * 86400)) == {"dates"}
    assert failed(judge(at=1 << 62)) == {"dates"}


@pytest.mark.parametrize(
    ("hardware", "title"), [(SNP_POLICY, "AMD SEV-SNP"), (TDX_POLICY, "Intel TDX")], ids=["sev-snp", "tdx"]
)
def test_real_hardware_is_demanded(hardware, title):
    demanding = POLICY.model_copy(update={"hardware": hardware})
    result = judge(policy=demanding)
    own = set(PLATFORM_CHECKS[hardware.platform])
    assert {check.name for check in result.failed} == {"platform"} | own
    assert not result.ok
    reason = next(check.reason for check in result.checks if check.name == "platform")
    assert reason == f"the trust file demands {title} and the machine shows simulated hardware, which protects nothing"
    assert SIMULATED_WARNING in result.table()


@pytest.mark.parametrize(("platform", "title"), [("sev-snp", "AMD SEV-SNP"), ("tdx", "Intel TDX")])
def test_a_simulated_report_is_not_taken_for_real_hardware(platform, title):
    result = judge(changed(platform=platform))
    assert {"format", "platform", "binding"} <= {check.name for check in result.failed}
    assert not result.simulated


@pytest.mark.parametrize(
    "given_bytes",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        EVIDENCE.to_json()[:-1],
        EVIDENCE.to_json().replace(b'"simulated"', b'"imagined"'),
        EVIDENCE.to_json().replace(b'{"platform"', b'{"more":1,"platform"'),
        b"[" * 100_000,
    ],
)
def test_evidence_that_cannot_be_read_fails_every_check(given_bytes):
    result = judge(given_bytes)
    assert failed(result) == set(CHECK_NAMES)
    assert result.platform is None
    assert "unknown" in result.table()


def test_every_byte_of_the_report_counts():
    """Flipping any bit group anywhere in the 304 bytes is noticed (the signature is malleable only as a whole)."""
    report = EVIDENCE.report
    for at in range(len(report)):
        bent = report[:at] + bytes([report[at] ^ 0x41]) + report[at + 1 :]
        assert not judge(changed(report=bent)).ok, at


@pytest.mark.parametrize("report", [EVIDENCE.report[:-1], EVIDENCE.report + b"\0", b"\0", b"\0" * 304])
def test_a_report_of_another_shape_fails_the_format(report):
    assert "format" in failed(judge(changed(report=report)))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_chains_of_another_length(count):
    certificates = (EVIDENCE.certificates * 2)[:count]
    assert failed(judge(changed(certificates=certificates))) == {"chain", "root", "dates", "signature", "tcb", "chip"}


def test_a_chain_the_wrong_way_round():
    assert "chain" in failed(judge(changed(certificates=EVIDENCE.certificates[::-1])))


def test_the_root_is_not_taken_for_a_signer():
    root = EVIDENCE.certificates[1]
    assert "chain" in failed(judge(changed(certificates=(root, root))))


@settings(max_examples=60, deadline=None)
@given(
    st.binary(min_size=1, max_size=400),
    st.lists(st.binary(min_size=1, max_size=64), max_size=4),
    st.text(max_size=100),
    st.binary(min_size=32, max_size=32),
)
def test_hostile_evidence_never_raises_and_never_passes(report, certificates, checkpoint, key):
    bent = changed(report=report, certificates=tuple(certificates), checkpoint=checkpoint, log_key=key)
    assert {"format", "chain", "signature", "binding", "checkpoint"} <= failed(judge(bent))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1), st.data())
def test_a_bent_certificate_never_raises_and_never_passes(which, data):
    """But for the one bent byte that says nothing: how a leaf's signature is encoded isn't signed, what it signs is."""
    der = bytearray(EVIDENCE.certificates[which])
    der[data.draw(st.integers(0, len(der) - 1))] ^= data.draw(st.integers(1, 255))
    certificates = list(EVIDENCE.certificates)
    certificates[which] = bytes(der)
    if not failed(judge(changed(certificates=tuple(certificates)))):
        leaf, original = map(x509.load_der_x509_certificate, (certificates[0], EVIDENCE.certificates[0]))
        assert which == 0
        assert leaf.tbs_certificate_bytes == original.tbs_certificate_bytes
        assert leaf.signature == original.signature


class Mint:
    """Issues chains that are right but for one thing."""

    def __init__(self) -> None:
        self.root_key = ec.generate_private_key(ec.SECP384R1())
        self.chip = MACHINE.hardware.chip_id + (1).to_bytes(8, "big")

    def certificate(self, key, *, ca, name, algorithm=None, usage_ca=None, chip=None, days=(-1, 10), signer=None):
        root_name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "root")])
        own_name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        now = datetime.now(UTC)
        usage_ca = ca if usage_ca is None else usage_ca
        builder = (
            x509.CertificateBuilder()
            .issuer_name(root_name)
            .subject_name(own_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days=days[0]))
            .not_valid_after(now + timedelta(days=days[1]))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(not ca, False, False, False, False, usage_ca, usage_ca, False, False), critical=True
            )
        )
        if chip is not None:
            builder = builder.add_extension(x509.UnrecognizedExtension(CHIP_OID, chip), critical=False)
        return builder.sign(signer or self.root_key, algorithm or SHA384())

    def judge(self, root, leaf, leaf_key):
        hardware = SimulatedHardware(self.root_key, root, MEASUREMENT, chip_id=MACHINE.hardware.chip_id)
        hardware.leaf, hardware._leaf_key = leaf, leaf_key
        evidence = FakeMachine(hardware, MACHINE.log).evidence(IDENTITY.spki, NONCE)
        return judge(evidence, policy(roots=list(hardware.trust().hardware.roots)))


def minted(root_curve=None, leaf_curve=None, root=None, leaf=None) -> set[str]:
    mint = Mint()
    if root_curve:
        mint.root_key = ec.generate_private_key(root_curve)
    leaf_key = ec.generate_private_key(leaf_curve or ec.SECP384R1())
    root_certificate = mint.certificate(mint.root_key, **{"ca": True, "name": "root", **(root or {})})
    leaf_certificate = mint.certificate(leaf_key, **{"ca": False, "name": "leaf", "chip": mint.chip, **(leaf or {})})
    return failed(mint.judge(root_certificate, leaf_certificate, leaf_key))


def test_the_mint_itself_is_right():
    assert minted() == set()


@pytest.mark.parametrize(
    "wrong",
    [
        {"leaf": {"ca": True}},
        {"leaf": {"usage_ca": True}},
        {"leaf": {"algorithm": SHA256()}},
        {"leaf": {"chip": None}},
        {"leaf": {"chip": b"short"}},
        {"root": {"ca": False}},
        {"root": {"usage_ca": False}},
        {"root": {"algorithm": SHA256()}},
        {"root": {"name": "another name"}},
        {"root": {"signer": ec.generate_private_key(ec.SECP384R1())}},
        {"leaf": {"signer": ec.generate_private_key(ec.SECP384R1())}},
        {"root_curve": ec.SECP256R1()},
        {"leaf_curve": ec.SECP256R1()},
    ],
    ids=lambda wrong: ", ".join(f"{part} {value!r:.20}" for part, value in wrong.items()),
)
def test_a_chain_with_one_thing_wrong(wrong):
    assert "chain" in minted(**wrong)


def test_a_leaf_of_another_chip_or_tcb():
    assert minted(leaf={"chip": bytes(64) + (1).to_bytes(8, "big")}) == {"chip"}
    assert minted(leaf={"chip": MACHINE.hardware.chip_id + (2).to_bytes(8, "big")}) == {"tcb"}


def test_an_expired_root_and_a_leaf_that_is_not_valid_yet():
    assert minted(root={"days": (-9, -1)}) == {"dates"}
    assert minted(leaf={"days": (5, 9)}) == {"dates"}


def test_the_certificates_go_out_as_der():
    assert EVIDENCE.certificates[1] == MACHINE.hardware.root.public_bytes(Encoding.DER)
