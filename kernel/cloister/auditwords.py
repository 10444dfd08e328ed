"""An entry of the audit log in words: whom and what it is about, and what it says. Entries of unknown kinds too."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from cloister.auditlog import Record
from cloister.rendering import figure

SUBJECTS = ("user", "owner", "dataset")
"""Facts that are refs of whom and what an entry is about, in the order of telling."""
NAMES_TOLD = 3
LONGEST_VALUE, LONGEST_SUMMARY = 80, 400
"""Characters."""

_HEX = re.compile(r"[0-9a-f]{32}|[0-9a-f]{64}")

Say = Callable[[str], str]
"""The name that a ref stands for, or a short form of it."""


def about(record: Record) -> str:
    """The users and datasets of an entry by name; of a kind that tells neither there, the first names in its facts."""
    facts, say = record.facts, _namer(record)
    refs = [facts[key] for key in SUBJECTS if isinstance(facts.get(key), str)]
    sources = facts.get("sources")
    for source in sources if isinstance(sources, list) else ():
        if isinstance(source, dict) and isinstance(source.get("dataset"), str):
            refs.append(source["dataset"])
    refs = refs or [text for text in _texts(facts) if text in record.names]
    told = list(dict.fromkeys(say(ref) for ref in refs))
    more = [f"and {len(told) - NAMES_TOLD} more"] if len(told) > NAMES_TOLD else []
    return ", ".join(told[:NAMES_TOLD] + more) or "-"


def summary(record: Record) -> str:
    """What an entry says, in a line of at most `LONGEST_SUMMARY` characters."""
    say = _namer(record)
    try:
        text = _SENTENCES[record.kind](record.facts, say)
    except (KeyError, TypeError, ValueError, AttributeError):
        # A kind, or a form of one, from a newer cloister.
        text = _generic(record.facts, say)
    return _short(text, LONGEST_SUMMARY)


def _namer(record: Record) -> Say:
    def say(text: str) -> str:
        return record.names.get(text) or (f"{text[:8]}…" if _HEX.fullmatch(text) else text)

    return say


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)


def _generic(facts: dict[str, Any], say: Say) -> str:
    return ", ".join(f"{key} {_value(value, say)}" for key, value in facts.items() if key not in SUBJECTS)


def _value(value: Any, say: Say) -> str:
    if isinstance(value, str):
        return _short(say(value), LONGEST_VALUE)
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return _short("[" + ", ".join(say(each) for each in value) + "]", LONGEST_VALUE)
    return _short(json.dumps(value, ensure_ascii=False), LONGEST_VALUE)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _population(facts: dict[str, Any], say: Say) -> str:
    parts = f", in {facts['parts']} parts" if facts["parts"] > 1 else ""
    return f"new accounts for {say(facts['population'])}{parts}"


def _limits(facts: dict[str, Any], say: Say) -> str:
    each = (f"{say(limit['account'])}: epsilon {figure(limit['limit']['epsilon'])}" for limit in facts["limits"])
    return f"policy version {facts['version']}: {', '.join(each)}"


def _reserved(facts: dict[str, Any], say: Say) -> str:
    price = f"epsilon {figure(facts['epsilon'])} at delta {facts['delta']:g}"
    steps = f", {facts['steps']} steps" if facts["steps"] else ""
    return f"{facts['operation']} paid: {price}, {facts['mechanism']['kind']}{steps}, charge {say(facts['charge'])}"


def _settled(facts: dict[str, Any], say: Say) -> str:
    end = "gave everything back" if facts["state"] == "released" else "ended without an answer"
    steps = f" after {facts['steps']} steps" if facts["steps"] else ""
    return f"charge {say(facts['charge'])} {end}{steps}"


def _counted(facts: dict[str, Any], say: Say) -> str:
    refused = (
        f"{facts[key]} {what}"
        for key, what in (
            ("sign_ins_refused", "sign-ins"), ("tokens_refused", "tokens"), ("witness_calls_refused", "witness calls")
        )
        if facts[key]
    )  # fmt: skip
    return f"evidence shown {facts['evidence']} times; refused: {', '.join(refused) or 'nothing'}"


def _transferred(facts: dict[str, Any], say: Say) -> str:
    way = "to" if facts["direction"] == "put" else "from"
    where = f"file {say(facts['file'])} {way} kernel {say(facts['kernel'])}"
    return f"{where}, {facts['size']} bytes, SHA-256 {facts['content']}"


_LOCKED = {"silent": "the witness is silent", "terms": "the owner named another witness"}

_SENTENCES: dict[str, Callable[[dict[str, Any], Say], str]] = {
    "guard-started": lambda facts, say: f"a guard started on {facts['platform']} hardware",
    "user-created": lambda facts, say: f"new user, {facts['role']}",
    "login": lambda facts, say: "signed in",
    "kernel": lambda facts, say: f"kernel {say(facts['kernel'])} started, kept apart by: {facts['sandbox']}",
    "transfer": _transferred,
    "refused": lambda facts, say: f"a request was refused by the {facts['code'].removesuffix('-refused')}",
    "counted": _counted,
    "owner-terms": lambda facts, say: f"terms version {facts['version']}: witness {facts['witness'][:8]}…",
    "unlocked": lambda facts, say: f"data opened by the witness, which has signed for {facts['size']} entries",
    "locked": lambda facts, say: f"data locked: {_LOCKED[facts['reason']]}",
    "restored": lambda facts, say: f"a backup with {facts['first']} entries was put back; those after it are restored",
    "restore-accepted": lambda facts, say: f"accepted the restore at entry {facts['restored']}",
    "population": _population,
    "upload": lambda facts, say: f"version {facts['version']}, {facts['units']} people of {say(facts['population'])}",
    "policy": lambda facts, say: f"policy version {facts['version']} in force",
    "limits": _limits,
    "charge-reserved": _reserved,
    "charge-settled": _settled,
    "release": lambda facts, say: f"answer {say(facts['release'])} left, charge {say(facts['charge'])}",
    "budget-request": lambda facts, say: f"asks for more, request {say(facts['request'])}",
    "budget-answer": lambda facts, say: f"request {say(facts['request'])} {facts['state']}",
}
