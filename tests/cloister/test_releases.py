import math

import pytest

import cloister
from cloister.releases import Release, laplace_quantile
from cloister_data.errors import InvalidRequestError
from cloister_data.release import ReleaseList
from tests.fakes import answers
from tests.fakes.recording_guard import RecordingGuard


def _tail(scale: float, t: int) -> float:
    """P(|X| > t), summed up."""
    ratio = math.exp(-1 / scale)
    norm = (1 - ratio) / (1 + ratio)
    return 1 - sum(norm * ratio ** abs(k) for k in range(-t, t + 1))


@pytest.mark.parametrize("scale", [0.1, 0.5, 1.0, 5.0, 37.5])
@pytest.mark.parametrize("alpha", [0.5, 0.1, 0.05, 0.001])
def test_quantiles_are_the_smallest_that_hold(scale: float, alpha: float) -> None:
    t = laplace_quantile(scale, alpha)
    assert _tail(scale, t) <= alpha + 1e-12
    assert t == 0 or _tail(scale, t - 1) > alpha - 1e-12


def test_one_number() -> None:
    release = Release(answers.release())
    assert release.value == 54.25
    assert float(release) == 54.25
    assert release.interval() == (52.75, 55.75)
    assert "noised" in repr(release)
    assert "54.2" in repr(release)
    assert release.charge.epsilon == 0.2
    assert release.receipt.leaf == 3
    low, high = release.interval(alpha=0.001)
    assert low < 52.75
    assert high > 55.75
    narrow = release.interval(alpha=0.5)
    assert isinstance(narrow, tuple)
    assert narrow[1] - narrow[0] < 3.0


def test_a_number_for_each_group() -> None:
    release = Release(answers.ratio())
    assert release.value == {"never": 1.0, "<daily>": 2.0}
    intervals = release.interval()
    assert isinstance(intervals, dict)
    assert intervals["<daily>"] == (1.75, 2.25)
    assert "&lt;daily&gt;" in release._repr_html_()
    frame = release.to_pandas()
    assert list(frame.index) == ["never", "<daily>"]
    with pytest.raises(InvalidRequestError, match="each group"):
        float(release)


def test_a_history_says_what_waits_for_an_owner() -> None:
    from cloister.releases import History

    waiting = History([Release(answers.release())], 2)
    assert "2 more are paid" in repr(waiting)
    assert "2 more are paid" in waiting._repr_html_()
    assert "more are paid" in repr(History([], 1))
    assert "more are paid" not in repr(History([Release(answers.release())]))


def test_an_interval_is_never_narrower_than_it_is_known() -> None:
    with pytest.raises(InvalidRequestError, match="95%"):
        Release(answers.ratio()).interval(alpha=0.01)
    wide = Release(answers.ratio()).interval(alpha=0.2)
    assert isinstance(wide, dict)
    assert 1.75 < wide["<daily>"][0] < 2.0


@pytest.mark.parametrize("alpha", [0, 1, -0.1, float("nan"), True, "0.05"])
def test_a_bad_alpha(alpha: object) -> None:
    with pytest.raises(InvalidRequestError, match="alpha"):
        Release(answers.release()).interval(alpha=alpha)  # type: ignore[arg-type]


def test_a_model_holds_no_numbers() -> None:
    release = Release(answers.release((), kind="model"))
    with pytest.raises(InvalidRequestError, match=r"job\.result"):
        _ = release.value


def test_history(guard: RecordingGuard) -> None:
    guard.routes["GET /releases"] = ReleaseList(
        releases=(answers.release(), answers.ratio(), answers.release((), kind="model"))
    )
    found = cloister.history()
    assert len(found) == 3
    assert found[0].value == 54.25
    assert "2 numbers" in repr(found)
    assert "model" in found._repr_html_()
    guard.routes["GET /releases"] = ReleaseList(releases=())
    assert "Nothing" in repr(cloister.history())
