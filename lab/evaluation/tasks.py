"""Questions about facts that are hidden in a long document, at a depth that can be chosen."""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ...engine.errors import InvalidRequestError
from ...engine.model.pocket import story
from ...engine.text.fitting import fit
from ..pocket import corpus, text
from .answerer import TokenCount

_KEY_VALUES = 12
_SHORTEST_VALUE = 5
_SAMPLE_SIZE = 4096


@dataclass(frozen=True)
class Prompt:
    """What a user says, and what a right answer holds."""

    content: str
    expected: tuple[str, ...]


Build = Callable[[int, int, float | None], Prompt]
"""Makes the prompt of a size (in units of its own), a seed and a depth; depth None is anywhere."""

Score = Callable[[str, Sequence[str]], float]
"""How right an answer is, 0 to 1, given what was expected."""


@dataclass(frozen=True)
class Task:
    """One kind of question.

    `builds` are tried in order: the first whose shortest prompt fits is used. `least` is the
    smallest size that they make. `has_depth` tells whether the depth can be chosen.
    """

    name: str
    builds: tuple[Build, ...]
    score: Score
    answer_tokens: int
    has_depth: bool = False
    least: int = 0

    def prompt(self, tokens: int, seed: int, depth: float | None, count: TokenCount) -> Prompt:
        """The prompt of exactly or just under `tokens` tokens; the same arguments make the same.

        Raises:
            InvalidRequestError: so few tokens cannot hold it, or it has no depth to choose.
        """
        self.check_depth(depth)
        *others, last = self.builds
        for build in others:
            if count(build(self.least, seed, depth).content) <= tokens:
                last = build
                break

        def count_of(size: int) -> int:
            return count(last(size, seed, depth).content)

        return last(fit(count_of, tokens, self.least).size, seed, depth)

    def check_depth(self, depth: float | None) -> None:
        """Refuse a depth that this task cannot have.

        Raises:
            InvalidRequestError: it can have none.
        """
        if depth is not None and not self.has_depth:
            raise InvalidRequestError(
                f"{self.name} hides its facts anywhere; ask with --depths any, or leave it out"
            )

    def sample(self) -> str:
        """A few thousand characters of a prompt, for whoever estimates their tokens."""
        return self.builds[0](_SAMPLE_SIZE, 0, None).content[-_SAMPLE_SIZE:]

    def most_answer_tokens(self, prompt: Prompt) -> int:
        """Room for the answer, also where a token is one byte."""
        return max(self.answer_tokens, 2 * len(", ".join(prompt.expected).encode()))


def says_it(answered: str, expected: Sequence[str]) -> float:
    """1 if an answer holds each expected text as whole words, else 0."""
    found = (re.search(rf"(?<!\w){re.escape(each)}(?!\w)", answered) for each in expected)
    return float(all(found))


def _pass_key(size: int, seed: int, depth: float | None) -> Prompt:
    """One key among sentences of a story; `size` is the bytes of these."""
    chance = random.Random(f"pass key/{depth}/{seed}")
    key = str(chance.randint(10_000, 99_999))
    fact = story.PASS_KEY_FACT.format(value=key)
    depth = chance.random() if depth is None else depth
    document = hide([(depth, fact)], _filler(story.sentences(chance), size))
    return Prompt(f"{document}\n{story.PASS_KEY_QUESTION}", (key,))


def _key_value(size: int, seed: int, depth: float | None) -> Prompt:
    """One of twelve named values among text of all kinds; `size` is the bytes of that."""
    chance = random.Random(f"key value/{depth}/{seed}")
    names = _new_names(chance, _KEY_VALUES)
    values = [_new_value(chance) for _ in names]
    depths = [chance.random() for _ in names]
    if depth is not None:
        depths[0] = depth
    filler = _filler(text.filler(chance), size)
    everything = "".join(filler)
    while values[0] in everything or any(values[0] in other for other in values[1:]):
        values[0] = _new_value(chance)
    facts = [f"The {name} is {value}. " for name, value in zip(names, values, strict=True)]
    document = hide(list(zip(depths, facts, strict=True)), filler)
    return Prompt(f"{document}\nWhat is the {names[0]}?", (values[0],))


def _one_of_facts(size: int, seed: int, depth: float | None) -> Prompt:
    """One of twelve facts stated in many ways, as the pocket model was trained on."""
    least = len(corpus.one_of_facts_prompt(0, seed).content.encode())
    prompt = corpus.one_of_facts_prompt(least + size, seed)
    return Prompt(prompt.content, (prompt.expected,))


NEEDLES = (
    Task("pass-key", (_pass_key,), says_it, 48, has_depth=True),
    Task("key-value", (_key_value,), says_it, 48, has_depth=True),
    Task("one-of-12-facts", (_one_of_facts,), says_it, 48),
)
"""Retrieval of one fact. The last is what the pocket model's card tells of."""


def hide(facts: Sequence[tuple[float, str]], pieces: Sequence[str]) -> str:
    """A document of pieces with facts between them, each at a depth of 0 (start) to 1 (end)."""
    total = sum(map(len, pieces))
    waiting = sorted(facts, key=lambda fact: fact[0])
    parts: list[str] = []
    position = 0
    for piece in pieces:
        while waiting and waiting[0][0] * total <= position:
            parts.append(waiting.pop(0)[1])
        parts.append(piece)
        position += len(piece)
    parts.extend(fact for _, fact in waiting)
    return "".join(parts)


def _filler(pieces: Iterator[str], size: int) -> list[str]:
    """Pieces of exactly `size` bytes together."""
    return [piece.decode() for piece in text.fill(pieces, size)]


def _new_names(chance: random.Random, count: int) -> list[str]:
    """Names that were never trained on, none of which is part of another."""
    names: list[str] = []
    while len(names) < count:
        name = text.phrase(chance, held_out=True)
        if not any(name in other or other in name for other in names):
            names.append(name)
    return names


def _new_value(chance: random.Random) -> str:
    """A value long enough that text does not hold it by chance."""
    value = ""
    while len(value) < _SHORTEST_VALUE:
        value = text.value(chance)
    return value
