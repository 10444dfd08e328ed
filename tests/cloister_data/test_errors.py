"""One tree of errors: each crosses the wire as a problem and comes back as itself."""

import pytest

from cloister_data import errors
from cloister_data.errors import BudgetFacts, BudgetRefusedError, CloisterError, Problem, from_problem


def kinds() -> list[type[CloisterError]]:
    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, CloisterError)]
    assert len(found) > 15
    return [kind for kind in found if kind is not CloisterError]


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_round_trip(kind: type[CloisterError]) -> None:
    error = kind("What happened.", why="Why it did.", next_step="What to do.")
    problem = Problem.from_json(error.to_problem().to_json())
    assert problem.type == f"urn:cloister:problem:{kind.code}"
    assert 400 <= problem.status <= 599
    again = from_problem(problem)
    if kind is not errors.InternalError:
        assert type(again) is kind
    assert (again.what, again.why, again.next_step) == ("What happened.", "Why it did.", "What to do.")
    assert str(again) == "What happened. Why it did. What to do."


def test_codes_are_told_apart() -> None:
    codes = [kind.code for kind in kinds()]
    assert len(set(codes)) == len(codes)


def test_the_figures_of_a_refusal_survive() -> None:
    facts = BudgetFacts(account="a/b:ada", asked=2.0, left=0.5, fits=0.4, delta=1e-5, hint="Ask for less.")
    error = BudgetRefusedError("It doesn't fit.", budget=facts)
    again = from_problem(Problem.from_json(error.to_problem().to_json()))
    assert isinstance(again, BudgetRefusedError)
    assert again.budget == facts


def test_an_unknown_code_is_a_plain_error() -> None:
    problem = Problem(type="urn:cloister:problem:new", title="New.", status=418, code="new")
    assert type(from_problem(problem)) is CloisterError


def test_the_other_sides_words_steer_no_terminal() -> None:
    said = "a\x1b]0;owned\x07b\u009b2J\u202ec\nd"
    facts = BudgetFacts(account=said, asked=1, left=0, fits=0, delta=1e-5, hint=said)
    problem = Problem(type="x", title=said, status=403, code="budget-refused", why=said, next=said, budget=facts)
    error = from_problem(problem)
    assert error.budget is not None
    texts = {error.what, error.why, error.next_step, error.budget.account, error.budget.hint}
    assert texts == {"a ]0;owned b 2J c\nd"}


def test_a_long_message_still_fits_its_problem() -> None:
    assert len(CloisterError("x" * 10_000, why="y" * 10_000).to_problem().title) == 4000


def test_a_notebook_shows_the_users_line_and_the_sentences_alone() -> None:
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shown: list[str] = []
    shell._showtraceback = lambda kind, value, lines: shown.extend(lines)  # type: ignore[method-assign]
    cell = (
        "from cloister_data.errors import BudgetRefusedError\n"
        "def inside():\n    raise BudgetRefusedError('Too much.', why='2 is left.', next_step='Ask for 2.')\n"
        "inside()"
    )
    result = shell.run_cell(cell)
    assert isinstance(result.error_in_exec, BudgetRefusedError)
    text = "\n".join(shown)
    assert "line 4: inside()" in text
    assert text.endswith("BudgetRefusedError: Too much.\n2 is left.\nAsk for 2.")
    assert "Traceback" not in text
