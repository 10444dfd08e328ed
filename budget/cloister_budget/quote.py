"""What a request would cost an account, and what would fit where it doesn't. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from cloister_budget import calibrate
from cloister_budget.filter import admits, admits_direct, share_up, used_share
from cloister_budget.loss import Vector, direct_delta, rdp_vector
from cloister_budget.orders import Orders
from cloister_data.errors import BudgetFacts, BudgetRefusedError
from cloister_data.mechanism import DpSgd, Mechanism
from cloister_data.policy import Limit


@dataclass(frozen=True)
class Standing:
    """An account as it stands: its limit, its population's orders, its vectors over them, and its direct deltas."""

    account: str
    limit: Limit
    orders: Orders
    budgets: Vector
    spent: Vector
    reserved: Vector
    direct_budget: int
    direct_spent: int
    direct_reserved: int
    suspended: bool

    @property
    def held(self) -> Vector:
        """Executed and reserved together: what admission counts."""
        return tuple(done + kept for done, kept in zip(self.spent, self.reserved, strict=True))

    def admits(self, charge: Vector, direct: int) -> bool:
        """`direct` is the charge's direct delta, in `orders.DIRECT_UNIT`."""
        return (
            not self.suspended
            and admits_direct(self.direct_budget, self.direct_spent, self.direct_reserved, direct)
            and admits(self.budgets, self.spent, self.reserved, charge)
        )

    def share_of(self, charge: Vector) -> Fraction:
        """How much the share that is held would grow by this charge."""
        after = tuple(held + asked for held, asked in zip(self.held, charge, strict=True))
        return used_share(self.budgets, after) - used_share(self.budgets, self.held)

    def left(self) -> float:
        """What nobody holds of the limit, as a share of its epsilon, rounded down."""
        return 0.0 if self.suspended else float(1 - used_share(self.budgets, self.held)) * self.limit.epsilon


@dataclass(frozen=True)
class Quote:
    """`shares`: by account, the share of its limit that the request would add (in [0, 1], rounded up).

    `blocking` is the first account that refuses it, or None. `left` is what the tightest account has left (epsilon).
    `fits` is the epsilon of the largest request of the same kind that all accounts admit; None where the request itself
    is admitted. `hint` says it in a sentence.
    """

    shares: dict[str, float]
    admitted: bool
    blocking: str | None
    left: float
    fits: float | None
    hint: str


def quote_of(mechanism: Mechanism, standings: Sequence[Standing], delta: float | None = None) -> Quote:
    vectors = [rdp_vector(mechanism, standing.orders) for standing in standings]
    direct = direct_delta(mechanism)
    shares = {
        standing.account: share_up(standing.share_of(vector))
        for standing, vector in zip(standings, vectors, strict=True)
    }
    blocking = next((s for s, vector in zip(standings, vectors, strict=True) if not s.admits(vector, direct)), None)
    left = min(standing.left() for standing in standings)
    if blocking is None:
        return Quote(shares, True, None, left, None, "")
    fits, hint = what_fits(mechanism, standings, blocking.limit.delta if delta is None else delta)
    return Quote(shares, False, blocking.account, left, fits, hint)


def within_accounts(standings: Sequence[Standing]) -> Callable[[Mechanism], bool]:
    """Whether a mechanism is admitted by every one of these accounts now: what `calibrate` is to fit."""

    def fits(mechanism: Mechanism) -> bool:
        direct = direct_delta(mechanism)
        return all(standing.admits(rdp_vector(mechanism, standing.orders), direct) for standing in standings)

    return fits


def what_fits(mechanism: Mechanism, standings: Sequence[Standing], delta: float) -> tuple[float, str]:
    """The epsilon of the largest request of the same kind that every account admits, and a sentence about it."""
    if any(standing.suspended for standing in standings):
        return 0.0, "An account is suspended by the data owner."
    if isinstance(mechanism, DpSgd):
        fitting = min(calibrate.steps_that_fit(mechanism, s.budgets, s.spent, s.reserved, s.orders) for s in standings)
        noisier = calibrate.noise_that_fits(mechanism, within_accounts(standings))
        epsilon = 0.0 if noisier is None else calibrate.epsilon_below(noisier, delta)
        if epsilon <= 0:
            return 0.0, "No training fits what is left."
        steps = f" At the noise that was asked for, {fitting} of its {mechanism.steps} steps would fit."
        return epsilon, f"The same training fits at epsilon {epsilon:.4g}.{steps}"
    fits = min(calibrate.laplace_epsilon_that_fits(s.budgets, s.spent, s.reserved, s.orders) for s in standings)
    return fits, f"A statistic at epsilon {fits:.4g} fits." if fits > 0 else "Nothing fits what is left."


def refusal(mechanism: Mechanism, asked: float, delta: float, standings: Sequence[Standing]) -> BudgetRefusedError:
    """The error for a request that some account refuses."""
    quote = quote_of(mechanism, standings, delta)
    account = quote.blocking or standings[0].account
    return BudgetRefusedError(
        f"The request is over the budget of {account}.",
        why=f"It asks for epsilon {asked:.4g}; {quote.left:.4g} is left.",
        next_step=quote.hint or "Ask for less.",
        budget=BudgetFacts(
            account=account, asked=asked, left=quote.left, fits=quote.fits or 0.0, delta=delta, hint=quote.hint
        ),
    )
