"""docs/threat-model.md names what is there, and its table of promises says of each what enforces and attacks it."""

from __future__ import annotations

import re
from typing import get_args
from xml.etree import ElementTree

from cloister_attest.snp.policy import SnpPolicy
from cloister_attest.tdx.policy import TdxPolicy
from tests.fakes.documents import ROOT, table

PAGE = ROOT / "docs" / "threat-model.md"
TEXT = PAGE.read_text("utf-8")
PATH = re.compile(r"`([a-z_]+(?:/[A-Za-z0-9_.-]+)+\.[a-z]+)`")


def test_every_file_that_is_named_exists() -> None:
    named = PATH.findall(TEXT)
    assert len(named) > 20
    assert [path for path in named if not (ROOT / path).is_file()] == []


def test_each_promise_is_enforced_and_attacked() -> None:
    rows = table(PAGE, "promise")
    assert [row[0][:2] for row in rows] == ["1.", "2.", "3.", "4.", "5."]
    for _, rests, enforced, attacked, broken in rows:
        assert rests
        assert broken
        assert not [path for path in enforced.split(", ") if path.startswith("tests/")]
        tests = [ROOT / path for path in attacked.split(", ")]
        assert tests
        assert all(path.is_file() and "def test_" in path.read_text("utf-8") for path in tests)


def test_keys_of_trust_files_that_are_named_exist() -> None:
    platform = SnpPolicy.model_fields["platform_info"].annotation
    assert platform is not None
    known = {*SnpPolicy.model_fields, *TdxPolicy.model_fields, *platform.model_fields}
    rows = [*table(PAGE, "threat"), *table(PAGE, "question")]
    written = "\n".join(line for line in TEXT.splitlines() if line.startswith("|"))
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)*)(?: = \"[a-z]+\")?`", written))
    assert rows
    assert named - known <= {"gpu", "minimum_version", "collateral_dir"}
    assert {"chips_allowed", "minimum_tcb", "platform_tcb"} <= named


def test_what_is_absent_is_absent() -> None:
    """What the page calls absent: whoever builds it must say so here."""
    from cloister_data.policy import Platform

    assert set(get_args(Platform)) == {"simulated", "sev-snp", "tdx"}


def test_the_picture_is_one() -> None:
    picture = ElementTree.parse(ROOT / "docs" / "threat-model.svg").getroot()
    assert picture.tag.endswith("svg")
    assert picture.get("aria-labelledby") == "title desc"
