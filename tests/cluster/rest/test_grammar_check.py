"""Grammars that would hang, grow or crash whoever compiles them."""

import asyncio
import random
import time
from pathlib import Path
from typing import Any

import pytest

from longreach.cluster.rest.errors import RestError
from longreach.cluster.rest.grammar_check import GrammarCheck, Verdict
from longreach.cluster.rest.grammars import json_grammar, regex_grammar
from longreach.cluster.rest.schemas import CompletionBody
from longreach.engine.model.pocket import CHECKPOINT

SECONDS = 2.0
# A process may have to start in between, beside other tests.
GRACE = 60.0


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def doubling(levels: int) -> dict[str, Any]:
    both = [
        {f"d{level}": {"allOf": [{"$ref": f"#/$defs/d{level + 1}"}] * 2}} for level in range(levels)
    ]
    definitions = {name: value for each in both for name, value in each.items()}
    return {"$defs": {**definitions, f"d{levels}": {"type": "string"}}, "$ref": "#/$defs/d0"}


def words(count: int) -> list[str]:
    letters = random.Random(0)
    return ["".join(letters.choices("abcdefgh", k=8)) for _ in range(count)]


HOSTILE = {
    "patterns that cross": json_grammar(
        {"type": "object", "patternProperties": {f"^a{i}.*b{i}$": {} for i in range(900)}}
    ),
    "a chain of rules": "start: r0\n"
    + "\n".join(f"r{i}: r{i + 1}" for i in range(4000))
    + '\nr4000: "a"',
    "a chain of terminals": "start: R0\n"
    + "\n".join(f'R{i}: R{i + 1} "b"' for i in range(2500))
    + '\nR2500: "a"',
    "terminals that double": "start: R0\n"
    + "\n".join(f"R{i}: R{i + 1} R{i + 1}" for i in range(40))
    + '\nR40: "a"',
    "nested parentheses": f"start: {'(' * 30_000}/a/{')' * 30_000}",
    "a deep schema": json_grammar(nested(150)),
    "references that double": json_grammar(doubling(30)),
    "a huge enumeration": json_grammar({"enum": words(5500)}),
    "a huge pattern": regex_grammar("|".join(words(7000))),
    "repetitions of repetitions": regex_grammar("((((a{0,50}){0,50}){0,50}){0,50}){0,50}"),
    "many states": regex_grammar("(a|b)*a(a|b){400}c"),
    "blank lines before nothing": 'root ::= "a"' + "\n" * 130_000,
    "GBNF whose rules wait for the next": "\n".join(f"r{i} ::= r{i + 1}" for i in range(9000))
    + '\nr9000 ::= "a"\nroot ::= r0',
    "many properties": json_grammar(
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}
    ),
    "nothing matches": json_grammar({"$ref": "#"}),
}


def test_hostile_grammars_are_done_with_in_time() -> None:
    """Some compile, others are refused; none takes long, and none ends what asks."""
    outcomes = asyncio.run(check_all(HOSTILE))
    refused = {name for name, (error, _) in outcomes.items() if error is not None}
    assert {"patterns that cross", "a chain of rules", "nested parentheses", "a deep schema",
            "nothing matches", "blank lines before nothing", "GBNF whose rules wait for the next",
            } <= refused  # fmt: skip
    for name, (error, seconds) in outcomes.items():
        assert seconds < SECONDS + GRACE, name
        assert error is None or (error.status, error.param) == (400, "field"), name
    # Afterwards all is as before.
    assert asyncio.run(check_all({"good": 'start: "a"'}, SECONDS + GRACE))["good"][0] is None


def test_gbnf_is_put_into_lark_where_it_can_do_no_harm() -> None:
    """Which takes minutes for a few that are hostile, in Python and with its lock."""
    body = CompletionBody.model_validate({"prompt": "a", "guided_grammar": 'root ::= "a" [0-9]'})
    [(param, grammar)] = body.held_to().items()
    assert grammar == body.guided_grammar
    checking = GrammarCheck(CHECKPOINT, SECONDS + GRACE)
    lark, again = (asyncio.run(checking.check(grammar, param)) for _ in range(2))
    checking.close()
    assert lark == again
    assert lark.count("start:") == 1


async def check_all(
    grammars: dict[str, str], seconds: float = SECONDS
) -> dict[str, tuple[RestError | None, float]]:
    checking = GrammarCheck(CHECKPOINT, seconds)
    outcomes: dict[str, tuple[RestError | None, float]] = {}
    for name, grammar in grammars.items():
        started = time.monotonic()
        error = None
        try:
            await checking.check(grammar, "field")
        except RestError as refusal:
            error = refusal
        outcomes[name] = error, time.monotonic() - started
    checking.close()
    return outcomes


def test_what_is_known_is_not_compiled_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    jobs: list[str] = []

    def do(process: object, grammar: str) -> Verdict:
        jobs.append(grammar)
        return Verdict(wrong="wrong") if "(" in grammar else Verdict()

    monkeypatch.setattr("longreach.cluster.rest.child.ChildProcess.do", do)
    checking = GrammarCheck(tmp_path)

    async def ask() -> None:
        await asyncio.gather(*(checking.check("good", "a") for _ in range(3)))
        for _ in range(2):
            with pytest.raises(RestError, match="b: wrong"):
                await checking.check("(", "b")

    asyncio.run(ask())
    assert jobs == ["good", "("]
