"""Handles of parts: what they name, show and refuse, before anything is charged."""

import pytest

import cloister
from cloister.accounts import Budget
from cloister_data.accounts import AccountList
from cloister_data.datasets import DatasetView
from cloister_data.errors import InvalidRequestError
from cloister_data.schema import BooleanColumn, Schema
from cloister_data.statistics import QueryRequest
from tests.fakes import answers
from tests.fakes.recording_guard import RecordingGuard
from tests.fakes.sites import SITES, SIZES, sited

NAMES = ("hospital-a/patients", "hospital-b/patients")


def divided(name: str, schema: Schema | None = None, **units: int) -> DatasetView:
    view = answers.dataset(name, schema or sited())
    return view.model_copy(update={"part_units": units or SIZES, "units": sum((units or SIZES).values())})


def accounts(*names: str) -> AccountList:
    """For each part of each population one account of the user and one of all users, the fuller the later the part."""
    found = []
    for each in answers.accounts(*names).accounts:
        for number, site in enumerate(SITES):
            account = each.account.replace(each.population, f"{each.population}[{site}]")
            more = {"part": site, "account": account, "used_share": 0.2 + 0.25 * number, "used": 1.6 + 2 * number}
            found.append(each.model_copy(update=more))
    return AccountList(accounts=tuple(found))


@pytest.fixture
def clinics(guard: RecordingGuard) -> RecordingGuard:
    for name in NAMES:
        guard.routes[f"GET /datasets/{name}"] = divided(name)
    guard.routes["GET /accounts"] = accounts(*NAMES)
    return guard


def test_a_part_is_a_handle_of_its_own(clinics: RecordingGuard) -> None:
    whole = cloister.dataset(NAMES[0])
    assert (whole.parts, whole.units) == (SITES, 1000)
    south = whole.part("south")
    assert (south.name, south.parts, south.units, south.side) == (NAMES[0], ("south",), 300, "all")
    assert [(each.division, each.part) for each in south.sources] == [("south", "all")]
    assert [each.division for each in whole.sources] == [None]
    assert "part south" in repr(south)
    assert "by site: north 600, south 300, east 100" in repr(whole)
    assert "part south" in south._repr_html_()
    assert set(south.mock(rows=20).site) == {"south"}
    assert set(whole.mock(rows=200).site) == set(SITES)


def test_parts_and_splits_go_together_in_either_order(clinics: RecordingGuard) -> None:
    whole = cloister.dataset(NAMES[0])
    one, other = whole.part("east").split(test=0.3)[0], whole.split(test=0.3)[0].part("east")
    assert one.sources == other.sources
    assert (one.sources[0].division, one.sources[0].part, one.sources[0].test) == ("east", "train", 0.3)
    assert "part east, train part" in repr(one)
    with pytest.raises(InvalidRequestError, match="can't be split again"):
        other.split()


def test_a_question_names_its_part(clinics: RecordingGuard) -> None:
    clinics.routes["POST /queries"] = answers.release()
    north = cloister.dataset(NAMES[0]).part("north")
    north["age"].mean(epsilon=0.1)
    north.groupby("site").count(epsilon=0.1)
    asked = [QueryRequest.from_json(each.body).question for each in clinics.asked if each.path == "/queries"]
    assert [each.source.division for each in asked] == ["north", "north"]
    assert "hospital-a/patients (north)" in repr(north["age"].mean())


def test_what_is_no_part_is_refused_before_anything_is_sent(clinics: RecordingGuard) -> None:
    whole = cloister.dataset(NAMES[0])
    for wrong in ("west", "", 3, None, ["north"]):
        with pytest.raises(InvalidRequestError, match=r"no part .*\n?.*'north', 'south', 'east'"):
            whole.part(wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="already"):
        whole.part("north").part("south")
    clinics.routes[f"GET /datasets/{NAMES[0]}"] = answers.dataset(NAMES[0])
    plain = cloister.dataset(NAMES[0])
    assert plain.parts == ()
    with pytest.raises(InvalidRequestError, match="hasn't divided"):
        plain.part("north")
    assert clinics.paths() == []


def test_parts_join_parts_of_the_same_name(clinics: RecordingGuard) -> None:
    a, b = (cloister.dataset(name) for name in NAMES)
    both = cloister.concat([a.part("north"), b.part("north")])
    assert [(each.dataset, each.division) for each in both.sources] == [(name, "north") for name in NAMES]
    assert both.sources == cloister.concat([a, b]).part("north").sources
    assert both.units == 1200
    for wrong in ([a.part("north"), b.part("south")], [a, b.part("north")]):
        with pytest.raises(InvalidRequestError, match="different parts"):
            cloister.concat(wrong)
    with pytest.raises(InvalidRequestError, match="twice"):
        cloister.concat([a.part("north"), a.part("south")])


def test_a_joined_handle_has_the_parts_that_all_of_it_has(clinics: RecordingGuard) -> None:
    clinics.routes[f"GET /datasets/{NAMES[1]}"] = answers.dataset(NAMES[1], sited(partition=None))
    both = cloister.concat([cloister.dataset(name) for name in NAMES])
    assert both.parts == ()
    with pytest.raises(InvalidRequestError, match="no part"):
        both.part("north")


def test_the_budget_of_a_part_is_that_parts(clinics: RecordingGuard) -> None:
    whole = cloister.dataset(NAMES[0])
    east = whole.part("east").budget
    assert {each.part for each in east.accounts} == {"east"}
    assert (len(east), len(whole.budget)) == (2, 6)
    assert east.used == pytest.approx(5.6)
    # The whole has no more left than its fullest part.
    assert whole.budget.left == pytest.approx(min(whole.part(site).budget.left for site in SITES))
    for shown in (repr(whole.budget), whole.budget._repr_html_()):
        assert "part" in shown
        assert "north" in shown


def test_no_column_of_parts_where_there_are_none() -> None:
    budget = Budget(answers.accounts(NAMES[0]).accounts)
    assert "part" not in repr(budget).splitlines()[0].split()
    assert ">part<" not in budget._repr_html_()


def test_a_boolean_column_divides_too(clinics: RecordingGuard) -> None:
    columns = (*sited().columns, BooleanColumn(name="abroad"))
    schema = sited().model_copy(update={"columns": columns, "partition": "abroad"})
    clinics.routes[f"GET /datasets/{NAMES[0]}"] = divided(NAMES[0], schema, false=2, true=3)
    handle = cloister.dataset(NAMES[0])
    assert handle.parts == ("false", "true")
    assert handle.part("true").units == 3
    assert handle.part("true").mock(rows=9).abroad.all()
    assert not handle.part("false").mock(rows=9).abroad.any()
