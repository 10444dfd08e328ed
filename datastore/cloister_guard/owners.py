"""What owners have said, signed, about this cloister as a whole: who witnesses for them, and that a restore is fine.

Whether an owner has a witness follows from the audit log's own books, not from a row that somebody could edit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloister_budget.book_types import TermsBook
from cloister_budget.database import Database
from cloister_budget.entries import GapAccepted, Locked, OwnerTermsSet
from cloister_budget.journal import Journal
from cloister_budget.tables import AcceptedGap, Owner, Population
from cloister_data.errors import ConflictError, PolicyRefusedError, UnavailableError
from cloister_data.owner import verify_gap, verify_terms
from cloister_data.release import WitnessKey
from cloister_data.terms import OwnerTerms, OwnerView, SignedGap, SignedTerms, TermsRequest
from cloister_guard.identity import Caller
from cloister_guard.leases import Leases


def owners_of(datasets: Collection[str]) -> tuple[str, ...]:
    """Whose these datasets are, each once, sorted: their names are OWNER/NAME."""
    return tuple(sorted({name.split("/")[0] for name in datasets}))


class Owners:
    """The owners of one cloister. Usable from several threads."""

    def __init__(self, database: Database, journal: Journal, leases: Leases) -> None:
        self._database = database
        self._journal = journal
        self._leases = leases
        self._refs: dict[str, str] = {}

    def terms(self, owner: str) -> TermsBook | None:
        """The owner's terms in force; None where they have no witness."""
        ref = self._ref(owner)
        return None if ref is None else self._journal.terms(ref)

    def witness(self, owner: str) -> bytes | None:
        """The public key (32 bytes) of the owner's witness; None where they have none."""
        terms = self.terms(owner)
        return None if terms is None else bytes.fromhex(terms.witness)

    def witnesses(self, owners: Collection[str]) -> tuple[WitnessKey, ...]:
        found = [(owner, self.witness(owner)) for owner in sorted(set(owners))]
        return tuple(WitnessKey(owner=owner, key=key) for owner, key in found if key is not None)

    def lent(self, owner: str) -> bytes | None:
        """The data key that the owner's witness lends; None without a witness. Raises UnavailableError while locked."""
        return None if self.witness(owner) is None else self._leases.key(owner)

    def standing(self, owner: str) -> dict[str, bool]:
        """`witness` and `locked` of the owner's datasets, as a `DatasetView` shows them."""
        if self.witness(owner) is None:
            return {"witness": False, "locked": False}
        lease = self._leases.of(owner)
        return {"witness": True, "locked": lease is None or lease.key is None}

    def require(self, owners: Collection[str]) -> None:
        """Raises UnavailableError where an owner's data are locked, or wait for their word on a restore."""
        for owner in sorted(set(owners)):
            self.lent(owner)
            ref = self._ref(owner)
            if ref is not None and self._journal.gap(ref) is not None:
                raise UnavailableError(
                    f"The data of {owner} wait for their owner.",
                    why="The cloister was restored from a backup, and the owner hasn't signed for that yet.",
                    next_step="Nothing was charged. The owner accepts it with: cloister owner accept.",
                )

    def view(self, caller: Caller) -> OwnerView:
        caller.require("owner")
        with self._database.read() as session:
            row = session.get(Owner, caller.user)
        ref, lease = self._ref(caller.user), self._leases.of(caller.user)
        terms = _terms_of(row)
        return OwnerView(
            owner=caller.user,
            origin=self._journal.log.origin,
            owner_key=row.public_key if row else None,
            terms=terms,
            cosigned=lease.cosigned if lease else 0,
            unlocked=terms is None or (lease is not None and lease.key is not None),
            gap=None if ref is None else self._journal.gap(ref),
        )

    def set_terms(self, caller: Caller, request: TermsRequest) -> OwnerView:
        """Put signed terms in force; the first ones pin the owner's key. The same terms again change nothing."""
        caller.require("owner")
        terms = verify_terms(request.terms, request.owner_key)
        with self._database.write() as session:
            row = session.get(Owner, caller.user, with_for_update=True)
            if row is not None and row.public_key != request.owner_key:
                raise PolicyRefusedError(
                    "The terms are signed with another owner key than the one pinned here.",
                    why="Only the key that was pinned first may speak for this owner.",
                    next_step="Use the profile whose key that is.",
                )
            if row is None or row.terms != request.terms.document:
                self._put(session, row, caller.user, terms, request)
        return self.view(caller)

    def _put(self, session: Session, row: Owner | None, owner: str, terms: OwnerTerms, request: TermsRequest) -> None:
        following = 1 if row is None or row.terms is None else OwnerTerms.from_json(row.terms).version + 1
        known = self.terms(owner)
        if known is not None and known.unlock != terms.unlock:
            raise PolicyRefusedError(
                "The terms name another key to the data.",
                why="What is stored here opens with the first one alone.",
                next_step="Put unlock.key back from your copy of it, then: cloister owner init.",
            )
        if (terms.owner, terms.origin, terms.version) != (owner, self._journal.log.origin, following):
            raise PolicyRefusedError(
                "The terms are for something else.",
                why=f"They are version {terms.version} of {terms.owner}'s for {terms.origin}; the next here is version "
                f"{following} of {owner}'s for {self._journal.log.origin}.",
                next_step="Make them anew: cloister owner init.",
            )
        owned = select(Population.name).where(Population.name.startswith(f"{owner}/", autoescape=True))
        if following == 1 and session.scalar(owned.limit(1)) is not None:
            raise ConflictError(
                f"{owner} has data here already, and no witness.",
                why="Those data are stored under the machine's own key, which no witness can withhold.",
                next_step="A witness is set before the first upload: cloister owner init, as an owner without data.",
            )
        if row is None:
            row = Owner(user=owner, public_key=request.owner_key)
            session.add(row)
        row.terms, row.signature = request.terms.document, request.terms.signature
        ref = self._journal.ref(session, "user", owner)
        self._journal.append(
            session,
            OwnerTermsSet(
                owner=ref,
                owner_key=request.owner_key.hex(),
                version=terms.version,
                witness=terms.witness.hex(),
                unlock=terms.unlock,
                terms=terms.digest(),
            ),
        )
        lease = self._leases.of(owner)
        if lease is not None and lease.witness != terms.witness:
            self._leases.drop(owner)
            if lease.key is not None:
                self._journal.append(session, Locked(owner=ref, reason="terms"))

    def accept(self, caller: Caller, signed: SignedGap) -> OwnerView:
        """Take an owner's signature under a restore: their data can be asked again."""
        caller.require("owner")
        with self._database.write() as session:
            row = session.get(Owner, caller.user, with_for_update=True)
            ref = self._journal.ref(session, "user", caller.user)
            gap = self._journal.gap(ref)
            if row is None or gap is None:
                raise ConflictError("No restore waits for your signature.")
            statement = verify_gap(signed, row.public_key)
            if (statement.owner, statement.origin, statement.gap) != (caller.user, self._journal.log.origin, gap):
                raise PolicyRefusedError(
                    "The signed statement is about something else.",
                    why=f"What waits is the restore at entry {gap.restored}, of entries {gap.first} to {gap.end}.",
                    next_step="Look at it and sign it anew: cloister owner accept.",
                )
            session.add(
                AcceptedGap(
                    owner=caller.user, restored=gap.restored, document=signed.document, signature=signed.signature
                )
            )
            self._journal.append(
                session,
                GapAccepted(
                    owner=ref,
                    owner_key=row.public_key.hex(),
                    restored=gap.restored,
                    statement=hashlib.sha256(signed.document).hexdigest(),
                ),
            )
        return self.view(caller)

    def locked(self, owner: str) -> None:
        """Note in the log that an owner's lease has ended."""
        with self._database.write() as session:
            self._journal.append(session, Locked(owner=self._journal.ref(session, "user", owner), reason="silent"))

    def _ref(self, owner: str) -> str | None:
        found = self._refs.get(owner)
        if found is None:
            with self._database.read() as session:
                found = self._journal.known_ref(session, "user", owner)
            if found is not None:
                self._refs[owner] = found
        return found


def _terms_of(row: Owner | None) -> SignedTerms | None:
    if row is None or row.terms is None or row.signature is None:
        return None
    return SignedTerms(document=row.terms, signature=row.signature)
