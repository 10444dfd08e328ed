"""What is left: the privacy accounts of a dataset's people, as a meter and as figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cloister import rendering
from cloister.connection import Caller, current
from cloister_data.accounts import AccountList, AccountView

NOT_A_SUM = "Under composition `used` is less than the sum of the releases' own epsilons."


class Budget:
    """Some accounts. A request must fit all that it charges: the user's own and the one that all users share.

    Attributes:
        accounts: one `AccountView` each: `limit`, `used_share` in [0, 1], `used` = share x limit, `fits`.
    """

    def __init__(self, accounts: Iterable[AccountView]) -> None:
        self.accounts = tuple(
            sorted(accounts, key=lambda each: (each.population, _SCOPES.index(each.scope), each.account))
        )

    @property
    def limit(self) -> float:
        """The smallest epsilon limit (0 without accounts)."""
        return min((account.limit.epsilon for account in self.accounts), default=0.0)

    @property
    def used(self) -> float:
        """The largest `used`, in epsilon."""
        return max((account.used for account in self.accounts), default=0.0)

    @property
    def left(self) -> float:
        """The smallest `limit - used`, in epsilon, with what running jobs hold taken off."""
        return min((_left(account) for account in self.accounts), default=0.0)

    @property
    def fits(self) -> float:
        """The largest epsilon of one statistic that every account still admits."""
        return min((account.fits for account in self.accounts), default=0.0)

    def __len__(self) -> int:
        return len(self.accounts)

    def __repr__(self) -> str:
        if not self.accounts:
            return "No privacy accounts: no dataset here is open to you."
        rows = [
            [*cells, rendering.text_meter(account.used_share, account.reserved_share)]
            for cells, account in zip(_rows(self.accounts), self.accounts, strict=True)
        ]
        return f"{rendering.text_table([*_headers(self.accounts), ''], rows)}\n{NOT_A_SUM}"

    def _repr_html_(self) -> str:
        if not self.accounts:
            return "<p>No privacy accounts: no dataset here is open to you.</p>"
        meters = "".join(
            f"<div>{rendering.html_meter(account.used_share, account.reserved_share, _label(account))}</div>"
            for account in self.accounts
        )
        table = rendering.html_table(_headers(self.accounts), _rows(self.accounts))
        return rendering.html_box("Privacy budget", f"{meters}{table}<p><small>{NOT_A_SUM}</small></p>")


_SCOPES = ("user", "group", "population")


def _headers(accounts: Sequence[AccountView]) -> list[str]:
    part = ["part"] if any(account.part is not None for account in accounts) else []
    return ["population", *part, "account", "limit (epsilon, delta)", "used", "share", "held by jobs", "still fits"]


def _rows(accounts: Sequence[AccountView]) -> list[list[str]]:
    divided = any(account.part is not None for account in accounts)
    return [
        [
            account.population,
            *([account.part or "-"] if divided else []),
            who(account),
            f"{rendering.figure(account.limit.epsilon)}, {account.limit.delta:g}",
            rendering.figure(account.used),
            rendering.share(account.used_share),
            rendering.share(account.reserved_share) if account.reserved_share else "-",
            rendering.figure(account.fits),
        ]
        for account in accounts
    ]


def who(account: AccountView) -> str:
    if account.scope == "group":
        return f"group {account.group}"
    return f"user {account.user}" if account.scope == "user" else "all users"


def _left(account: AccountView) -> float:
    return max(0.0, account.limit.epsilon * (1.0 - account.used_share - account.reserved_share))


def _label(account: AccountView) -> str:
    used, limit = rendering.figure(account.used), rendering.figure(account.limit.epsilon)
    part = "" if account.part is None else f" ({account.part})"
    share = rendering.share(account.used_share)
    return f"{account.population}{part}, {who(account)}: epsilon {used} of {limit} used ({share})"


def fetch_budget(
    populations: frozenset[str] | None = None, caller: Caller | None = None, part: str | None = None
) -> Budget:
    """The caller's accounts, of all populations or of some; with `part` those of this part alone."""
    found = (caller or current()).call("GET", "/accounts", None, AccountList).accounts
    return Budget(
        account
        for account in found
        if (populations is None or account.population in populations) and (part is None or account.part == part)
    )


def budget() -> Budget:
    """Every privacy account that concerns you: limits, what is used, what still fits."""
    return fetch_budget()
