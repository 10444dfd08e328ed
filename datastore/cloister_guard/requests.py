"""Requests for more budget. Asking and answering are each one transaction: the row, the leaf and a granted policy."""

from __future__ import annotations

import hashlib
import secrets
import time
from typing import Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloister_budget.database import Database
from cloister_budget.entries import BudgetAnswered, BudgetRequested
from cloister_budget.journal import Journal
from cloister_budget.tables import BudgetRequestRow, Dataset
from cloister_data.errors import ConflictError, InvalidRequestError, NotFoundError
from cloister_data.events import RequestEvent
from cloister_data.policy import Policy, SignedPolicy
from cloister_data.requests import BudgetAnswer, BudgetRequest, BudgetRequestList, BudgetRequestView
from cloister_guard.access import load_policy
from cloister_guard.catalogue import Catalogue
from cloister_guard.events import EventHub
from cloister_guard.identity import Caller


class Requests:
    """The flows of `/requests`."""

    def __init__(self, database: Database, journal: Journal, catalogue: Catalogue, events: EventHub) -> None:
        self._database = database
        self._journal = journal
        self._catalogue = catalogue
        self._events = events

    def ask(self, caller: Caller, request: BudgetRequest) -> BudgetRequestView:
        """Put a request to a dataset's owner. A user has one open request for a dataset at most.

        The same request again, while it is open, is the same one. Raises NotFoundError for a dataset whose policy
        doesn't name the caller.
        """
        with self._database.write() as session:
            # The lock lets two of one user's requests come one after the other.
            dataset = session.get(Dataset, request.dataset, with_for_update=True)
            if dataset is None or caller.user not in load_policy(session, dataset).readers:
                raise NotFoundError(
                    f"There is no dataset {request.dataset!r} for you here.",
                    next_step="cloister.datasets() lists those that you may use.",
                )
            open_one = session.scalar(
                select(BudgetRequestRow).where(
                    BudgetRequestRow.user == caller.user,
                    BudgetRequestRow.dataset == request.dataset,
                    BudgetRequestRow.state == "open",
                )
            )
            if open_one is not None:
                if (open_one.epsilon, open_one.reason) == (request.epsilon, request.reason):
                    return _view(open_one)
                raise ConflictError(
                    f"You have an open request about {request.dataset} already.",
                    why="Its owner hasn't answered it yet.",
                    next_step="Wait for the answer: cloister budget requests.",
                )
            row = BudgetRequestRow(
                id=secrets.token_hex(16), user=caller.user, owner=dataset.owner, dataset=dataset.name,
                epsilon=request.epsilon, reason=request.reason, salt=secrets.token_bytes(16), state="open", answer="",
                policy_version=None, created=int(time.time()), answered=None,
            )  # fmt: skip
            session.add(row)
            self._journal.append(
                session,
                BudgetRequested(
                    request=row.id,
                    user=self._journal.ref(session, "user", row.user),
                    dataset=self._journal.ref(session, "dataset", row.dataset),
                    content=_commitment(row, request.digest()),
                ),
            )
            return _view(row)

    def list(self, caller: Caller) -> BudgetRequestList:
        """The caller's own requests, and for an owner those that were put to them; the oldest first."""
        concerns = BudgetRequestRow.user == caller.user
        if caller.role == "owner":
            concerns |= BudgetRequestRow.owner == caller.user
        with self._database.read() as session:
            rows = session.scalars(
                select(BudgetRequestRow).where(concerns).order_by(BudgetRequestRow.created, BudgetRequestRow.id)
            )
            return BudgetRequestList(requests=tuple(_view(row) for row in rows))

    def answer(self, caller: Caller, request: str, answer: BudgetAnswer) -> tuple[BudgetRequestView, Policy | None]:
        """Grant a request by the dataset's next signed policy, or refuse it; (the request, the policy now in force).

        Raises:
            NotFoundError: no such request was put to the caller.
            ConflictError: it is answered already.
            InvalidRequestError: the policy doesn't give the user more.
            PolicyRefusedError: the owner's key didn't sign it, or it isn't the dataset's next one.
        """
        caller.require("owner")
        with self._database.write() as session:
            found = session.get(BudgetRequestRow, request)
            if found is None or found.owner != caller.user:
                raise NotFoundError("No such request was put to you.", next_step="cloister budget requests lists them.")
            dataset = session.get_one(Dataset, found.dataset, with_for_update=True)
            row = session.get_one(BudgetRequestRow, request, populate_existing=True)
            if row.state != "open":
                raise ConflictError(f"The request is {row.state} already.")
            policy = None
            if answer.granted is not None:
                policy = self._grant(session, caller, row, dataset, answer.granted)
            row.state = "refused" if policy is None else "granted"
            row.answer = answer.refused or ""
            row.policy_version = None if policy is None else policy.version
            row.answered = int(time.time())
            state: Literal["granted", "refused"] = "refused" if policy is None else "granted"
            content = _commitment(row, answer.digest())
            self._journal.append(session, BudgetAnswered(request=row.id, state=state, content=content))
            return _view(row), policy

    def _grant(
        self, session: Session, caller: Caller, row: BudgetRequestRow, dataset: Dataset, signed: SignedPolicy
    ) -> Policy:
        before = load_policy(session, dataset)
        policy = self._catalogue.put_policy(session, caller, row.dataset, signed).signed.policy()
        if not _gives_more(before, policy, row.user):
            raise InvalidRequestError(
                f"This policy gives {row.user} no more than the one in force.",
                why="A request is granted by a higher limit of the user, of a group of theirs, or of all users.",
                next_step="Raise one of them, or refuse the request with a reason.",
            )
        return policy

    def publish(self, view: BudgetRequestView) -> None:
        """Tell its user and its owner. Called from the event loop, once the transaction has committed."""
        self._events.publish(RequestEvent(request=view.request, state=view.state), frozenset({view.user, view.owner}))


def _gives_more(before: Policy, after: Policy, user: str) -> bool:
    if user not in after.readers:
        return False
    raised = after.population_limit.epsilon > before.population_limit.epsilon
    if user in after.users:
        raised |= user not in before.users or after.users[user].epsilon > before.users[user].epsilon
    for name in after.groups_of(user):
        raised |= name not in before.groups or after.groups[name].limit.epsilon > before.groups[name].limit.epsilon
    return raised


def _commitment(row: BudgetRequestRow, digest: str) -> str:
    """SHA-256 over the row's salt and what was said: leaves can never be erased, so they hold no text."""
    return hashlib.sha256(row.salt + digest.encode()).hexdigest()


def _view(row: BudgetRequestRow) -> BudgetRequestView:
    return BudgetRequestView.model_validate(
        {
            "request": row.id,
            "user": row.user,
            "owner": row.owner,
            "dataset": row.dataset,
            "epsilon": row.epsilon,
            "reason": row.reason,
            "state": row.state,
            "answer": row.answer,
            "policy_version": row.policy_version,
            "created": row.created,
            "answered": row.answered,
        }
    )
