"""The ledger's promises, on both databases."""

from __future__ import annotations

import pytest

from cloister_budget.database import Database
from cloister_budget.ledger import Ledger
from cloister_budget.loss import INFINITE
from cloister_budget.tables import Account, ChargeRow
from cloister_data.accounts import AccountView
from cloister_data.errors import (
    BudgetRefusedError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    PolicyRefusedError,
)
from cloister_data.mechanism import DpSgd
from tests.fakes.ledgers import POPULATION, laplace, policy, ready, request_id, reservation, training

BOTH_ACCOUNTS = [POPULATION, f"{POPULATION}:alice"]


def views(database: Database, ledger: Ledger, user: str | None = "alice") -> dict[str, AccountView]:
    with database.read() as s:
        return {view.account: view for view in ledger.account_views(s, user)}


def pay(database: Database, ledger: Ledger, mechanism: object, **more: object) -> str:
    with database.write() as s:
        return ledger.reserve(s, reservation(BOTH_ACCOUNTS, mechanism, **more)).charge_id  # type: ignore[arg-type]


def vectors(database: Database) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    with database.read() as s:
        return {row.id: (row.spent, row.reserved) for row in s.query(Account)}


def test_one_query_takes_the_whole_of_a_limit_that_it_equals(database: Database) -> None:
    ledger = ready(database, 0.2)
    pay(database, ledger, laplace("0.2"))
    with pytest.raises(BudgetRefusedError) as refused:
        pay(database, ledger, laplace("0.01"))
    assert refused.value.budget is not None
    assert refused.value.budget.account == POPULATION
    assert (refused.value.budget.left, refused.value.budget.fits) == (0, 0)


def test_a_refusal_says_what_was_asked_what_is_left_and_what_fits(database: Database) -> None:
    ledger = ready(database, 1.0, alice=0.5)
    pay(database, ledger, laplace("0.25"))
    before = vectors(database)
    with pytest.raises(BudgetRefusedError) as refused:
        pay(database, ledger, laplace("0.5"))
    facts = refused.value.budget
    assert facts is not None
    assert facts.account == f"{POPULATION}:alice"
    assert facts.asked == 0.5
    assert facts.left == pytest.approx(0.25)
    assert facts.fits == pytest.approx(0.25)
    assert "0.25" in facts.hint
    assert vectors(database) == before
    pay(database, ledger, laplace("0.25"))


def test_what_is_said_to_fit_a_training_does_fit(database: Database) -> None:
    from cloister_budget.calibrate import noise_multiplier

    ledger = ready(database, 2.0)
    asked = training(steps=200, sigma=1.5)
    with pytest.raises(BudgetRefusedError) as refused:
        pay(database, ledger, asked)
    facts = refused.value.budget
    assert facts is not None
    assert 0 < facts.fits < facts.asked
    quieter = noise_multiplier(facts.fits, facts.delta, asked.sample_rate, asked.steps)
    pay(database, ledger, asked.model_copy(update={"noise_multiplier": quieter}))


def test_a_charge_is_on_every_account_or_on_none(database: Database) -> None:
    ledger = ready(database, 1.0, alice=1.0, bob=1.0)
    with database.write() as s:
        ids = ledger.account_ids(s, [POPULATION], "bob")
        assert ids == [POPULATION, f"{POPULATION}:bob"]
        ledger.reserve(s, reservation(ids, laplace("0.5"), user="bob"))
    pay(database, ledger, laplace("0.5"))
    # Users collude: alice has half of her own limit left, the population has nothing.
    with pytest.raises(BudgetRefusedError) as refused:
        pay(database, ledger, laplace("0.1"))
    assert refused.value.budget is not None
    assert refused.value.budget.account == POPULATION
    seen = views(database, ledger)
    assert seen[POPULATION].reserved_share == 1
    assert seen[f"{POPULATION}:alice"].reserved_share == 0.5
    assert set(seen) == set(BOTH_ACCOUNTS)
    assert set(views(database, ledger, None)) == {*BOTH_ACCOUNTS, f"{POPULATION}:bob"}


def test_the_same_request_is_paid_once(database: Database) -> None:
    ledger = ready(database)
    request = request_id()
    first = pay(database, ledger, laplace("0.2"), request=request)
    before = vectors(database)
    with database.write() as s:
        again = ledger.reserve(s, reservation(BOTH_ACCOUNTS, laplace("0.2"), request=request))
    assert (again.charge_id, again.fresh, again.state) == (first, False, "reserved")
    assert vectors(database) == before
    with pytest.raises(ConflictError):
        pay(database, ledger, laplace("0.2"), request=request, digest="1" * 64)
    # Another user's request ids are another space.
    with database.write() as s:
        ledger.set_limits(s, POPULATION, policy(1.0, alice=1.0, bob=1.0))
        other = ledger.reserve(
            s, reservation([POPULATION, f"{POPULATION}:bob"], laplace("0.2"), user="bob", request=request)
        )
    assert other.fresh


