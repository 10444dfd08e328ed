"""Reference values that a publisher signs: who is believed, and what an image update then takes."""

import base64
import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister_attest.appraise import appraise
from cloister_attest.channel import make_server_identity
from cloister_attest.outcome import EvidenceError
from cloister_attest.reference_values import (
    MAX_ENVELOPE,
    Publisher,
    ReferenceValues,
    SimulatedImage,
    SnpImage,
    TdxImage,
    parse_version,
    sign_reference_values,
    verify_reference_values,
)
from cloister_attest.simulated.hardware import SimulatedHardware
from tests.cloister_attest.policies import TDX_POLICY
from tests.fakes.attested_server import FakeMachine

NOW = 1_800_000_000
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLISHER = Publisher(key=KEY.public_key().public_bytes_raw().hex(), image="cloister-vm", minimum_version="1.4")
OLD, NEW = bytes([1]) * 48, bytes([2]) * 48
IDENTITY = make_server_identity()
NONCE = bytes(32)


def values(*measured: bytes, **changes) -> ReferenceValues:
    images = tuple(SimulatedImage(measurement=each.hex()) for each in measured or (OLD,))
    given = {"image": "cloister-vm", "version": "1.4.2", "issued": NOW - 10, "expires": NOW + 10, "values": images}
    return ReferenceValues(**(given | changes))


def signed(stated: ReferenceValues, key: Ed25519PrivateKey = KEY) -> bytes:
    return sign_reference_values(stated, "00" * 32, key)


def refused(envelope: bytes, match: str, publisher: Publisher = PUBLISHER, at: int = NOW) -> None:
    with pytest.raises(EvidenceError, match=match):
        verify_reference_values(envelope, publisher, at)


def test_what_the_publisher_signed_comes_back():
    assert verify_reference_values(signed(values()), PUBLISHER, NOW) == values()


def test_the_envelope_is_dsse_over_an_in_toto_statement():
    envelope = json.loads(signed(values()))
    payload = base64.b64decode(envelope["payload"])
    statement = json.loads(payload)
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["subject"] == [{"name": "cloister-vm 1.4.2", "digest": {"sha256": "00" * 32}}]
    covered = b"DSSEv1 28 application/vnd.in-toto+json %d %s" % (len(payload), payload)
    KEY.public_key().verify(base64.b64decode(envelope["signatures"][0]["sig"]), covered)


def test_another_signer_version_image_or_time():
    refused(signed(values(), Ed25519PrivateKey.generate()), "aren't signed by the publisher")
    refused(signed(values(version="1.3.99")), "at least 1.4")
    refused(signed(values(image="other-vm")), "another than the trust file names")
    refused(signed(values()), "aren't valid yet", at=NOW - 11)
    refused(signed(values()), "have expired", at=NOW + 11)


@pytest.mark.parametrize(("low", "high"), [("1.4", "1.10"), ("1.4", "1.4.1"), ("0.9.9.9", "1"), ("9", "10")])
def test_versions_are_numbers(low, high):
    assert parse_version(low) < parse_version(high)
    assert parse_version("1.4") == parse_version("1.4.0.0")


def test_a_second_signature_is_enough_and_none_is_not():
    envelope = json.loads(signed(values()))
    other = json.loads(signed(values(), Ed25519PrivateKey.generate()))
    envelope["signatures"] = other["signatures"] + envelope["signatures"]
    assert verify_reference_values(json.dumps(envelope).encode(), PUBLISHER, NOW) == values()
    envelope["signatures"] = []
    refused(json.dumps(envelope).encode(), "aren't a DSSE envelope")


@pytest.mark.parametrize(
    "bent",
    [
        b"",
        b"{}",
        b"[" * 100_000,
        b"\xff",
        b" " * (MAX_ENVELOPE + 1),
        signed(values()).replace(b"in-toto", b"in-tutu"),
        signed(values()).replace(b'"payload": "', b'"payload": "!'),
    ],
    ids=["empty", "nothing", "deep", "binary", "large", "type", "base64"],
)
def test_what_is_no_envelope(bent):
    refused(bent, "reference values")


