"""Every kind of entry that this version writes has words of its own."""

from __future__ import annotations

from typing import get_args

from cloister.auditwords import _SENTENCES
from cloister_budget.entries import Entry


def test_every_kind_has_a_sentence() -> None:
    union, _ = get_args(Entry)
    assert {get_args(kind.model_fields["kind"].annotation)[0] for kind in get_args(union)} == set(_SENTENCES)


def test_the_words_for_what_nobody_in_particular_did() -> None:
    nobody = {"evidence": 3, "sign_ins_refused": 2, "tokens_refused": 0, "witness_calls_refused": 1}
    say = _SENTENCES["counted"]
    assert say(nobody, str) == "evidence shown 3 times; refused: 2 sign-ins, 1 witness calls"
    assert say(dict.fromkeys(nobody, 0), str) == "evidence shown 0 times; refused: nothing"
    assert _SENTENCES["locked"]({"reason": "silent"}, str) == "data locked: the witness is silent"
    assert _SENTENCES["refused"]({"code": "budget-refused"}, str) == "a request was refused by the budget"
