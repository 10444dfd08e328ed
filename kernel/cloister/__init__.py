"""Work on data that you can never see: opaque handles, private statistics, private training.

In a cloister's kernel everything is ready; on a laptop choose a cloister first with `cloister.use(NAME)`.

    import cloister
    cloister.datasets()
    ds = cloister.dataset("hospital-a/breast-cancer")
    ds["mean radius"].mean(epsilon=0.2)
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cloister.accounts import Budget, budget
    from cloister.catalogue import Catalogue, dataset, datasets
    from cloister.connection import use
    from cloister.handle import DatasetHandle, concat
    from cloister.job import Job, Jobs, jobs
    from cloister.question import Cost, Question
    from cloister.releases import History, Release, history
    from cloister.requests import BudgetRequests, budget_requests, request_budget
    from cloister.training import Rehearsal
    from cloister.verdict import Attestation, attestation
    from cloister_data.errors import (
        AttestationRefusedError,
        AuthenticationError,
        BudgetRefusedError,
        CloisterError,
        ConfigurationError,
        ConflictError,
        ForbiddenError,
        InvalidRequestError,
        JobFailedError,
        NotFoundError,
        PolicyRefusedError,
        SessionExpiredError,
        UnavailableError,
        UnreachableError,
        UnsupportedModelError,
    )

__all__ = [
    "Attestation",
    "AttestationRefusedError",
    "AuthenticationError",
    "Budget",
    "BudgetRefusedError",
    "BudgetRequests",
    "Catalogue",
    "CloisterError",
    "ConfigurationError",
    "ConflictError",
    "Cost",
    "DatasetHandle",
    "ForbiddenError",
    "History",
    "InvalidRequestError",
    "Job",
    "JobFailedError",
    "Jobs",
    "NotFoundError",
    "PolicyRefusedError",
    "Question",
    "Rehearsal",
    "Release",
    "SessionExpiredError",
    "UnavailableError",
    "UnreachableError",
    "UnsupportedModelError",
    "attestation",
    "budget",
    "budget_requests",
    "concat",
    "dataset",
    "datasets",
    "history",
    "jobs",
    "request_budget",
    "use",
]

_WHERE = {
    "cloister.accounts": (
        "Budget",
        "budget",
    ),
    "cloister.catalogue": (
        "Catalogue",
        "dataset",
        "datasets",
    ),
    "cloister.connection": ("use",),
    "cloister.handle": (
        "DatasetHandle",
        "concat",
    ),
    "cloister.job": (
        "Job",
        "Jobs",
        "jobs",
    ),
    "cloister.question": (
        "Cost",
        "Question",
    ),
    "cloister.releases": (
        "History",
        "Release",
        "history",
    ),
    "cloister.requests": (
        "BudgetRequests",
        "budget_requests",
        "request_budget",
    ),
    "cloister.training": ("Rehearsal",),
    "cloister.verdict": (
        "Attestation",
        "attestation",
    ),
    "cloister_data.errors": (
        "AttestationRefusedError",
        "AuthenticationError",
        "BudgetRefusedError",
        "CloisterError",
        "ConfigurationError",
        "ConflictError",
        "ForbiddenError",
        "InvalidRequestError",
        "JobFailedError",
        "NotFoundError",
        "PolicyRefusedError",
        "SessionExpiredError",
        "UnavailableError",
        "UnreachableError",
        "UnsupportedModelError",
    ),
}
"""Which module has which public name. A kernel has this package before its first cell, and starts at once nevertheless:
each name is imported when it is used.
"""


def __getattr__(name: str) -> object:
    for module, names in _WHERE.items():
        if name in names:
            value: object = getattr(importlib.import_module(module), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *globals()})
