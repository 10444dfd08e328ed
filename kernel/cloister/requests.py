"""Asking a data owner for more budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cloister import rendering
from cloister.connection import Caller, current
from cloister_data.requests import BudgetRequest, BudgetRequestList, BudgetRequestView

HEADERS = ("request", "dataset", "user", "more epsilon", "reason", "state", "answer")


def request_rows(requests: Iterable[BudgetRequestView]) -> list[list[str]]:
    return [
        [
            each.request[:8],
            each.dataset,
            each.user,
            rendering.figure(each.epsilon),
            each.reason,
            each.state,
            each.answer if each.policy_version is None else f"policy version {each.policy_version}",
        ]
        for each in requests
    ]


class BudgetRequests:
    """Requests for more budget, the oldest first.

    Attributes:
        requests: one `BudgetRequestView` each; `state` is "open", "granted" or "refused".
    """

    def __init__(self, requests: Iterable[BudgetRequestView]) -> None:
        self.requests = tuple(requests)

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[BudgetRequestView]:
        return iter(self.requests)

    def __repr__(self) -> str:
        if not self.requests:
            return "No requests for more budget."
        return rendering.text_table(HEADERS, request_rows(self.requests))

    def _repr_html_(self) -> str:
        if not self.requests:
            return "<p>No requests for more budget.</p>"
        return rendering.html_box("Requests", rendering.html_table(HEADERS, request_rows(self.requests)))


def request_budget(dataset: str, epsilon: float, reason: str, caller: Caller | None = None) -> BudgetRequests:
    """Ask the owner of a dataset for a limit that is higher by `epsilon`. You have one open request for a dataset."""
    wanted = BudgetRequest(dataset=dataset, epsilon=epsilon, reason=reason)
    return BudgetRequests([(caller or current()).call("POST", "/requests", wanted, BudgetRequestView)])


def budget_requests(caller: Caller | None = None) -> BudgetRequests:
    """Your requests for more budget, and what their owners answered."""
    return BudgetRequests((caller or current()).call("GET", "/requests", None, BudgetRequestList).requests)
