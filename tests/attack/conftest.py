"""The ledger's databases, for attacks on either of them."""

from tests.cloister_budget.conftest import kind, postgres, url

__all__ = ["kind", "postgres", "url"]
