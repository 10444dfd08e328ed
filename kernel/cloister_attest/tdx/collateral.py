"""Intel's statements about its platforms: TCB info, QE identity, and where to fetch them.

Source: Intel PCS API for Intel SGX and Intel TDX, version 4 ("Get TDX TCB Info", "Get TDX QE Identity"), TCB info of
version 3 and enclave identity of version 2. The signature covers the inner JSON object's bytes exactly as received.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar

from cryptography import x509
from pydantic import BaseModel, ConfigDict, FailFast, Field, StringConstraints, ValidationError
from pydantic.alias_generators import to_camel

from cloister_attest.outcome import EvidenceError
from cloister_attest.tdx.chain import moment, public_key, verify_ecdsa
from cloister_data.base import Wire

PCS_TCB_INFO = "https://api.trustedservices.intel.com/tdx/certification/v4/tcb?fmspc={fmspc}"
"""Its answer's header TCB-Info-Issuer-Chain holds the signing chain."""
PCS_QE_IDENTITY = "https://api.trustedservices.intel.com/tdx/certification/v4/qe/identity"
"""Its answer's header SGX-Enclave-Identity-Issuer-Chain holds the signing chain."""
PCS_PCK_CRL = "https://api.trustedservices.intel.com/sgx/certification/v4/pckcrl?ca={ca}&encoding=der"
PCS_ROOT_CRL = "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der"

MAX_DOCUMENT = 512 << 10
MAX_CHAIN = 32 << 10
MAX_CRL = 8 << 20

TcbStatus = Literal[
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "Revoked",
]


class Collateral(Wire):
    """What Intel publishes about a platform, as it came: JSON, PEM chains of signer and root, DER lists.

    A piece that nobody fetched is None; what that means is the policy's to say (`TdxPolicy.collateral`).
    """

    tcb_info: Annotated[bytes, Field(max_length=MAX_DOCUMENT)] | None
    tcb_info_chain: Annotated[bytes, Field(max_length=MAX_CHAIN)] | None
    qe_identity: Annotated[bytes, Field(max_length=MAX_DOCUMENT)] | None
    qe_identity_chain: Annotated[bytes, Field(max_length=MAX_CHAIN)] | None
    root_crl: Annotated[bytes, Field(max_length=MAX_CRL)] | None
    pck_crl: Annotated[bytes, Field(max_length=MAX_CRL)] | None

    @classmethod
    def none(cls) -> Collateral:
        """No piece at all."""
        return cls(
            tcb_info=None, tcb_info_chain=None, qe_identity=None, qe_identity_chain=None, root_crl=None, pck_crl=None
        )


@dataclass(frozen=True)
class SignedDocument:
    """`body` is the inner object's bytes as received, which `signature` (64 bytes) covers; `value` is what they say."""

    body: bytes
    value: dict[str, Any]
    signature: bytes


class _Signed(BaseModel):
    """A part of what Intel signs. Intel may add members; one that is read here has its exact type.

    Lists fail at their first fault: pydantic's reports of a hundred thousand take seconds and hundreds of megabytes.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", alias_generator=to_camel)


def _hex(size: int) -> StringConstraints:
    return StringConstraints(pattern=rf"^[0-9a-fA-F]{{{2 * size}}}$")


Hex2 = Annotated[str, _hex(2)]
Hex4 = Annotated[str, _hex(4)]
Hex6 = Annotated[str, _hex(6)]
Hex8 = Annotated[str, _hex(8)]
Hex16 = Annotated[str, _hex(16)]
Hex32 = Annotated[str, _hex(32)]
Hex48 = Annotated[str, _hex(48)]
Time = Annotated[str, StringConstraints(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$")]
Advisory = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9.-]{1,64}$")]
Advisories = Annotated[tuple[Advisory, ...], Field(max_length=256, alias="advisoryIDs"), FailFast()]
U16 = Annotated[int, Field(ge=0, le=0xFFFF)]
Number = Annotated[int, Field(ge=0, le=0xFFFFFFFF)]


class Component(_Signed):
    svn: Annotated[int, Field(ge=0, le=0xFF)]


Components = Annotated[tuple[Component, ...], Field(min_length=16, max_length=16), FailFast()]


class PlatformTcb(_Signed):
    sgxtcbcomponents: Components
    pcesvn: U16
    tdxtcbcomponents: Components


class PlatformLevel(_Signed):
    tcb: PlatformTcb
    tcb_date: Time
    tcb_status: TcbStatus
    advisory_ids: Advisories = ()


class IsvTcb(_Signed):
    isvsvn: U16


class IsvLevel(_Signed):
    """A level of the quoting enclave or of the TDX module."""

    tcb: IsvTcb
    tcb_date: Time
    tcb_status: TcbStatus
    advisory_ids: Advisories = ()


IsvLevels = Annotated[tuple[IsvLevel, ...], Field(min_length=1, max_length=256), FailFast()]


class TdxModule(_Signed):
    """The signer and attributes (with their mask) that a TDX module must have."""

    mrsigner: Hex48
    attributes: Hex8
    attributes_mask: Hex8


class TdxModuleIdentity(TdxModule):
    id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]{1,32}$")]
    tcb_levels: IsvLevels


class TcbInfo(_Signed):
    id: Literal["TDX"]
    version: Annotated[int, Field(ge=3, le=3)]
    issue_date: Time
    next_update: Time
    fmspc: Hex6
    pce_id: Hex2
    tcb_type: Annotated[int, Field(ge=0, le=0)]
    tcb_evaluation_data_number: Number
    tdx_module: TdxModule
    tdx_module_identities: Annotated[tuple[TdxModuleIdentity, ...], Field(max_length=256), FailFast()] = ()
    tcb_levels: Annotated[tuple[PlatformLevel, ...], Field(min_length=1, max_length=256), FailFast()]


class QeIdentity(_Signed):
    id: Literal["TD_QE"]
    version: Annotated[int, Field(ge=2, le=2)]
    issue_date: Time
    next_update: Time
    tcb_evaluation_data_number: Number
    miscselect: Hex4
    miscselect_mask: Hex4
    attributes: Hex16
    attributes_mask: Hex16
    mrsigner: Hex32
    isvprodid: U16
    tcb_levels: IsvLevels


_Document = TypeVar("_Document", TcbInfo, QeIdentity)


def parse_signed(raw: bytes, member: str) -> SignedDocument:
    """`{"<member>": {...}, "signature": "<128 hex digits>"}`. Raises EvidenceError for anything else.

    Strict: ASCII, no member twice at any depth, no number but small whole ones, nothing after the end.
    """
    if len(raw) > MAX_DOCUMENT:
        raise EvidenceError(f"the {member} has more than {MAX_DOCUMENT} bytes")
    try:
        text = raw.decode("ascii")
        members = _members(text)
    except (ValueError, RecursionError) as error:
        raise EvidenceError(f"the {member} isn't JSON that this program reads") from error
    if members.keys() != {member, "signature"}:
        raise EvidenceError(f"the {member} has other members than {member} and signature")
    value, body = members[member]
    signature, _ = members["signature"]
    if not isinstance(value, dict):
        raise EvidenceError(f"the {member} isn't an object")
    if not isinstance(signature, str) or re.fullmatch(r"[0-9a-fA-F]{128}", signature) is None:
        raise EvidenceError(f"the signature of the {member} isn't 64 bytes in hex")
    return SignedDocument(body.encode("ascii"), value, bytes.fromhex(signature))


def parse_tcb_info(document: SignedDocument) -> TcbInfo:
    """Raises EvidenceError for anything but TCB info of id TDX and version 3."""
    _identified(document, "tcbInfo", "TDX", 3)
    return _model(document, TcbInfo, "tcbInfo")


def parse_qe_identity(document: SignedDocument) -> QeIdentity:
    """Raises EvidenceError for anything but an enclave identity of id TD_QE and version 2."""
    _identified(document, "enclaveIdentity", "TD_QE", 2)
    return _model(document, QeIdentity, "enclaveIdentity")


def verify_document(document: SignedDocument, signer: x509.Certificate, name: str) -> None:
    """The signature over the inner object's bytes as received. Raises EvidenceError."""
    verify_ecdsa(
        public_key(signer), document.signature, document.body, f"the {name}'s signature doesn't verify under its signer"
    )


