"""Grammars against JSON Schema's own test suite, which is in the source package of `jsonschema`.

A schema is refused by the keyword that cannot be held to, or held to: nothing that it calls invalid
can be written. Of what it calls valid, little cannot be written: members in another order than the
schema's, whole numbers with a fraction of zero, and strings that are not of their `format`.
"""

import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from longreach.cluster.rest.grammars import json_grammar
from longreach.engine.decode.detokenizer import TokenBytes
from longreach.engine.decode.grammar import Constraint, GrammarCompiler, allowed_tokens
from longreach.engine.errors import GrammarError
from longreach.lab.pocket.tokenizer import BYTES, build_tokenizer

VOCAB = BYTES + 1
END = BYTES
_FOLDER = "json/tests/draft2020-12"
_DOWNLOAD_SECONDS = 180
_MOST_WRITTEN = 200


@dataclass(frozen=True)
class Case:
    """A schema, and for each instance whether it is valid."""

    name: str
    schema: Any
    instances: list[tuple[Any, bool]]


@dataclass(frozen=True)
class Held:
    """A schema that is held to."""

    case: Case
    constraint: Constraint

    def accepts(self, instance: Any) -> bool:
        state = self.constraint.copy()
        for token in json.dumps(instance, separators=(",", ":")).encode():
            if state.is_complete or not allows(state, token):
                return False
            state.take(token)
        return state.is_complete or allows(state, END)


def allows(state: Constraint, token: int) -> bool:
    return bool(allowed_tokens(state.allowed(), VOCAB)[token])


@pytest.fixture(scope="module")
def cases(request: pytest.FixtureRequest) -> list[Case]:
    name = f"jsonschema=={version('jsonschema')}"
    folder = request.config.cache.mkdir("schema-suite")
    if not (found := list(folder.glob("*.tar.gz"))):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                   "--no-binary", ":all:", "--dest", str(folder), name]  # fmt: skip
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=_DOWNLOAD_SECONDS)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            pytest.skip(f"the source package of {name} cannot be downloaded")
        found = list(folder.glob("*.tar.gz"))
    return list(read_cases(found[0]))


def read_cases(package: Path) -> Iterator[Case]:
    with tarfile.open(package) as archive:
        for member in archive.getmembers():
            _, _, path = member.name.partition("/")
            if Path(path).parent == Path(_FOLDER) and (file := archive.extractfile(member)):
                for case in json.load(file):
                    instances = [(test["data"], test["valid"]) for test in case["tests"]]
                    yield Case(
                        f"{Path(path).stem}: {case['description']}", case["schema"], instances
                    )


@pytest.fixture(scope="module")
def held(cases: list[Case]) -> list[Held]:
    compiler = GrammarCompiler(TokenBytes(build_tokenizer()), VOCAB, (END,))
    compiled: list[Held] = []
    for case in cases:
        try:
            compiled.append(Held(case, compiler.compile(json_grammar(case.schema))))
        except GrammarError:
            continue
    return compiled


def test_many_schemas_are_held_to(cases: list[Case], held: list[Held]) -> None:
    assert len(cases) > 300
    assert len(held) > 150


def test_nothing_invalid_can_be_written(held: list[Held]) -> None:
    wrong = [
        (each.case.name, instance)
        for each in held
        for instance, is_valid in each.case.instances
        if not is_valid and each.accepts(instance)
    ]
    assert wrong == []


def test_nearly_all_that_is_valid_can_be_written(held: list[Held]) -> None:
    accepted = [
        each.accepts(instance)
        for each in held
        for instance, is_valid in each.case.instances
        if is_valid
    ]
    assert sum(accepted) > 0.9 * len(accepted)


def test_whatever_is_written_is_valid(held: list[Held]) -> None:
    """Tokens drawn at random, with a liking for those that end things."""
    draw = np.random.default_rng(0)
    weights = np.ones(VOCAB)
    weights[[END, *b'"]}']] = 50.0
    finished = 0
    for each in held:
        text = written(each.constraint.copy(), weights, draw)
        if text is not None:
            finished += 1
            jsonschema.Draft202012Validator(each.case.schema).validate(json.loads(text))
    assert finished > 0.7 * len(held)


def written(state: Constraint, weights: np.ndarray, draw: np.random.Generator) -> str | None:
    """JSON; None where it did not end."""
    tokens: list[int] = []
    for _ in range(_MOST_WRITTEN):
        if state.is_complete:
            return bytes(tokens).decode()
        try:
            likely = weights * allowed_tokens(state.allowed(), VOCAB)
        except GrammarError:
            assert not tokens  # nothing matches the schema, which some are for
            return None
        token = int(draw.choice(VOCAB, p=likely / likely.sum()))
        state.take(token)
        if token != END:
            tokens.append(token)
    return None
