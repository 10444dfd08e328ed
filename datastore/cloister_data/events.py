"""`/api/v1/events`: what happened, pushed as server-sent events."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cloister_data.accounts import AccountView
from cloister_data.base import Text, UnixSeconds, Wire
from cloister_data.training import JobView


class AccountEvent(Wire):
    """An account's figures changed."""

    kind: Literal["account"] = "account"
    account: AccountView


class JobEvent(Wire):
    """A job's state or coarse progress changed."""

    kind: Literal["job"] = "job"
    job: JobView


class RequestEvent(Wire):
    """A request of a user to an owner changed its state."""

    kind: Literal["request"] = "request"
    request: Text
    state: Literal["open", "granted", "refused"]


class AttestationEvent(Wire):
    """The guard has a new certificate or a new log key: clients attest again."""

    kind: Literal["attestation"] = "attestation"
    certificate: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ResetEvent(Wire):
    """The events after `Last-Event-ID` are gone: fetch the state anew, then go on from here."""

    kind: Literal["reset"] = "reset"


EventBody = Annotated[
    AccountEvent | JobEvent | RequestEvent | AttestationEvent | ResetEvent, Field(discriminator="kind")
]


class Event(Wire):
    """One event. `id` goes into `Last-Event-ID` on reconnect: `<start of the guard>-<sequence number>`."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}-\d{1,18}$")]
    at: UnixSeconds
    body: EventBody
