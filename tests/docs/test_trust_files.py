"""Every trust file that a document shows is one: it is parsed as a client parses it."""

from __future__ import annotations

import tomllib

import pytest

from cloister_attest.policy import AttestationPolicy
from tests.fakes.documents import DOCUMENTS, Block, blocks

ALL_BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
FILES = [block for block in ALL_BLOCKS if block.note == "trust file"]
LINES = [block for block in ALL_BLOCKS if block.note == "lines of a trust file"]


@pytest.mark.parametrize("block", FILES, ids=str)
def test_a_trust_file_is_one(block: Block) -> None:
    assert block.info == "toml"
    policy = AttestationPolicy.from_toml(block.text, str(block))
    assert AttestationPolicy.from_toml(policy.to_toml()) == policy
    assert policy.platform == "simulated" or policy.hardware.debug == "forbidden"


def with_lines(file: str, lines: str) -> str:
    """The file with these lines in the place of its own lines of the same keys."""
    changed = {next(iter(tomllib.loads(line))): line for line in lines.splitlines() if line and line[0] != "#"}
    made, left = [], set(changed)
    for line in file.splitlines():
        key = line.split("=", 1)[0].strip()
        left.discard(key)
        made.append(changed.get(key, line))
    assert not left, f"the file has no keys {sorted(left)}"
    return "\n".join(made)


@pytest.mark.parametrize("block", LINES, ids=str)
def test_lines_for_a_trust_file_fit_into_one(block: Block) -> None:
    file = next(
        file
        for file in FILES
        if file.document == block.document and 'platform = "sev-snp"' in file.text and file.line < block.line
    )
    before = AttestationPolicy.from_toml(file.text)
    assert AttestationPolicy.from_toml(with_lines(file.text, block.text), str(block)) != before
