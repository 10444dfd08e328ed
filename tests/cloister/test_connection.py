import pytest

import cloister
from cloister import connection, verdict
from cloister_attest.checks import check_names
from cloister_attest.result import AttestationResult, Check
from cloister_data.datasets import DatasetList
from cloister_data.errors import ConfigurationError, InvalidRequestError, NotFoundError, UnreachableError
from tests.fakes import answers
from tests.fakes.recording_guard import RecordingGuard


@pytest.fixture
def laptop(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.delenv("CLOISTER_GUARD_SOCKET", raising=False)
    monkeypatch.setenv("CLOISTER_HOME", str(tmp_path))
    connection.forget()


@pytest.mark.usefixtures("laptop")
def test_on_a_laptop_something_must_be_chosen() -> None:
    with pytest.raises(ConfigurationError, match=r"cloister connect URL --trust FILE"):
        cloister.datasets()
    with pytest.raises(ConfigurationError, match=r"cloister\.use"):
        cloister.attestation()
    with pytest.raises(ConfigurationError, match="no cloister called 'ghost'"):
        cloister.use("ghost")


# The HTTP library leaves a unix socket whose connect failed to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_socket_that_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("CLOISTER_GUARD_SOCKET", f"{tmp_path}/none.sock")
    connection.forget()
    with pytest.raises(UnreachableError):
        cloister.datasets()
    connection.forget()


def test_the_catalogue(guard: RecordingGuard) -> None:
    guard.routes["GET /datasets"] = DatasetList(datasets=(answers.dataset(), answers.dataset("hospital-b/patients")))
    found = cloister.datasets()
    assert found.names == ("hospital-a/patients", "hospital-b/patients")
    assert "hospital-b/patients" in repr(found)
    assert "&lt;b&gt;small" in found._repr_html_()
    assert [handle.name for handle in found] == list(found.names)
    assert found[1].name == "hospital-b/patients"
    with pytest.raises(NotFoundError, match="Did you mean 'hospital-a/patients'"):
        cloister.dataset("hospital-a/patient")
    for wrong in ("patients", "../x", "a/b/c", "A/b", 3):
        with pytest.raises(InvalidRequestError, match="owner/name"):
            cloister.dataset(wrong)  # type: ignore[arg-type]


def test_the_budget(guard: RecordingGuard) -> None:
    found = cloister.budget()
    assert len(found) == 4
    assert (found.limit, found.used, found.fits) == (8.0, 2.0, 5.0)
    assert found.left == 6.0
    assert "[#####..............." in repr(found)
    assert "[##+................." in repr(found)
    assert 'role="img"' in found._repr_html_()
    only = cloister.dataset("hospital-a/patients").budget
    assert {each.population for each in only.accounts} == {"hospital-a/patients"}


def _result(**changes: object) -> AttestationResult:
    checks = tuple(
        Check(name=name, verdict="pass", explanation="e", reason="r", source="s") for name in check_names("simulated")
    )
    given: dict[str, object] = {
        "platform": "simulated",
        "simulated": True,
        "checks": checks,
        "measurement": "ab" * 48,
        "chip": "cd" * 64,
        "tcb": "3",
        "verified_at": 1_700_000_000,
        "certificate": "e" * 64,
        "checkpoint": "note",
    }
    return AttestationResult.model_validate(given | changes)


def test_a_kernel_shows_the_laptops_verdict_and_says_whose_it_is(
    guard: RecordingGuard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOISTER_VERDICT", _result().to_json().decode())
    found = cloister.attestation()
    assert found.ok
    assert found.simulated
    assert verdict.FROM_LAPTOP in repr(found)
    assert "laptop" in found._repr_html_()
    assert "SIMULATED" in repr(found)


@pytest.mark.parametrize("stored", ["", "{}", "not json"])
def test_a_kernel_without_a_verdict(guard: RecordingGuard, monkeypatch: pytest.MonkeyPatch, stored: str) -> None:
    monkeypatch.setenv("CLOISTER_VERDICT", stored)
    with pytest.raises(NotFoundError, match="verdict"):
        cloister.attestation()
