"""The audit log as owners and admins read it: entries in bulk, by search, and the names that they may know."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from sqlalchemy import ColumnElement, and_, or_, select, true
from sqlalchemy.orm import Session

from cloister_attest.evidence import EvidenceRecord
from cloister_budget.database import Database
from cloister_budget.journal import Journal
from cloister_budget.log import size
from cloister_budget.tables import AccountUser, BudgetRequestRow, ChargeRow, EvidenceRow, Leaf, Name
from cloister_data.audit import (
    ENTRIES_IN_A_PAGE,
    MAX_PAGE_BYTES,
    NAMES_IN_A_PAGE,
    AuditEntry,
    AuditPage,
    AuditSearch,
    LogState,
    NameOpening,
    NamePage,
)
from cloister_data.errors import NotFoundError
from cloister_guard.identity import Caller

READ_AT_ONCE = 1000
SCANNED = 20_000
"""A search looks at so many entries, then answers: nobody's search holds the database for long."""

_DIGEST = re.compile(rb'"([0-9a-f]{64})"')


class AuditReader:
    """Reads one cloister's log. What a caller may see follows from their role: each route says which it needs."""

    def __init__(self, database: Database, journal: Journal) -> None:
        self._database = database
        self._journal = journal

    def state(self) -> LogState:
        with self._database.read() as session:
            return LogState(checkpoint=self._journal.checkpoint(session), log_key=self._journal.log.public_key)

    def evidence(self, digest: str) -> EvidenceRecord:
        """The evidence of one start. Raises NotFoundError."""
        with self._database.read() as session:
            row = session.get(EvidenceRow, digest)
        if row is None:
            raise NotFoundError("There is no evidence with this digest here.")
        return EvidenceRecord.from_json(row.record_json)

    def leaves(self, caller: Caller, start: int) -> bytes:
        """Entries from `start` on, a line each, at most `MAX_PAGE_BYTES`; empty at the end. For owners and admins."""
        caller.require("owner", "admin")
        lines = bytearray()
        with self._database.read() as session:
            while True:
                wanted = select(Leaf.payload).where(Leaf.index >= start).order_by(Leaf.index).limit(READ_AT_ONCE)
                payloads = session.scalars(wanted).all()
                for payload in payloads:
                    if len(lines) + len(payload) + 1 > MAX_PAGE_BYTES:
                        return bytes(lines)
                    lines += payload + b"\n"
                if len(payloads) < READ_AT_ONCE:
                    return bytes(lines)
                start += READ_AT_ONCE

    def names(self, caller: Caller, after: str) -> NamePage:
        """Names after the ref `after`: an admin's all of them, an owner's those of their data and its users."""
        caller.require("owner", "admin")
        with self._database.read() as session:
            wanted = select(Name).where(Name.ref > after, _known_to(caller)).order_by(Name.ref).limit(NAMES_IN_A_PAGE)
            return NamePage(names=tuple(_opening(row) for row in session.scalars(wanted)))

    def search(self, caller: Caller, wanted: AuditSearch) -> AuditPage:
        """The next entries that fit. For owners and admins; an owner learns no names but their own."""
        caller.require("owner", "admin")
        with self._database.read() as session:
            entries = size(session)
            end = min(entries, wanted.start + SCANNED)
            refs = _refs_of(session, caller, wanted)
            if refs is None:
                return AuditPage(entries=(), following=entries, size=entries)
            query = select(Leaf).where(Leaf.index >= wanted.start, Leaf.index < end, *_terms(wanted))
            found: list[Leaf] = []
            following = end
            for leaf in session.scalars(query.order_by(Leaf.index).execution_options(yield_per=READ_AT_ONCE)):
                if all(ref in leaf.payload for ref in refs) or _through_its_charge(session, leaf, wanted):
                    found.append(leaf)
                    if len(found) == ENTRIES_IN_A_PAGE:
                        following = leaf.index + 1
                        break
            names = _names_in(session, caller, found)
            return AuditPage(
                entries=tuple(
                    AuditEntry(
                        index=leaf.index,
                        at=leaf.at,
                        kind=leaf.kind,
                        payload=leaf.payload,
                        names={ref: names[ref] for ref in _digests(leaf) if ref in names},
                    )
                    for leaf in found
                ),
                following=following,
                size=entries,
            )


def _known_to(caller: Caller) -> ColumnElement[bool]:
    """Which rows of `names` this caller may read."""
    if caller.role == "admin":
        return true()
    own = f"{caller.user}/"
    users = select(AccountUser.user).where(AccountUser.dataset.startswith(own, autoescape=True))
    return or_(
        and_(Name.kind != "user", Name.name.startswith(own, autoescape=True)),
        and_(Name.kind == "user", or_(Name.name == caller.user, Name.name.in_(users))),
    )


def _opening(row: Name) -> NameOpening:
    return NameOpening.model_validate({"ref": row.ref, "kind": row.kind, "salt": row.salt, "name": row.name})


def _terms(wanted: AuditSearch) -> list[ColumnElement[bool]]:
    terms: list[ColumnElement[bool]] = []
    if wanted.kinds:
        terms.append(Leaf.kind.in_(wanted.kinds))
    if wanted.since is not None:
        terms.append(Leaf.at >= wanted.since)
    if wanted.until is not None:
        terms.append(Leaf.at < wanted.until)
    return terms


def _refs_of(session: Session, caller: Caller, wanted: AuditSearch) -> list[bytes] | None:
    """The refs that an entry must hold; None where a name is unknown to this caller, and nothing can be found."""
    refs: list[bytes] = []
    for kind, name in (("user", wanted.user), ("dataset", wanted.dataset)):
        if name is not None:
            ref = session.scalar(select(Name.ref).where(Name.kind == kind, Name.name == name, _known_to(caller)))
            if ref is None:
                return None
            refs.append(ref.encode())
    return refs


def _through_its_charge(session: Session, leaf: Leaf, wanted: AuditSearch) -> bool:
    """Whether an entry that names no user and no dataset belongs to a charge, or a request, that does."""
    facts = json.loads(leaf.payload)["facts"]
    user: str | None = None
    datasets: Sequence[str] = ()
    if leaf.kind in ("charge-settled", "release"):
        charge = session.get(ChargeRow, facts["charge"])
        if charge is not None:
            user, datasets = charge.user, [source["dataset"] for source in json.loads(charge.sources_json)]
    elif leaf.kind == "budget-answer":
        request = session.get(BudgetRequestRow, facts["request"])
        if request is not None:
            user, datasets = request.user, [request.dataset]
    if user is None:
        return False
    return wanted.user in (None, user) and (wanted.dataset is None or wanted.dataset in datasets)


def _digests(leaf: Leaf) -> list[str]:
    return [found.decode() for found in _DIGEST.findall(leaf.payload)]


def _names_in(session: Session, caller: Caller, leaves: Sequence[Leaf]) -> dict[str, str]:
    refs = sorted({ref for leaf in leaves for ref in _digests(leaf)})
    names: dict[str, str] = {}
    for start in range(0, len(refs), READ_AT_ONCE):
        some = refs[start : start + READ_AT_ONCE]
        for row in session.scalars(select(Name).where(Name.ref.in_(some), _known_to(caller))):
            names[row.ref] = row.name
    return names