def verify_document_dates(document: SignedDocument, at: int, name: str, fetch: str) -> datetime:
    """The next update, once `at` is between issueDate and nextUpdate. Raises EvidenceError.

    Read before the rest of the document, so that one of another kind is still told its age.
    """
    begins, ends = (_time(document.value.get(key), name) for key in ("issueDate", "nextUpdate"))
    now = moment(at)
    if now < begins:
        raise EvidenceError(f"the {name} is of the future: its time begins {begins}")
    if now > ends:
        raise EvidenceError(f"the {name} has expired ({ends}): fetch {fetch}")
    return ends


def parse_time(value: str) -> datetime:
    """A time as Intel writes it, in UTC. Raises EvidenceError."""
    try:
        return datetime.strptime(value, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError as error:
        raise EvidenceError("a date in Intel's collateral isn't one") from error


def _time(value: object, name: str) -> datetime:
    if not isinstance(value, str):
        raise EvidenceError(f"the {name} doesn't say when it was issued and when it ends")
    return parse_time(value)


def _identified(document: SignedDocument, name: str, kind: str, version: int) -> None:
    if document.value.get("id") != kind:
        raise EvidenceError(f"the {name} is made for something other than {kind}")
    found = document.value.get("version")
    if type(found) is not int or found != version:
        raise EvidenceError(f"the {name} has another version than {version}")


def _model(document: SignedDocument, model: type[_Document], name: str) -> _Document:
    try:
        return model.model_validate_json(document.body, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]["loc"]
        # Positions and members of the model, never what the document says.
        where = ".".join(str(part) for part in first)
        raise EvidenceError(f"the {name} is wrong at {where}") from error


def _members(text: str) -> dict[str, tuple[Any, str]]:
    """The outermost object's members, each with the text it was written as. Raises ValueError."""
    decoder = json.JSONDecoder(
        object_pairs_hook=_unique, parse_float=_refuse, parse_constant=_refuse, parse_int=_small, strict=True
    )
    members: dict[str, tuple[Any, str]] = {}
    position = _expect(text, _blank(text, 0), "{")
    while True:
        position = _blank(text, position)
        name, position = decoder.raw_decode(text, position)
        if not isinstance(name, str) or name in members:
            raise ValueError("a member without a name of its own")
        start = _blank(text, _expect(text, _blank(text, position), ":"))
        value, position = decoder.raw_decode(text, start)
        members[name] = (value, text[start:position])
        position = _blank(text, position)
        if text[position : position + 1] != ",":
            break
        position += 1
    if _blank(text, _expect(text, position, "}")) != len(text):
        raise ValueError("something follows the object")
    return members


def _blank(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\r", "\n"):
        position += 1
    return position


def _expect(text: str, position: int, char: str) -> int:
    if text[position : position + 1] != char:
        raise ValueError(f"no {char}")
    return position + 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a member twice")
    return value


def _refuse(_: str) -> Any:
    raise ValueError("a number that isn't whole")


def _small(digits: str) -> int:
    if len(digits) > 10:
        raise ValueError("a number too large")
    return int(digits)
