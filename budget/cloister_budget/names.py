"""What the audit log's refs stand for. A leaf can never be erased; a name beside it can.

A ref is SHA-256 over a label, a random salt, the kind and the name. With the row it is proven whom a leaf is about;
once the row is gone, nobody can tell, and nobody can put another name in its place.
"""

from __future__ import annotations

import secrets
import threading

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloister_budget.refs import SALT_BYTES, ref_of
from cloister_budget.tables import Name
from cloister_data.audit import NameKind
from cloister_data.errors import StorageError

_FRESH = "cloister_fresh_names"
"""Under this name a session knows the refs that its own transaction made."""


class Names:
    """The refs of one cloister's log. Usable from several threads."""

    def __init__(self) -> None:
        # Of committed rows only: a ref never changes.
        self._known: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()

    def ref(self, s: Session, kind: NameKind, name: str) -> str:
        """The ref of a name; it gets one, in this transaction, where it has none yet."""
        found = self.known(s, kind, name)
        if found is None:
            salt = secrets.token_bytes(SALT_BYTES)
            found = ref_of(kind, name, salt)
            s.add(Name(ref=found, kind=kind, salt=salt, name=name))
            s.flush()
            s.info.setdefault(_FRESH, set()).add(found)
        return found

    def known(self, s: Session, kind: NameKind, name: str) -> str | None:
        """The ref of a name, where it has one. Raises StorageError where the stored one isn't this name's."""
        with self._lock:
            known = self._known.get((kind, name))
        if known is not None:
            return known
        row = s.execute(select(Name.ref, Name.salt).where(Name.kind == kind, Name.name == name)).first()
        found = None if row is None else row.ref
        if row is not None and ref_of(kind, name, row.salt) != row.ref:
            raise StorageError(
                "The database gives a name to a ref of the audit log that stands for another one.",
                next_step="Nothing was done. Stop the cloister, and let the admin put the table `names` back.",
            )
        if found is not None and found not in s.info.get(_FRESH, ()):
            with self._lock:
                self._known[kind, name] = found
        return found
