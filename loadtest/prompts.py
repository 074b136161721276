"""Prompts whose answer is known: a pass key somewhere in ordinary text, and a question for it."""

import random
import re
from dataclasses import dataclass

_FACT = "The pass key is {key}. Remember it. {key} is the pass key. "
_QUESTION = "What is the pass key?"
_SUBJECTS = ("The river", "A traveller", "The old clock", "Her brother", "The market", "One ship")
_VERBS = ("waited for", "passed by", "remembered", "turned towards", "followed", "watched")
_OBJECTS = ("the mountain", "a long winter", "the harbour", "an empty road", "the first light")

SHORT_ANSWER = 16
"""Tokens that are enough for a key."""


@dataclass(frozen=True)
class TextSize:
    """How long text is in a model's tokens.

    Attributes:
        template_tokens: what a chat template adds to a message, however long that is.
    """

    characters_per_token: float
    template_tokens: float = 0.0

    def characters(self, tokens: int) -> float:
        """Of a message that makes a prompt of so many tokens."""
        return max(0.0, (tokens - self.template_tokens) * self.characters_per_token)


@dataclass(frozen=True)
class Prompt:
    """A user's message, the number that answers it, and about how many tokens it has."""

    text: str
    key: str
    tokens: int

    def is_answered_by(self, answer: str) -> bool:
        """Whether it holds the key."""
        return says_key(answer, self.key)


def says_key(answer: str, key: str) -> bool:
    """Whether the first number in an answer is the key: to say several is no answer."""
    return re.findall(r"\d+", answer)[:1] == [key]


class PromptMaker:
    """Makes prompts of about so many tokens, no two alike."""

    def __init__(self, size: TextSize, seed: int) -> None:
        self.size = size
        # Of text: some different whole numbers, such as 2 and 2^32 + 2, make the same chance.
        self._chance = random.Random(f"prompts {seed}")

    def make(self, tokens: int, opening: str = "") -> Prompt:
        """A prompt of about `tokens` tokens; its key lies anywhere in what follows `opening`."""
        key = str(self._chance.randint(10_000, 99_999))
        fact = _FACT.format(key=key)
        wanted = self.size.characters(tokens) - len(opening) - len(fact) - len(_QUESTION)
        parts = sentences(self._chance, wanted)
        parts.insert(self._chance.randint(0, len(parts)), fact)
        return Prompt(f"{opening}{''.join(parts)}\n{_QUESTION}", key, tokens)


def sentences(chance: random.Random, characters: float) -> list[str]:
    """Ordinary text of so many characters, or as many as whole sentences have."""
    made: list[str] = []
    while characters > 0:
        words = map(chance.choice, (_SUBJECTS, _VERBS, _OBJECTS))
        made.append(" ".join(words) + ". ")
        characters -= len(made[-1])
    return made


def sample_text(characters: int) -> str:
    """Text as it is in prompts, to find out how many characters a token has."""
    return PromptMaker(TextSize(1.0), seed=0).make(characters).text
