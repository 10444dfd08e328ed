"""What the documents name exists: files, commands and their options, make targets, and what snippets call."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from typer.testing import CliRunner

from cloister_budget.entries import Entry
from tests.fakes.documents import DOCUMENTS, ROOT, Block, blocks, table

ALL_BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
INLINE_COMMAND = re.compile(r"(?<!`)`(cloister [a-z][^`]*)`(?!`)")
NEEDS_A_CLOISTER = "needs a cloister"
OWNERS_FILES = {"schema.toml", "policy.toml"}


def the_cli() -> typer.Typer:
    from cloister_cli.main import app

    return app


def console_lines(first_word: str) -> list[tuple[str, list[str]]]:
    """(where, words) of every command in the console blocks that begins with `first_word`."""
    found = []
    for block in ALL_BLOCKS:
        if block.info != "console":
            continue
        for line in block.text.splitlines():
            for command in re.sub(r"^[$#] ", "", line).split(" && "):
                words = shlex.split(command)
                if words and words[0].rsplit("/", 1)[-1] == first_word:
                    found.append((str(block), words))
    return found


def named_commands() -> dict[tuple[str, ...], str]:
    """Every `cloister ...` that a document names, as the words before the first argument or option, and where."""
    lines = [(where, words) for where, words in console_lines("cloister")]
    for document in DOCUMENTS:
        for found in INLINE_COMMAND.finditer(document.read_text("utf-8")):
            lines.append((document.name, found.group(1).split()))
    return {tuple(words[1:]): where for where, words in lines}


def resolve(words: tuple[str, ...]) -> tuple[Any, tuple[str, ...]]:
    """The click command that `words` reach, and the words that are left for it."""
    command: Any = typer.main.get_command(the_cli())
    rest = list(words)
    while rest and (offered := getattr(command, "commands", None)) is not None:
        if rest[0] not in offered:
            raise AssertionError(f"there is no command {rest[0]!r}")
        command = offered[rest.pop(0)]
    return command, tuple(rest)


def test_there_is_something_to_check() -> None:
    assert len(DOCUMENTS) >= 5
    assert len(ALL_BLOCKS) > 10
    assert ("user", "hash-password") in named_commands()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in LINK.findall(document.read_text("utf-8")):
        if not target.startswith(("https://", "http://")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_where_is() -> None:
    rows = table(ROOT / "README.md", "where is ...")
    assert len(rows) == 12


@pytest.mark.parametrize("words", named_commands(), ids=" ".join)
def test_every_command_that_is_named_exists(words: tuple[str, ...]) -> None:
    command, rest = resolve(words)
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in rest:
        if word.startswith("-"):
            assert word.split("=")[0] in options, f"cloister {' '.join(words)}: no option {word}"
    path = words[: len(words) - len(rest)]
    answer = CliRunner().invoke(the_cli(), [*path, "--help"])
    assert answer.exit_code == 0, answer.output
    assert "Usage" in answer.output


def test_an_unknown_command_would_be_noticed() -> None:
    with pytest.raises(AssertionError, match="there is no command"):
        resolve(("frobnicate",))


def test_every_make_target_that_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.M))
    named = {word for _, words in console_lines("make") for word in words[1:]}
    for document in DOCUMENTS:
        named |= set(re.findall(r"`make ([a-z-]+)`", document.read_text("utf-8")))
    assert {"demo", "test", "lab"} <= named <= targets
    assert len(set(re.findall(r"^\.PHONY:(.*)$", makefile, re.M)[0].split())) <= 8


def test_continuous_integration_runs_what_people_run() -> None:
    entry = ROOT / ".ci" / "run"
    assert os.access(entry, os.X_OK)
    lines = entry.read_text("utf-8").splitlines()
    assert lines[:2] == ["#!/usr/bin/env bash", "set -euo pipefail"]
    assert lines[-1] == "make test"


def test_every_toml_block_says_what_it_is() -> None:
    notes = {block.note for block in ALL_BLOCKS if block.info == "toml"}
    assert notes == OWNERS_FILES | {"trust file", "lines of a trust file"}


def test_extras_that_are_named_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    named = {
        name for document in DOCUMENTS for name in re.findall(r"(?:cloister|\.)\[([a-z]+)\]", document.read_text())
    }
    assert "lab" in named
    assert named <= set(extras)


def test_the_owners_files_load(tmp_path: Path) -> None:
    from cloister_cli.declare import load_policy, load_schema

    files = {block.note: block.text for block in ALL_BLOCKS if block.info == "toml" and block.note in OWNERS_FILES}
    assert set(files) == OWNERS_FILES
    for name, text in files.items():
        (tmp_path / name).write_text(text, "utf-8")
    assert [column.type for column in load_schema(tmp_path / "schema.toml").columns] == ["integer", "real", "category"]
    assert load_policy(tmp_path / "policy.toml", "hospital-a/trial", 1).users["ada"].epsilon == 5


def python_blocks(needs_a_cloister: bool) -> list[Block]:
    return [b for b in ALL_BLOCKS if b.info == "python" and (b.note == NEEDS_A_CLOISTER) == needs_a_cloister]


def test_snippets_that_need_no_cloister_run() -> None:
    for block in python_blocks(needs_a_cloister=False):
        exec(compile(block.text, str(block), "exec"), {})


@pytest.mark.parametrize("block", python_blocks(needs_a_cloister=True), ids=str)
def test_snippets_call_what_exists(block: Block) -> None:
    """Every attribute of `cloister` and every method of a handle or a job, with the names of its arguments."""
    import cloister

    handle = cloister.DatasetHandle
    job = cloister.Job
    kinds: dict[str, object] = {"cloister": cloister, "ds": handle, "train_set": handle, "test_set": handle, "job": job}
    tree = ast.parse(block.text)
    shared: dict[str, list[str]] = {
        node.targets[0].id: [keyword.arg or "" for keyword in node.value.keywords]
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Call)
    }
    seen = 0
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id in kinds):
            continue
        function = getattr(kinds[node.func.value.id], node.func.attr)
        names: list[str] = []
        for keyword in node.keywords:
            if keyword.arg:
                names.append(keyword.arg)
            elif isinstance(keyword.value, ast.Name):
                names += shared[keyword.value.id]
        offered = inspect.signature(function).parameters
        for name in names:
            assert name in offered, f"{block}: {node.func.attr}() takes no {name}"
        seen += 1
    assert seen > 5


def test_every_entry_of_the_log_is_described() -> None:
    union, _ = get_args(Entry)
    kinds = {get_args(kind.model_fields["kind"].annotation)[0] for kind in get_args(union)}
    page = (ROOT / "docs/audit.md").read_text("utf-8")
    assert set(re.findall(r"^\| `([a-z-]+)` \|", page, re.M)) == kinds
