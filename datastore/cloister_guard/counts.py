"""Events that nobody signed in for: counted in memory, and written as one entry now and then.

One entry for each would let anybody on the network fill the audit log.
"""

from __future__ import annotations

import threading

from sqlalchemy.orm import Session

from cloister_budget.entries import Counted
from cloister_budget.journal import Journal

FLUSH_SECONDS = 600.0
"""At most 144 entries a day, whatever arrives. What was counted since the last is lost with a crash."""


class Counts:
    """Usable from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._evidence = self._sign_ins = self._tokens = self._witness_calls = 0

    def evidence(self) -> None:
        with self._lock:
            self._evidence += 1

    def sign_in_refused(self) -> None:
        with self._lock:
            self._sign_ins += 1

    def token_refused(self) -> None:
        with self._lock:
            self._tokens += 1

    def witness_call_refused(self) -> None:
        with self._lock:
            self._witness_calls += 1

    def write(self, session: Session, journal: Journal) -> None:
        """Append what was counted since the last time, where there is anything."""
        with self._lock:
            found = Counted(
                evidence=self._evidence,
                sign_ins_refused=self._sign_ins,
                tokens_refused=self._tokens,
                witness_calls_refused=self._witness_calls,
            )
            self._evidence = self._sign_ins = self._tokens = self._witness_calls = 0
        if any((found.evidence, found.sign_ins_refused, found.tokens_refused, found.witness_calls_refused)):
            journal.append(session, found)
