import pytest

import cloister
from cloister_data.errors import InvalidRequestError, UnavailableError
from cloister_data.statistics import QueryCostRequest, QueryRequest
from tests.fakes import answers
from tests.fakes.recording_guard import RecordingGuard

NAME = "hospital-a/patients"


def test_repr_shows_schema_owner_policy_and_budget(guard: RecordingGuard) -> None:
    shown = repr(cloister.dataset(NAME))
    for part in ("hospital-a", "0 to 120", "never, once, daily", "epsilon 3", "SIMULATED", "25%", "opaque"):
        assert part in shown


def test_html_escapes_what_owners_wrote(guard: RecordingGuard) -> None:
    shown = cloister.dataset(NAME)._repr_html_()
    assert "<script>" not in shown
    assert "<b>small" not in shown
    assert "&lt;script&gt;" in shown


def test_repr_survives_a_cloister_that_cannot_answer(guard: RecordingGuard) -> None:
    handle = cloister.dataset(NAME)
    guard.routes["GET /accounts"] = UnavailableError("The cloister can't answer at the moment.")
    assert "Budget unknown" in repr(handle)
    assert "Budget unknown" in handle._repr_html_()


def test_mock_rows_follow_the_schema_and_ask_nobody(guard: RecordingGuard) -> None:
    handle = cloister.dataset(NAME)
    before = len(guard.asked)
    frame = handle.mock(rows=200)
    assert list(frame.columns) == [column.name for column in answers.SCHEMA.columns]
    assert frame["age"].between(0, 120).all()
    assert set(frame["smoker"]) <= {"never", "once", "daily"}
    assert frame.equals(handle.mock(rows=200))
    assert len(guard.asked) == before


@pytest.mark.parametrize("rows", [0, -1, 2.5, True, "10"])
def test_mock_refuses_nonsense(guard: RecordingGuard, rows: object) -> None:
    with pytest.raises(InvalidRequestError):
        cloister.dataset(NAME).mock(rows=rows)  # type: ignore[arg-type]


def test_a_mean_is_asked_with_an_id_of_its_own(guard: RecordingGuard) -> None:
    guard.routes["POST /queries"] = answers.release()
    handle = cloister.dataset(NAME)
    first, second = handle["age"].mean(epsilon=0.2), handle["age"].mean(epsilon=0.2)
    asked = [QueryRequest.from_json(each.body) for each in guard.asked if each.path == "/queries"]
    assert asked[0].request_id != asked[1].request_id
    assert asked[0].question.operation == "mean"
    assert asked[0].question.column == "age"
    assert asked[0].question.source.dataset == NAME
    assert first.value == second.value == 54.25


def test_a_question_costs_nothing_until_it_is_asked(guard: RecordingGuard) -> None:
    guard.routes["POST /queries/cost"] = answers.cost()
    question = cloister.dataset(NAME).groupby("smoker")["age"].sum()
    assert guard.paths() == []
    cost = question.cost(epsilon=0.2)
    assert guard.paths() == ["/queries/cost"]
    asked = QueryCostRequest.from_json(guard.asked[-1].body)
    assert asked.question.group_by == "smoker"
    assert cost.admitted
    assert "nothing was spent" in repr(cost)
    assert "1.2%" in repr(cost)  # 1.11% rounded up


def test_counts(guard: RecordingGuard) -> None:
    guard.routes["POST /queries"] = answers.release()
    handle = cloister.dataset(NAME)
    handle.count(epsilon=0.1)
    handle["notes"].count(epsilon=0.1)
    handle.groupby("ill").count(epsilon=0.1)
    asked = [QueryRequest.from_json(each.body).question for each in guard.asked if each.path == "/queries"]
    assert [(each.column, each.group_by) for each in asked] == [(None, None), ("notes", None), (None, "ill")]


@pytest.mark.parametrize("epsilon", [0, -1.0, float("nan"), float("inf"), "1", True, 1001.0])
def test_a_bad_epsilon_is_refused_before_anything_is_sent(guard: RecordingGuard, epsilon: object) -> None:
    handle = cloister.dataset(NAME)
    with pytest.raises(InvalidRequestError, match="epsilon"):
        handle["age"].mean(epsilon=epsilon)  # type: ignore[call-overload]
    with pytest.raises(InvalidRequestError, match="epsilon"):
        handle["age"].mean().cost(epsilon=epsilon)  # type: ignore[arg-type]
    assert guard.paths() == []


def test_wrong_columns_are_refused_before_anything_is_sent(guard: RecordingGuard) -> None:
    handle = cloister.dataset(NAME)
    with pytest.raises(InvalidRequestError, match="Did you mean 'weight'"):
        handle["wieght"]
    with pytest.raises(InvalidRequestError, match="privacy unit"):
        handle["patient"]
    with pytest.raises(InvalidRequestError, match="type category"):
        handle["smoker"].mean(epsilon=1)
    with pytest.raises(InvalidRequestError, match="can't be grouped"):
        handle.groupby("age")
    with pytest.raises(InvalidRequestError, match="rows"):
        handle[0]  # type: ignore[index]
    assert guard.paths() == []


def test_a_handle_pretends_to_hold_no_rows(guard: RecordingGuard) -> None:
    handle = cloister.dataset(NAME)
    with pytest.raises(InvalidRequestError, match="never leave"):
        list(handle)
    with pytest.raises(InvalidRequestError, match="no length"):
        len(handle)
    assert handle


def test_split_and_concat(guard: RecordingGuard) -> None:
    a, b = cloister.dataset(NAME), cloister.dataset("hospital-b/patients")
    train, test = cloister.concat([a, b]).split(test=0.3)
    assert [(each.dataset, each.part, each.test) for each in train.sources] == [
        (NAME, "train", 0.3),
        ("hospital-b/patients", "train", 0.3),
    ]
    assert {each.part for each in test.sources} == {"test"}
    assert train.units == 570
    assert {account.population for account in train.budget.accounts} == {NAME, "hospital-b/patients"}
    with pytest.raises(InvalidRequestError, match="already"):
        train.split()
    with pytest.raises(InvalidRequestError, match="one dataset"):
        train["age"].mean(epsilon=1)
    with pytest.raises(InvalidRequestError, match="different parts"):
        cloister.concat([a.split()[0], b.split(test=0.3)[0]])
    with pytest.raises(InvalidRequestError, match="twice"):
        cloister.concat([a, a])
    with pytest.raises(InvalidRequestError, match="list of dataset handles"):
        cloister.concat([])
    for wrong in (0, 1, -0.5, float("nan"), "0.2"):
        with pytest.raises(InvalidRequestError, match="test"):
            a.split(test=wrong)  # type: ignore[arg-type]


def test_concat_needs_one_schema(guard: RecordingGuard) -> None:
    other = answers.SCHEMA.model_copy(update={"columns": answers.SCHEMA.columns[:3]})
    guard.routes["GET /datasets/hospital-b/patients"] = answers.dataset("hospital-b/patients", other)
    with pytest.raises(InvalidRequestError, match="same schema"):
        cloister.concat([cloister.dataset(NAME), cloister.dataset("hospital-b/patients")])
