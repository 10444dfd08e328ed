"""Reference values that a publisher of images signs: which measurements a released image has on each platform.

A trust file that names the publisher's key and a minimum version goes on working when the image is updated. The form
is an in-toto Statement v1 in a DSSE 1.0 envelope (https://github.com/secure-systems-lab/dsse), signed with Ed25519.
The machine hands the envelope out with its evidence; it needs no trust for that.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from typing import Annotated, Literal, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from cloister_attest.fields import Measurement
from cloister_attest.outcome import EvidenceError
from cloister_data.base import Digest, Label, UnixSeconds, Wire

MAX_ENVELOPE = 256 << 10
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE: Literal["https://in-toto.io/Statement/v1"] = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Literal["urn:cloister:reference-values:v1"] = "urn:cloister:reference-values:v1"

Version = Annotated[
    str,
    StringConstraints(pattern=r"^(0|[1-9][0-9]{0,8})(\.(0|[1-9][0-9]{0,8})){0,3}$"),
    Field(description='a version such as "1.4.2"'),
]
"""One to four numbers with dots; what isn't written counts as 0."""


class SimulatedImage(Wire):
    """An image on simulated hardware."""

    platform: Literal["simulated"] = "simulated"
    measurement: Measurement


class SnpImage(Wire):
    """An image on AMD SEV-SNP: MEASUREMENT, the launch digest."""

    platform: Literal["sev-snp"] = "sev-snp"
    measurement: Measurement


class TdxImage(Wire):
    """An image on Intel TDX. The values of one image belong together: none is accepted beside another image's."""

    platform: Literal["tdx"] = "tdx"
    mr_td: Measurement
    rtmr0: Measurement
    rtmr1: Measurement
    rtmr2: Measurement
    rtmr3: Measurement


ImageValues = Annotated[SimulatedImage | SnpImage | TdxImage, Field(discriminator="platform")]


class ReferenceValues(Wire):
    """What the publisher says of one release: the predicate of the statement.

    Attributes:
        image: which image.
        version: of the release; a trust file names the lowest that it accepts.
        issued, expires: when the publisher vouches for it.
        values: what the image may measure, for each platform and shape of machine.
    """

    image: Label
    version: Version
    issued: UnixSeconds
    expires: UnixSeconds
    values: Annotated[tuple[ImageValues, ...], Field(min_length=1, max_length=1024)]

    @model_validator(mode="after")
    def _lasting(self) -> Self:
        if self.expires <= self.issued:
            raise ValueError("reference values expire after they are issued")
        return self


class Publisher(Wire):
    """Whose reference values a trust file accepts.

    Attributes:
        key: the publisher's Ed25519 key (32 bytes), hex.
        image: the name of the image.
        minimum_version: the lowest release that is accepted.
    """

    model_config = ConfigDict(strict=True)

    key: Annotated[Digest, Field(description="a 32-byte key in lower-case hex")]
    image: Annotated[Label, Field(description="the image's name")]
    minimum_version: Version


class _Signature(BaseModel):
    # DSSE lets an envelope hold more than this program reads.
    model_config = ConfigDict(strict=True, extra="ignore")

    keyid: Annotated[str, StringConstraints(max_length=256)] = ""
    sig: Annotated[str, StringConstraints(max_length=1024)]


class _Envelope(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    payload: Annotated[str, StringConstraints(max_length=MAX_ENVELOPE)]
    payload_type: str = Field(alias="payloadType")
    signatures: Annotated[tuple[_Signature, ...], Field(min_length=1, max_length=16)]


class _Subject(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    name: Label
    digest: Annotated[dict[str, str], Field(min_length=1, max_length=8)]


class _Statement(Wire):
    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: Annotated[tuple[_Subject, ...], Field(min_length=1, max_length=64)]
    predicate_type: Literal["urn:cloister:reference-values:v1"] = Field(alias="predicateType")
    predicate: ReferenceValues


def verify_reference_values(envelope: bytes, publisher: Publisher, at: int) -> ReferenceValues:
    """What the publisher says, once its signature, name, version and dates hold at `at` (Unix seconds).

    Raises EvidenceError.
    """
    payload = _verified_payload(envelope, publisher.key)
    try:
        # Parsed only now that the publisher's signature covers it.
        found = _Statement.model_validate_json(payload, strict=True).predicate
    except ValidationError as error:
        raise EvidenceError("the publisher's statement isn't about reference values of this version") from error
    if found.image != publisher.image:
        raise EvidenceError(f"the publisher vouches for the image {found.image!r}, another than the trust file names")
    if parse_version(found.version) < parse_version(publisher.minimum_version):
        raise EvidenceError(
            f"the image is of version {found.version}, and the trust file demands at least {publisher.minimum_version}"
        )
    if at < found.issued:
        raise EvidenceError("the publisher's reference values aren't valid yet")
    if at > found.expires:
        raise EvidenceError("the publisher's reference values have expired: the operator must ask for newer ones")
    return found


def sign_reference_values(values: ReferenceValues, artifact_sha256: str, key: Ed25519PrivateKey) -> bytes:
    """The envelope of a release whose image file has this SHA-256 (hex), signed by its publisher."""
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": f"{values.image} {values.version}", "digest": {"sha256": artifact_sha256}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": values.model_dump(mode="json"),
    }
    payload = json.dumps(statement, sort_keys=True, separators=(",", ":")).encode()
    public = key.public_key().public_bytes_raw()
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [
            {
                "keyid": hashlib.sha256(public).hexdigest(),
                "sig": base64.b64encode(key.sign(_pre_authentication(payload))).decode(),
            }
        ],
    }
    return json.dumps(envelope).encode() + b"\n"


def parse_version(version: str) -> tuple[int, ...]:
    """A version's numbers, four of them."""
    numbers = tuple(map(int, version.split(".")))
    return numbers + (0,) * (4 - len(numbers))


def _verified_payload(envelope: bytes, key: str) -> bytes:
    if len(envelope) > MAX_ENVELOPE:
        raise EvidenceError(f"the reference values have {len(envelope)} bytes, and {MAX_ENVELOPE} are enough")
    try:
        read = _Envelope.model_validate_json(envelope, strict=True)
        payload = base64.b64decode(read.payload, validate=True)
        signatures = [base64.b64decode(each.sig, validate=True) for each in read.signatures]
    except (ValidationError, binascii.Error, ValueError) as error:
        raise EvidenceError("the reference values aren't a DSSE envelope") from error
    if read.payload_type != PAYLOAD_TYPE:
        raise EvidenceError("the reference values aren't an in-toto statement")
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
    for signature in signatures:
        try:
            public.verify(signature, _pre_authentication(payload))
        except InvalidSignature:
            continue
        return payload
    raise EvidenceError("the reference values aren't signed by the publisher that the trust file names")


def _pre_authentication(payload: bytes) -> bytes:
    """PAE (DSSE 1.0, "Signature Definition")."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)
