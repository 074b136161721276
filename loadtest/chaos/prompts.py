"""Prompts whose answer is known: a pass key somewhere in ordinary text, and a question for it."""

import random
import re
from dataclasses import dataclass

_FACT = "The pass key is {key}. Remember it. {key} is the pass key. "
_QUESTION = "What is the pass key?"
_SUBJECTS = ("The river", "A traveller", "The old clock", "Her brother", "The market", "One ship")
_VERBS = ("waited for", "passed by", "remembered", "turned towards", "followed", "watched")
_OBJECTS = ("the mountain", "a long winter", "the harbour", "an empty road", "the first light")
_SAMPLE_CHARACTERS = 20_000


@dataclass(frozen=True)
class Prompt:
    """A user's message, the number that answers it, and about how many tokens it has."""

    text: str
    key: str
    tokens: int

    def is_answered_by(self, answer: str) -> bool:
        """Whether the first number in the answer is the key: to say several is no answer."""
        return re.findall(r"\d+", answer)[:1] == [self.key]


class PromptMaker:
    """Makes prompts of about so many tokens, no two alike."""

    def __init__(self, characters_per_token: float, seed: int) -> None:
        self._characters_per_token = characters_per_token
        self._chance = random.Random(seed)

    def make(self, tokens: int) -> Prompt:
        """A prompt of about `tokens` tokens; its key lies anywhere in it."""
        key = str(self._chance.randint(10_000, 99_999))
        fact = _FACT.format(key=key)
        wanted = tokens * self._characters_per_token - len(fact) - len(_QUESTION)
        sentences = self._sentences(wanted)
        sentences.insert(self._chance.randint(0, len(sentences)), fact)
        return Prompt(f"{''.join(sentences)}\n{_QUESTION}", key, tokens)

    def _sentences(self, characters: float) -> list[str]:
        sentences: list[str] = []
        while characters > 0:
            words = map(self._chance.choice, (_SUBJECTS, _VERBS, _OBJECTS))
            sentences.append(" ".join(words) + ". ")
            characters -= len(sentences[-1])
        return sentences


def sample_text() -> str:
    """Text as it is in prompts, to find out how many characters a token has."""
    return PromptMaker(1.0, seed=0).make(_SAMPLE_CHARACTERS).text