def test_a_repeated_request_is_answered_even_when_nothing_more_fits(database: Database) -> None:
    ledger = ready(database, 0.2)
    request = request_id()
    first = pay(database, ledger, laplace("0.2"), request=request)
    assert pay(database, ledger, laplace("0.2"), request=request) == first


def test_a_statistic_is_spent_or_given_back(database: Database) -> None:
    ledger = ready(database)
    kept, dropped = pay(database, ledger, laplace("0.2")), pay(database, ledger, laplace("0.25"))
    with database.write() as s:
        ledger.commit(s, kept)
        ledger.commit(s, kept)
        ledger.refund(s, dropped)
        ledger.refund(s, dropped)
    for spent, reserved in vectors(database).values():
        assert spent[-1] == 200_000_000_000
        assert set(reserved) == {0}
    with database.write() as s:
        with pytest.raises(ConflictError):
            ledger.refund(s, kept)
        with pytest.raises(ConflictError):
            ledger.commit(s, dropped)
        with pytest.raises(ConflictError):
            ledger.mark(s, kept, 1)
        with pytest.raises(NotFoundError):
            ledger.commit(s, "f" * 32)
        assert ledger.charge_view(s, kept).state == "committed"
        assert ledger.charge_view(s, dropped).state == "released"
        assert ledger.charge_view(s, kept).accounts == tuple(BOTH_ACCOUNTS)


