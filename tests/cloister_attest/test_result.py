"""The verdict as people and programs read it."""

import pytest
from pydantic import ValidationError

from cloister_attest.checks import check_names
from cloister_attest.result import SIMULATED_WARNING, AttestationResult, Check

CHECK_NAMES = check_names("simulated")


def check(name: str, verdict: str = "pass", reason: str = "because") -> Check:
    return Check(name=name, verdict=verdict, explanation="what it establishes", reason=reason, source="a text")


def result(checks=None, **fields) -> AttestationResult:
    given = {
        "platform": "simulated",
        "simulated": True,
        "checks": tuple(check(name) for name in CHECK_NAMES) if checks is None else checks,
        "measurement": "ab" * 48,
        "chip": "cd" * 64,
        "tcb": "3",
        "verified_at": 1_800_000_000,
        "certificate": "0" * 64,
        "checkpoint": "log\n1\n",
    }
    return AttestationResult(**{**given, **fields})


def test_all_passed():
    assert result().ok
    assert result().failed == ()


@pytest.mark.parametrize("name", CHECK_NAMES)
def test_one_failure_or_one_missing_check_refuses(name):
    assert not result(tuple(check(n, "fail" if n == name else "pass") for n in CHECK_NAMES)).ok
    assert not result(tuple(check(n) for n in CHECK_NAMES if n != name)).ok
    assert result(tuple(check(n, "not-applicable" if n == name else "pass") for n in CHECK_NAMES)).ok


def test_a_check_that_failed_twice_is_failed_once_and_for_all():
    assert not result((*(check(name) for name in CHECK_NAMES), check("chip", "fail"))).ok


@pytest.mark.parametrize("platform", [None, "sev-snp", "tdx"])
def test_the_checks_of_another_platform_are_not_enough(platform):
    assert not result(platform=platform).ok


def test_no_checks_at_all_is_a_refusal():
    assert not result(()).ok
    assert "REFUSED" in result(()).table()
    assert "checks are missing" in result(()).table()


@pytest.mark.parametrize("verdict", ["fail", "not-applicable"])
def test_whatever_did_not_pass_says_why(verdict):
    with pytest.raises(ValidationError):
        check("chip", verdict, "")


def test_it_survives_the_wire():
    assert AttestationResult.from_json(result().to_json()) == result()


def test_the_table_is_loud_about_simulation():
    assert result().table().startswith(SIMULATED_WARNING)
    assert SIMULATED_WARNING in result()._repr_html_()
    assert SIMULATED_WARNING not in result(simulated=False, platform="sev-snp").table()
    assert SIMULATED_WARNING not in result(simulated=False, platform="sev-snp")._repr_html_()


def test_the_html_is_escaped():
    hostile = '<script>alert(1)</script>"&'
    html = result((check("chip", "fail", hostile),))._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_a_terminal_is_not_driven_by_the_verdict():
    assert "\x1b" not in result((check("chip", "fail", "\x1b[2J\rall is well"),)).table()
    assert "\x1b" not in result((check("chip", "fail", "\x1b[2J\rall is well"),))._repr_html_()


def test_a_moment_out_of_any_calendar_is_shown_as_a_number():
    assert "4611686018427387904 s" in result(verified_at=1 << 62).table()