def test_every_byte_of_the_payload_counts():
    envelope = json.loads(signed(values()))
    payload = base64.b64decode(envelope["payload"])
    for position in range(len(payload)):
        spoilt = payload[:position] + bytes([payload[position] ^ 1]) + payload[position + 1 :]
        refused(
            json.dumps(envelope | {"payload": base64.b64encode(spoilt).decode()}).encode(), "aren't signed by the pub"
        )


def test_a_statement_about_something_else_is_not_read():
    envelope = json.loads(signed(values()))
    statement = json.loads(base64.b64decode(envelope["payload"])) | {"predicateType": "https://slsa.dev/provenance/v1"}
    payload = json.dumps(statement).encode()
    signature = KEY.sign(b"DSSEv1 28 application/vnd.in-toto+json %d %s" % (len(payload), payload))
    other = envelope | {
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": "", "sig": base64.b64encode(signature).decode()}],
    }
    refused(json.dumps(other).encode(), "isn't about reference values")


def judge(machine: FakeMachine, envelope: bytes | None):
    """The names of the failed checks under a trust file that names the publisher alone."""
    trust = machine.hardware.trust().demanding(measurements="published").model_copy(update={"publisher": PUBLISHER})
    evidence = machine.evidence(IDENTITY.spki, NONCE).model_copy(update={"reference_values": envelope})
    at = int(machine.hardware.leaf.not_valid_before_utc.timestamp()) + 2 * 86400
    result = appraise(evidence, trust, certificate=IDENTITY.certificate_der, nonce=NONCE, at=at)
    return {check.name for check in result.failed}


def around(*measured: bytes, **changes) -> bytes:
    return signed(values(*measured, **({"issued": 0, "expires": 1 << 40} | changes)))


def test_an_image_update_locks_nobody_out():
    """The same trust file accepts the machine before and after, and neither with the other's values."""
    before, after = (FakeMachine(SimulatedHardware.generate(measured)) for measured in (OLD, NEW))
    assert judge(before, around(OLD)) == set()
    assert judge(after, around(NEW, version="1.5")) == set()
    assert judge(after, around(OLD, NEW, version="1.5")) == set()
    assert judge(after, around(OLD)) == judge(before, around(NEW)) == {"publisher", "measurement"}
    assert judge(before, around(OLD, version="1.3")) == {"publisher", "measurement"}
    assert judge(before, None) == {"publisher", "measurement"}
    assert judge(before, b"bent") == {"publisher", "measurement"}
    snp = ReferenceValues(
        image="cloister-vm", version="1.5", issued=0, expires=1 << 40, values=(SnpImage(measurement=OLD.hex()),)
    )
    assert judge(before, signed(snp)) == {"publisher", "measurement"}


def test_the_values_of_two_images_are_not_mixed():
    def image(digit: str, **changes) -> TdxImage:
        registers = dict.fromkeys(("mr_td", "rtmr0", "rtmr1", "rtmr2", "rtmr3"), digit * 96)
        return TdxImage(**(registers | changes))

    published = dict.fromkeys(("mr_td", "rtmr1", "rtmr2"), "published")
    base = SimulatedHardware.generate(OLD).trust()
    policy = base.model_copy(update={"hardware": TDX_POLICY.model_copy(update=published), "publisher": PUBLISHER})
    chosen = policy.with_published(image("a"), image("a", rtmr0="c" * 96))
    assert chosen is not None
    assert (chosen.mr_td, chosen.rtmr0, chosen.rtmr1) == (("a" * 96,), "any", ("a" * 96,))
    assert policy.with_published(image("a"), image("a", rtmr2="b" * 96)) is None
    assert policy.with_published(image("b"), image("a", rtmr2="b" * 96)) is None
    assert policy.with_published(SnpImage(measurement="a" * 96), image("a")) is None