def test_marked_steps_never_come_back_and_unmarked_ones_do(database: Database) -> None:
    ledger = ready(database, 4.0)
    charge = pay(database, ledger, training(steps=100))
    whole = vectors(database)[POPULATION][1]
    with database.write() as s:
        ledger.mark(s, charge, 30)
        ledger.mark(s, charge, 10)
        with pytest.raises(ConflictError):
            ledger.mark(s, charge, 101)
    spent, reserved = vectors(database)[POPULATION]
    assert all(a + b == c for a, b, c in zip(spent, reserved, whole, strict=True))
    assert spent[:-1] == tuple(-(-loss * 30 // 100) for loss in whole[:-1])
    assert spent[-1] == INFINITE
    with database.write() as s, pytest.raises(ConflictError):
        ledger.refund(s, charge)
    with database.write() as s:
        ledger.mark(s, charge, 40)
        ledger.commit(s, charge)
    spent, reserved = vectors(database)[POPULATION]
    assert set(reserved) == {0}
    assert spent[:-1] == tuple(-(-loss * 40 // 100) for loss in whole[:-1])
    with database.read() as s:
        view = ledger.charge_view(s, charge)
    assert (view.state, view.steps, view.steps_charged) == ("committed", 100, 40)


def test_a_training_that_never_marked_costs_nothing(database: Database) -> None:
    ledger = ready(database, 4.0)
    charge = pay(database, ledger, training())
    with database.write() as s:
        ledger.commit(s, charge)
        assert ledger.charge_view(s, charge).state == "released"
    assert all(set(spent) == {0} and set(reserved) == {0} for spent, reserved in vectors(database).values())


def test_what_a_dead_guard_left_is_settled_from_the_marks(database: Database) -> None:
    ledger = ready(database, 4.0)
    statistic, marked = pay(database, ledger, laplace("0.2")), pay(database, ledger, training())
    unmarked, done = pay(database, ledger, training()), pay(database, ledger, laplace("0.1"))
    with database.write() as s:
        ledger.mark(s, marked, 10)
        ledger.commit(s, done)
    with database.write() as s:
        assert set(ledger.settle_dead(s)) == {statistic, marked, unmarked}
        assert ledger.settle_dead(s) == []
    with database.read() as s:
        states = {row.id: (row.state, row.steps_marked) for row in s.query(ChargeRow)}
    assert states == {
        statistic: ("committed", 0), marked: ("committed", 10), unmarked: ("released", 0), done: ("committed", 0)
    }  # fmt: skip
    assert all(set(reserved) == {0} for _, reserved in vectors(database).values())


def test_marks_show_as_reserved_until_the_training_ends(database: Database) -> None:
    """How fast they move tells the batches' pace, which is private; what is held together never changes."""
    ledger = ready(database, 10.0)
    charge = pay(database, ledger, training(steps=100))
    before = views(database, ledger)
    for steps in (5, 60):
        with database.write() as s:
            ledger.mark(s, charge, steps)
        assert views(database, ledger) == before
    with database.write() as s:
        ledger.commit(s, charge)
    after = views(database, ledger)[POPULATION]
    assert (after.used_share > 0, after.reserved_share) == (True, 0)


def test_lowering_a_limit_holds_at_once_and_the_highest_is_remembered(database: Database) -> None:
    ledger = ready(database, 1.0)
    pay(database, ledger, laplace("0.5"))
    with database.write() as s:
        ledger.set_limits(s, POPULATION, policy(0.4))
    with pytest.raises(BudgetRefusedError):
        pay(database, ledger, laplace("0.1"))
    view = views(database, ledger)[POPULATION]
    assert view.limit.epsilon == 0.4
    assert view.used_share + view.reserved_share == 1
    with database.write() as s:
        row = s.get(Account, POPULATION)
        assert row is not None
        assert (row.epsilon, row.highest_epsilon) == (0.4, 1.0)
        ledger.set_limits(s, POPULATION, policy(2.0))
    pay(database, ledger, laplace("0.1"))


def test_a_policy_leaves_the_accounts_of_users_that_it_does_not_list(database: Database) -> None:
    ledger = ready(database, 1.0, alice=1.0)
    pay(database, ledger, laplace("0.5"))
    with database.write() as s:
        ledger.set_limits(s, POPULATION, policy(1.0, bob=0.5))
    with database.write() as s:
        ledger.set_limits(s, POPULATION, policy(1.0, alice=1.0))
    assert views(database, ledger)[f"{POPULATION}:alice"].reserved_share == 0.5


def test_a_suspended_account_admits_nothing(database: Database) -> None:
    ledger = ready(database)
    with database.write() as s:
        ledger.suspend(s, [POPULATION], True)
        assert not ledger.quote(s, laplace("0.1"), BOTH_ACCOUNTS).admitted
    with pytest.raises(BudgetRefusedError, match="suspended"):
        pay(database, ledger, laplace("0.1"))
    assert views(database, ledger)[POPULATION].fits == 0
    with database.write() as s:
        ledger.suspend(s, [POPULATION], False)
    pay(database, ledger, laplace("0.1"))


def test_a_quote_spends_nothing_and_says_what_a_reservation_will(database: Database) -> None:
    ledger = ready(database)
    before = vectors(database)
    with database.read() as s:
        quote = ledger.quote(s, laplace("0.25"), BOTH_ACCOUNTS)
        over = ledger.quote(s, training(sigma=0.5), BOTH_ACCOUNTS)
    assert quote.admitted
    assert quote.shares == dict.fromkeys(BOTH_ACCOUNTS, 0.25)
    assert quote.left == 1
    assert not over.admitted
    assert over.blocking == POPULATION
    assert over.fits is not None
    assert 0 < over.fits < 1.2
    assert vectors(database) == before


def test_several_populations_are_each_charged_in_full_at_their_own_orders(database: Database) -> None:
    ledger = ready(database, 8.0)
    with database.write() as s:
        ledger.set_limits(s, "hospital-b/patients", policy(0.5, alice=0.5))
    with database.write() as s:
        ids = ledger.account_ids(s, [POPULATION, "hospital-b/patients"], "alice")
        assert len(ids) == 4
        ledger.reserve(s, reservation(ids, laplace("0.5")))
    found = vectors(database)
    assert len(found) == 4
    assert all(reserved[-1] == 500_000_000_000 for _, reserved in found.values())


def test_a_charge_without_an_account_is_refused(database: Database) -> None:
    ledger = ready(database)
    with database.write() as s:
        for accounts in ([], [POPULATION, POPULATION], [POPULATION, "nobody"]):
            with pytest.raises(InvalidRequestError):
                ledger.reserve(s, reservation(accounts, laplace("0.1")))
        with pytest.raises(PolicyRefusedError):
            ledger.account_ids(s, [POPULATION], "mallory")
        with pytest.raises(PolicyRefusedError):
            ledger.account_ids(s, [], "alice")
        with pytest.raises(InvalidRequestError, match="same people"):
            ledger.account_ids(s, [POPULATION, POPULATION], "alice")


def test_an_unbounded_loss_is_refused(database: Database) -> None:
    ledger = ready(database, 1000.0)
    with pytest.raises(BudgetRefusedError):
        pay(database, ledger, DpSgd(noise_multiplier=1e-6, sample_rate=1, steps=10), epsilon=1.0)


def test_used_reaches_the_limit_when_nothing_more_is_admitted(database: Database) -> None:
    ledger = ready(database, 0.5)
    for _ in range(5):
        charge = pay(database, ledger, laplace("0.1"))
        with database.write() as s:
            ledger.commit(s, charge)
    view = views(database, ledger)[POPULATION]
    assert (view.used_share, view.used, view.fits, view.reserved_share) == (1, 0.5, 0, 0)
