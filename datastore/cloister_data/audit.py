"""How the audit log is read: its entries, its newest checkpoint, and what its refs stand for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cloister_data.base import Digest, Text, UnixSeconds, Wire
from cloister_data.checkpoint import MAX_NOTE, MAX_SIZE

LEAVES_MEDIA_TYPE = "application/jsonl"
MAX_PAGE_BYTES = 8 << 20
"""`GET /api/v1/audit/leaves?start=N`: entries from N on, a line each, as much as fits; the last page is empty."""

NAMES_IN_A_PAGE = 1000
ENTRIES_IN_A_PAGE = 500

NameKind = Literal["user", "dataset", "population", "account", "file"]


class LogState(Wire):
    """`GET /api/v1/audit/checkpoint`: the signed checkpoint over all entries, and the key (32 bytes) that signed it."""

    checkpoint: str = Field(max_length=MAX_NOTE)
    log_key: bytes = Field(min_length=32, max_length=32)


class NameOpening(Wire):
    """What a ref of the log stands for, and the salt (16 bytes) that proves it: `cloister_budget.refs.ref_of`."""

    ref: Digest
    kind: NameKind
    salt: bytes = Field(min_length=16, max_length=16)
    name: str = Field(max_length=400)


class NamePage(Wire):
    """`GET /api/v1/audit/names?after=REF`: by ref; the last page is empty."""

    names: tuple[NameOpening, ...] = Field(max_length=NAMES_IN_A_PAGE)


class AuditEntry(Wire):
    """One entry for people: `payload` is the bytes that its hash covers, `names` says what refs in it stand for."""

    index: int = Field(ge=0, le=MAX_SIZE)
    at: UnixSeconds
    kind: Text
    payload: bytes = Field(max_length=1 << 16)
    names: dict[Digest, Text] = Field(max_length=2000)


class AuditSearch(Wire):
    """`POST /api/v1/audit/search`: entries from `start` on that fit every filter; None leaves one out.

    `user` and `dataset` also find the settlements and releases of charges that are theirs. Times are Unix seconds, of
    which the log holds whole minutes.
    """

    start: int = Field(default=0, ge=0, le=MAX_SIZE)
    user: str | None = Field(default=None, max_length=64)
    dataset: str | None = Field(default=None, max_length=130)
    kinds: tuple[Annotated[str, Field(max_length=64)], ...] = Field(default=(), max_length=32)
    since: UnixSeconds | None = Field(default=None, ge=0, le=MAX_SIZE)
    until: UnixSeconds | None = Field(default=None, ge=0, le=MAX_SIZE)


class AuditPage(Wire):
    """The entries found so far. `following` is where to go on, `size` the number of entries that the log has now."""

    entries: tuple[AuditEntry, ...] = Field(max_length=ENTRIES_IN_A_PAGE)
    following: int = Field(ge=0, le=MAX_SIZE)
    size: int = Field(ge=0, le=MAX_SIZE)
